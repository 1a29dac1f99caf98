"""The board on a real Ray cluster of several nodes: beats and commands, what is seen of processes elsewhere, drains, and how a group is ended."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Generator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from data_pipeline.storage import Location
from launcher.group_watch import BoardLostError, Member
from launcher.health import UNHEARD, Beat, Seen
from launcher.heartbeats import BoardLine, RayGroup
from launcher.lease import process_start
from launcher.rank_log import log_to
from launcher.rank_watch import SAVE, STACKS
from tests.support.ray_nodes import RayCluster

pytestmark = pytest.mark.timeout(180)


class Rank:
    """A rank that says where it is when it is told to."""

    def __init__(self, board: Any, rank: int) -> None:
        self._line = BoardLine(board, rank)
        self._line.join()

    def beat(self, step: int, obeyed: tuple[str, ...] = ()) -> tuple[str, ...] | None:
        return self._line.beat(Beat(step, "forward", step, 0, False, 0.0), obeyed)

    def say(self, log: Location, text: str) -> None:
        self._log = log_to(log, only_if_failed=True)
        self._log.__enter__()
        print(text)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Generator[RayCluster]:
    import ray

    with RayCluster(tmp_path_factory.mktemp("nodes"), token=False) as nodes:
        for _ in range(2):
            nodes.add_node()
        ray.init(f"{nodes.address}:{nodes.port}", logging_level="ERROR", log_to_driver=False)
        try:
            yield nodes
        finally:
            ray.shutdown()


def until(condition: Callable[[], Any], timeout_s: float = 60.0) -> Any:
    deadline = time.monotonic() + timeout_s
    while not (found := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    return found


class Silent:
    """A rank that has not come to its first word."""

    def where(self) -> Member:
        import ray

        context = ray.get_runtime_context()
        return Member(os.getpid(), process_start(os.getpid()), context.get_node_id(), "host", None)


def silent_rank() -> tuple[Any, Member]:
    """Where Ray Train puts ranks: in a placement group of this driver."""
    import ray

    place = ray.util.placement_group([{"CPU": 1}])
    actor = ray.remote(num_cpus=1)(Silent).options(scheduling_strategy=PlacementGroupSchedulingStrategy(place)).remote()
    return actor, ray.get(actor.where.remote(), timeout=60)


def is_gone(member: Member) -> bool:
    return process_start(member.pid) != member.started


@pytest.mark.parametrize("expected", [False, True])
def test_a_rank_that_is_stopped_before_its_first_word_is_seen_and_ended(cluster: RayCluster, *, expected: bool) -> None:
    """Also one of which the group does not know, by the place that is reserved for it."""
    import ray

    group = RayGroup.open()
    actor, member = silent_rank()
    os.kill(member.pid, signal.SIGSTOP)
    if expected:
        ray.get(group.board.expect.remote({0: replace(member, started="", actor=actor)}), timeout=60)
        assert group.look() == {0: (0, UNHEARD)}
        until(lambda: group.see([0]).get(0, (None, ""))[0] is Seen.STOPPED)
    group.end()
    until(lambda: is_gone(member), 30)
    if expected:
        until(lambda: group.see([0])[0][0] is Seen.GONE)
    group.close()


class RayTrainWorker:
    """A process that Ray Train has begun to make a rank of; its constructor takes its time."""

    def __init__(self, folder: str) -> None:
        (Path(folder) / str(os.getpid())).touch()
        time.sleep(0 if os.listdir(folder) == [str(os.getpid())] else 600)


@pytest.mark.full
def test_a_process_that_is_stopped_before_it_has_a_rank_is_seen_and_ended(cluster: RayCluster, tmp_path: Path) -> None:
    """Of two, one is there and waits for the other, which is what is told."""
    import ray

    group, place = RayGroup.open(), ray.util.placement_group([{"CPU": 1}, {"CPU": 1}])
    here = PlacementGroupSchedulingStrategy(place)
    first, second = [ray.remote(num_cpus=1)(RayTrainWorker).options(scheduling_strategy=here) for _ in (0, 1)]
    actors = [first.remote(str(tmp_path))]
    (ready,) = until(lambda: os.listdir(tmp_path))
    until(lambda: [member.pid for member in members_now(group)] == [int(ready)])
    actors.append(second.remote(str(tmp_path)))
    until(lambda: len(os.listdir(tmp_path)) == 2)
    (late,) = [int(name) for name in os.listdir(tmp_path) if name != ready]
    until(lambda: [member.pid for member in members_now(group)] == [late])
    (number,) = group.members
    os.kill(late, signal.SIGSTOP)
    until(lambda: group.see([number]).get(number, (None, ""))[0] is Seen.STOPPED)
    started = process_start(late)
    group.end()
    until(lambda: process_start(late) != started, 30)
    group.close()


def members_now(group: RayGroup) -> list[Member]:
    sightings = group.look()
    assert sightings is not None
    assert all(sighting == (0, UNHEARD) for sighting in sightings.values())
    return list(group.members.values())


@pytest.mark.full
def test_a_group_of_two_nodes(cluster: RayCluster, tmp_path: Path) -> None:
    import ray

    group = RayGroup.open()
    ranks = [ray.remote(num_cpus=1)(Rank).remote(group.board, rank) for rank in (0, 1)]
    assert ray.get([rank.beat.remote(1) for rank in ranks], timeout=60) == [(), ()]
    group.tell(STACKS)
    group.tell(SAVE)
    assert ray.get([rank.beat.remote(2, (STACKS,)) for rank in ranks], timeout=60) == [(STACKS, SAVE)] * 2
    assert (group.obeyed(STACKS), group.obeyed(SAVE)) == (2, 0)
    sightings = group.look()
    assert sightings is not None
    assert {rank: (count, beat.step) for rank, (count, beat) in sightings.items()} == {0: (2, 2), 1: (2, 2)}
    assert len({member.node for member in group.members.values()} | {group.node}) == 3

    logs = [Location.at(tmp_path / f"logs/rank-{rank}") for rank in (0, 1)]
    ray.get([rank.say.remote(log, f"last words of {log.name}") for rank, log in zip(ranks, logs, strict=True)], timeout=60)

    stopped = group.members[1]
    os.kill(stopped.pid, signal.SIGSTOP)
    until(lambda: [group.see([0, 1]).get(rank, (None, ""))[0] for rank in (0, 1)] == [Seen.ALIVE, Seen.STOPPED])
    assert "T (stopped)" in group.see([0, 1])[1][1]

    assert not group.draining()
    drain(cluster, stopped.node)
    assert list(until(group.draining)) == [stopped.node]

    started_at = time.monotonic()
    group.end()
    until(lambda: not any(process_start(member.pid) == member.started for member in group.members.values()), 20)
    assert time.monotonic() - started_at < 15, "a stopped process on another node is Ray's to kill"
    until(lambda: group.see([0]).get(0, (None, ""))[0] is Seen.GONE)
    group.keep_logs({0: logs[0]})  # the drained node shuts down as soon as nothing works on it
    assert [log.exists() for log in logs] == [True, False]
    assert b"last words of rank-0" in logs[0].read_bytes()
    group.close()
    until(lambda: is_lost(group))


def is_lost(group: RayGroup) -> bool:
    try:
        group.look()
    except BoardLostError:
        return True
    return False


def drain(cluster: RayCluster, node: str) -> None:
    """As a cloud does that takes a machine back."""
    reason = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "test", "--deadline-remaining-seconds", "600"]
    command = [
        sys.executable,
        "-m",
        "ray.scripts.scripts",
        "drain-node",
        "--address",
        f"{cluster.address}:{cluster.port}",
        "--node-id",
        node,
        *reason,
    ]
    subprocess.run(command, check=True, timeout=60, capture_output=True)
