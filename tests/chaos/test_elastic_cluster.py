"""Nodes of a real cluster are lost, drained and added: the run has the ranks that there is room for, and stays the same run."""

import json
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.commands import maskwright
from tests.support.ray_nodes import RayCluster, cluster_of
from tests.support.rig import Rig
from tests.support.tiny_run import write_run

STEPS = 100_000
"""More than are made: a run is stopped when enough was seen, however fast the machine is."""

pytestmark = pytest.mark.timeout(900)


def write_long_run(folder: Path) -> None:
    """A run of quick steps and frequent checkpoints."""
    frequent = {"every_steps": 20, "keep_last": 3}
    write_run(folder, schedule={"steps": STEPS, "warmup_steps": 5}, checkpoint=frequent, validation={"every_steps": STEPS, "micro_batches": 1})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Of the run."""
    write_long_run(tmp_path)
    return tmp_path


@pytest.fixture
def nodes(folder: Path) -> Iterator[RayCluster]:
    """A head without CPUs and two nodes of one CPU each, which want a token."""
    with cluster_of(folder / "nodes", 2) as cluster:
        cluster.write_config(folder / "cluster.yaml", num_workers=2, min_workers=1)
        yield cluster


@pytest.fixture
def rig(folder: Path, nodes: RayCluster) -> Iterator[Rig]:
    """A run on the cluster."""
    rig = Rig(folder, "elastic", nodes, random.Random(0), nodes.environment).start()
    try:
        yield rig
    finally:
        rig.command.kill_everything()


def metrics(run: Path) -> list[dict[str, Any]]:
    """Every record of a step, superseded ones included, as far as they are whole."""
    path = run / "metrics.jsonl"
    lines = path.read_bytes().rpartition(b"\n")[0].splitlines() if path.exists() else []
    return [json.loads(line) for line in lines]


def surviving(run: Path) -> dict[int, dict[str, Any]]:
    """The last record of each step."""
    return {record["step"]: record for record in metrics(run)}


def wait_for_attempt(rig: Rig, number: int, world_size: int, steps: int) -> None:
    """Until the attempt has made some steps with so many ranks."""

    def there() -> bool:
        return any(event["attempt"] == number for event in rig.events("attempt_started"))

    rig.wait_for(f"attempt {number}", there)
    (started,) = [event for event in rig.events("attempt_started") if event["attempt"] == number]
    assert started["world_size"] == world_size
    rig.wait_for(f"steps of attempt {number}", lambda: len([r for r in metrics(rig.run) if r["attempt"] == number]) >= steps)


def assert_same_batches(rig: Rig, steps: int) -> None:
    """Every step of the surviving history has seen the batch that the pure function gives, and none is missing."""
    code, output = maskwright("inspect", "run.yaml", "--step", "0", "--steps", str(steps), "--json", folder=rig.folder)
    assert code == 0, output
    expected = [json.loads(line)["digest"] for line in output.splitlines()]
    seen = surviving(rig.run)
    assert [seen[step]["batch_digest"] for step in range(steps)] == expected


def seconds_to_first_step(rig: Rig, attempt: int, since: float) -> float:
    """From an instant to the first step that an attempt has recorded."""
    return next(record["time"] for record in metrics(rig.run) if record["attempt"] == attempt) - since


def started_at(rig: Rig, attempt: int) -> float:
    return next(event["time"] for event in rig.events("attempt_started") if event["attempt"] == attempt)


def lose_and_return(rig: Rig, nodes: RayCluster) -> int:
    """A node is lost and another comes; returns the steps that the run has made when it is stopped."""
    wait_for_attempt(rig, 1, world_size=2, steps=25)
    killed_at = time.time()
    nodes.kill_node(nodes.nodes[0])
    wait_for_attempt(rig, 2, world_size=1, steps=25)
    nodes.add_node()
    wait_for_attempt(rig, 3, world_size=2, steps=25)
    lost_s, warm_s = seconds_to_first_step(rig, 2, killed_at), seconds_to_first_step(rig, 3, started_at(rig, 3))
    print(f"node lost: {lost_s:.1f} s to the next optimizer step; warm start-up {warm_s:.1f} s")
    assert lost_s <= warm_s + 20
    return rig.stop()


LOOK = """
import time
RAYS_OWN = "AutoscalingCoordinator"  # one for the whole cluster, shared by all of its jobs
from ray._private.state import actors, available_resources_per_node
deadline = time.monotonic() + 30
while living := [actor for actor in actors().values() if actor["State"] != "DEAD" and actor["Name"] != RAYS_OWN]:
    assert time.monotonic() < deadline, living
    time.sleep(0.2)
while (free := sum(node.get("CPU", 0) for node in available_resources_per_node().values())) != 2:
    assert time.monotonic() < deadline, free
    time.sleep(0.2)
print(len([node for node in ray.nodes() if node["Alive"]]))
"""


def assert_left_as_it_was(nodes: RayCluster) -> None:
    """The cluster lives, and nothing of ours is left on it."""
    assert nodes.ask(LOOK).strip() == "3"


def assert_said(rig: Rig) -> None:
    assert [(event["before"], event["after"]) for event in rig.events("resized")] == [(2, 1), (1, 2)]
    lost, grown = rig.events("resumed")
    assert lost["repeated"] == lost["skipped"] == grown["repeated"] == grown["skipped"] == 0
    assert grown["steps_lost"] == 0
    assert [event["failure"] for event in rig.events("worker_failed")] == ["infrastructure"]


@pytest.mark.full
def test_a_lost_node_shrinks_the_run_and_another_grows_it(rig: Rig, nodes: RayCluster) -> None:
    steps = lose_and_return(rig, nodes)
    assert_said(rig)
    assert_same_batches(rig, steps)
    assert_left_as_it_was(nodes)


@pytest.mark.full
def test_a_node_that_comes_with_other_packages_is_left_out(rig: Rig, nodes: RayCluster, folder: Path) -> None:
    """What fails there is no reason to give up a run that has got on without it."""
    broken = folder / "broken/trainer"
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text("raise RuntimeError('an old release of the trainer')")
    wait_for_attempt(rig, 1, world_size=2, steps=25)
    nodes.kill_node(nodes.nodes[0])
    wait_for_attempt(rig, 2, world_size=1, steps=25)
    nodes.environment["PYTHONPATH"] = str(broken.parent)
    nodes.add_node()
    wait_for_attempt(rig, 4, world_size=1, steps=25)
    steps = rig.stop()
    assert [event["world_size"] for event in rig.events("attempt_started")] == [2, 1, 2, 1]
    failed = rig.events("worker_failed")[-1]
    assert (failed["attempt"], failed["failure"]) == (3, "infrastructure")
    assert "left out" in failed["cause"]
    assert_same_batches(rig, steps)


@pytest.mark.full
def test_the_losses_are_those_of_a_run_whose_nodes_all_stayed(rig: Rig, nodes: RayCluster, folder: Path) -> None:
    steps = lose_and_return(rig, nodes)
    undisturbed = Rig(folder, "undisturbed", nodes, random.Random(0), nodes.environment).start()
    try:
        undisturbed.wait_until_trained(steps)
        undisturbed.stop()
    finally:
        undisturbed.command.kill_everything()
    ours, theirs = surviving(rig.run), surviving(undisturbed.run)
    assert [ours[step]["batch_digest"] for step in range(steps)] == [theirs[step]["batch_digest"] for step in range(steps)]
    assert [ours[step]["loss"] for step in range(steps)] == pytest.approx([theirs[step]["loss"] for step in range(steps)], rel=1e-3)


@pytest.mark.full
def test_a_drained_node_is_left_in_time_and_nothing_is_lost(rig: Rig, nodes: RayCluster) -> None:
    wait_for_attempt(rig, 1, world_size=2, steps=25)
    nodes.drain(nodes.nodes[0], deadline_s=120)
    wait_for_attempt(rig, 2, world_size=1, steps=25)
    steps = rig.stop()
    (preempted,) = rig.events("preempted")
    (resumed,) = rig.events("resumed")
    saved = next(event for event in rig.events("checkpoint_committed") if event["step"] == resumed["step"])
    assert saved["time"] < preempted["deadline"]
    assert (resumed["steps_lost"], resumed["repeated"], resumed["skipped"]) == (0, 0, 0)
    assert_same_batches(rig, steps)


@pytest.mark.full
def test_what_a_killed_command_has_put_on_the_cluster_goes_with_it(rig: Rig, nodes: RayCluster) -> None:
    wait_for_attempt(rig, 1, world_size=2, steps=5)
    rig.command.kill_driver()
    assert_left_as_it_was(nodes)
