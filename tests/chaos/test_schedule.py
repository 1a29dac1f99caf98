"""Seeded schedules of faults against a real cluster: the run ends by itself, says what happened, and is the run that nobody touched.

`make chaos FAULTS=50` draws fifty: two thirds into a run whose world size stays, which must end with the same bits, and the rest into one that
loses nodes and gets others. MASKWRIGHT_CHAOS_SEED repeats a schedule.
"""

import json
import os
import random
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import pytest

from tests.chaos.fault_kinds import FAULTS, armed_fault
from tests.support.commands import maskwright
from tests.support.faults import environment_of
from tests.support.ray_nodes import RayCluster
from tests.support.rig import EVERY_STEPS, HEADER, RECOVERED_AFTER, Fault, MissedError, Rig, Struck, proof, strike
from tests.support.tiny_run import write_run

NUM_FAULTS = int(os.environ.get("MASKWRIGHT_FAULTS", "4"))
NUM_ELASTIC = max(1, NUM_FAULTS // 3)
SEED = int(os.environ.get("MASKWRIGHT_CHAOS_SEED", random.SystemRandom().randrange(10**6)))
MOST_MISSES = 3 + NUM_FAULTS // 5
SAME = ("loss", "mlm_loss", "nsp_loss", "mlm_accuracy", "nsp_accuracy", "grad_norm", "lr", "batch_digest")
CLUSTER = {"num_workers": 2, "max_failures": 10 * NUM_FAULTS + 10, "max_preemptions": 10 * NUM_FAULTS + 10}
WEIGHTS = "models/final/model.safetensors"

KINDS = [fault for fault in FAULTS if not fault.takes_minutes or len(FAULTS) <= NUM_FAULTS]
STEADY = [fault for fault in KINDS if not fault.changes_world]
CHANGING = [fault for fault in KINDS if fault.changes_world]

pytestmark = [pytest.mark.full, pytest.mark.timeout(600 + 240 * NUM_FAULTS)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run of quick steps and frequent checkpoints, whose length is settled when all faults have been seen."""
    write_run(
        tmp_path,
        schedule={"kind": "constant", "steps": 1_000_000, "warmup_steps": 5},
        checkpoint={"every_steps": EVERY_STEPS, "keep_last": 3},
        precision="bf16",
        batch={"global_batch_size": 8, "micro_batch_size": 4, "sequence_length": 64},
        validation={"every_steps": 50, "micro_batches": 2},
        numerics={"budget": 10 + NUM_FAULTS},
    )
    return tmp_path


@pytest.fixture
def nodes(folder: Path) -> Iterator[RayCluster]:
    """A head without CPUs and two nodes of one CPU each."""
    with RayCluster(folder / "nodes", environment_of(armed_fault(folder))) as cluster:
        cluster.add_node()
        cluster.add_node()
        cluster.write_config(folder / "steady.yaml", **CLUSTER)
        cluster.write_config(folder / "elastic.yaml", min_workers=1, **CLUSTER)
        yield cluster


def metrics(run: Path) -> dict[int, dict[str, Any]]:
    """The surviving record of each step."""
    return {record["step"]: record for record in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())}


def validation(run: Path) -> float:
    """The last validation's masked-LM loss."""
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    return [event["mlm_loss"] for event in events if event["kind"] == "validation"][-1]


def draw(chance: random.Random, kinds: Sequence[Fault], first: Sequence[Fault]) -> Iterator[Fault]:
    """Faults without end: `first` in any order, then others of `kinds` by weight."""
    forever = iter(lambda: chance.choices(kinds, weights=[fault.weight for fault in kinds])[0], None)
    return chain(chance.sample(first, k=len(first)), forever)


def strike_all(rig: Rig, faults: Iterator[Fault], count: int) -> tuple[int, list[Struck]]:
    """So many faults, those that miss not counted; then the run is stopped. Returns its steps and what became of each fault."""
    struck: list[Struck] = []
    missed = 0
    while len(struck) < count:
        fault = next(faults)
        try:
            struck.append(strike(rig, fault))
        except MissedError as error:
            missed += 1
            print(f"{fault.name}: missed, {error}", flush=True)
            assert missed <= MOST_MISSES
            rig.wait_until_trained(RECOVERED_AFTER)
        else:
            print(f"{rig.name} {len(struck)}: {struck[-1]}", flush=True)
    return rig.stop(), struck


def finish(rig: Rig, steps: int) -> None:
    """The run goes on to its end, by itself."""
    rig.resume(f"schedule.steps={steps}")
    assert rig.command.wait(timeout_s=600) == 0, rig.command.text()


def assert_same_run(rig: Rig, undisturbed: Path, steps: int) -> None:
    """The same batches to the same end."""
    ours, theirs = metrics(rig.run), metrics(undisturbed)
    assert sorted(ours) == sorted(theirs) == list(range(steps))
    assert [ours[step]["batch_digest"] for step in range(steps)] == [theirs[step]["batch_digest"] for step in range(steps)]
    assert all(event["repeated"] == event["skipped"] == 0 for event in rig.events("resumed"))
    shown = proof(rig.run, rig.folder)
    assert shown["holds"]
    assert (shown["repeated"], shown["skipped"], shown["checked"]) == (0, 0, steps)
    assert validation(rig.run) == pytest.approx(validation(undisturbed), rel=0.01)


def assert_same_bits(rig: Rig, undisturbed: Path, steps: int) -> None:
    """Of the first so many steps."""
    ours, theirs = metrics(rig.run), metrics(undisturbed)
    for step in range(steps):
        assert [ours[step][key] for key in SAME] == [theirs[step][key] for key in SAME], f"step {step}"


def steps_before_resize(rig: Rig) -> int:
    """Steps of the surviving history up to the first that was made by another number of ranks, or after it."""
    resized = next(event["attempt"] for event in rig.events("attempt_started") if event["world_size"] != CLUSTER["num_workers"])
    return next(step for step, record in sorted(metrics(rig.run).items()) if record["attempt"] >= resized)


def test_runs_through_many_faults_are_the_run_that_nobody_touched(folder: Path, nodes: RayCluster) -> None:
    chance = random.Random(SEED)
    stage = f"zero.stage={chance.choice((1, 2, 3))}"
    print(f"MASKWRIGHT_CHAOS_SEED={SEED}, {stage}")
    num_steady = NUM_FAULTS - NUM_ELASTIC
    steady, elastic = (Rig(folder, name, nodes, chance, nodes.environment) for name in ("steady", "elastic"))
    try:
        steady.start(stage, cluster="steady.yaml")
        first = chance.sample(STEADY, k=min(num_steady, len(STEADY)))
        num_steady_steps, table = strike_all(steady, draw(chance, STEADY, first), num_steady)
        elastic.start(stage, cluster="elastic.yaml")
        first = chance.sample(CHANGING, k=min(NUM_ELASTIC, len(CHANGING)))
        num_elastic_steps, more = strike_all(elastic, draw(chance, KINDS, first), NUM_ELASTIC)
        steps = max(num_steady_steps, num_elastic_steps) + RECOVERED_AFTER
        finish(steady, steps)
        finish(elastic, steps)
    finally:
        for rig in (steady, elastic):
            if hasattr(rig, "command"):
                rig.command.kill_everything()
    print("\n".join(["", HEADER, *map(str, [*table, *more])]), flush=True)

    chosen = [argument for setting in ("name=undisturbed", stage, f"schedule.steps={steps}") for argument in ("--set", setting)]
    code, output = maskwright("run", "run.yaml", "--cluster", "steady.yaml", *chosen, folder=folder, timeout_s=900, **nodes.environment)
    assert code == 0, output
    undisturbed = folder / "storage/undisturbed"
    for rig in (steady, elastic):
        assert_same_run(rig, undisturbed, steps)
    assert_same_bits(steady, undisturbed, steps)
    assert (steady.run / WEIGHTS).read_bytes() == (undisturbed / WEIGHTS).read_bytes()
    assert_same_bits(elastic, undisturbed, steps_before_resize(elastic))
