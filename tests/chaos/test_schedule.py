"""A seeded schedule of faults against a real cluster: the run ends by itself, says what happened, and is the run that nobody touched.

`make chaos FAULTS=50` draws fifty. MASKWRIGHT_CHAOS_SEED repeats a schedule.
"""

import json
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.commands import maskwright
from tests.support.ray_nodes import RayCluster, cluster_of
from tests.support.rig import EVERY_STEPS, FAULTS, Fault, Rig, proof, strike
from tests.support.tiny_run import write_run

NUM_FAULTS = int(os.environ.get("MASKWRIGHT_FAULTS", "4"))
SEED = int(os.environ.get("MASKWRIGHT_CHAOS_SEED", random.SystemRandom().randrange(10**6)))
STEPS = 100 + 150 * NUM_FAULTS
SAME = ("loss", "mlm_loss", "nsp_loss", "mlm_accuracy", "nsp_accuracy", "grad_norm", "lr", "batch_digest")
CLUSTER = {"num_workers": 2, "min_workers": 1, "max_failures": 10 * NUM_FAULTS + 10}

pytestmark = [pytest.mark.full, pytest.mark.timeout(600 + 240 * NUM_FAULTS)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run of many quick steps and frequent checkpoints."""
    checkpoint = {"every_steps": EVERY_STEPS, "keep_last": 3}
    write_run(tmp_path, schedule={"steps": STEPS, "warmup_steps": 5}, checkpoint=checkpoint, validation={"every_steps": 50, "micro_batches": 2})
    return tmp_path


@pytest.fixture
def nodes(folder: Path) -> Iterator[RayCluster]:
    """A head without CPUs and two nodes of one CPU each."""
    with cluster_of(folder / "nodes", 2) as cluster:
        cluster.write_config(folder / "cluster.yaml", **CLUSTER)
        yield cluster


def metrics(run: Path) -> dict[int, dict[str, Any]]:
    """The surviving record of each step."""
    return {record["step"]: record for record in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())}


def validation(run: Path) -> float:
    """The last validation's masked-LM loss."""
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    return [event["mlm_loss"] for event in events if event["kind"] == "validation"][-1]


def draw(chance: random.Random) -> list[Fault]:
    """Every kind once as far as they go, in any order, then by weight."""
    kinds = chance.sample(FAULTS, k=min(NUM_FAULTS, len(FAULTS)))
    return kinds + chance.choices(FAULTS, weights=[fault.weight for fault in FAULTS], k=NUM_FAULTS - len(kinds))


def test_a_run_through_many_faults_is_the_run_that_nobody_touched(folder: Path, nodes: RayCluster) -> None:
    arguments = ("run", "run.yaml", "--cluster", "cluster.yaml", "--set", "name=undisturbed")
    code, output = maskwright(*arguments, folder=folder, timeout_s=600, **nodes.environment)
    assert code == 0, output
    chance = random.Random(SEED)
    schedule = draw(chance)
    print(f"MASKWRIGHT_CHAOS_SEED={SEED}")
    rig = Rig(folder, "disturbed", nodes, chance, nodes.environment).start()
    try:
        for number, fault in enumerate(schedule, 1):
            print(f"{number}: {fault.name} after step {rig.step()} … {strike(rig, fault):.1f} s", flush=True)
        assert rig.command.wait(timeout_s=600) == 0, rig.command.text()
    finally:
        rig.command.kill_everything()

    undisturbed = folder / "storage/undisturbed"
    ours, theirs = metrics(rig.run), metrics(undisturbed)
    assert sorted(ours) == sorted(theirs) == list(range(STEPS))
    assert [ours[step]["batch_digest"] for step in range(STEPS)] == [theirs[step]["batch_digest"] for step in range(STEPS)]
    assert all(event["repeated"] == event["skipped"] == 0 for event in rig.events("resumed"))
    shown = proof(rig.run, folder)
    assert shown["holds"]
    assert (shown["repeated"], shown["skipped"], shown["checked"]) == (0, 0, STEPS)
    assert validation(rig.run) == pytest.approx(validation(undisturbed), rel=0.01)
    if not any(fault.changes_world for fault in schedule):
        assert [[ours[step][key] for key in SAME] for step in range(STEPS)] == [[theirs[step][key] for key in SAME] for step in range(STEPS)]
        weights = "models/final/model.safetensors"
        assert (rig.run / weights).read_bytes() == (undisturbed / weights).read_bytes()
