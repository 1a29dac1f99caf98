"""A group on a real Ray cluster of several nodes: what ranks answer and obey, what is seen of processes elsewhere, drains, how a group is ended."""

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
import ray
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from data_pipeline.storage import Location
from launcher.attempts import stacks_folder
from launcher.group_watch import Member
from launcher.health import UNHEARD, Seen
from launcher.heartbeats import Polls, Rank, RayGroup, is_driver_there
from launcher.lease import process_start
from launcher.rank_log import log_to
from launcher.rank_watch import SAVE, STACKS, RankWatch, Reply, Whereabouts, watch_of_process
from tests.support.ray_nodes import RayCluster
from trainer.runlog import RunFolder

pytestmark = pytest.mark.timeout(180)


class Speaking(Rank):
    """A rank that trains nothing, and is polled without the rest of Ray Train."""

    def begin(self, run: Location, rank: int) -> Member:
        self._place = Whereabouts()
        self._running = RankWatch(RunFolder(run), 1, rank, 2, self._place, lambda: None, is_driver_there).running()
        self._running.__enter__()
        return Member(os.getpid(), "", ray.get_runtime_context().get_node_id(), "host", None)

    def move(self, step: int) -> None:
        self._place.move(step, "forward")

    def reply(self) -> Reply | None:
        watch = watch_of_process()
        return watch.reply() if watch else None

    def is_driver_there(self) -> bool | None:
        return is_driver_there()

    def say(self, log: Location, text: str) -> None:
        self._log = log_to(log, only_if_failed=True)
        self._log.__enter__()
        print(text)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Generator[RayCluster]:
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
        context = ray.get_runtime_context()
        return Member(os.getpid(), process_start(os.getpid()), context.get_node_id(), "host", None)


def silent_rank() -> tuple[Any, Member]:
    """Where Ray Train puts ranks: in a placement group of this driver."""
    place = ray.util.placement_group([{"CPU": 1}])
    actor = ray.remote(num_cpus=1)(Silent).options(scheduling_strategy=PlacementGroupSchedulingStrategy(place)).remote()
    return actor, ray.get(actor.where.remote(), timeout=60)


def is_gone(member: Member) -> bool:
    return process_start(member.pid) != member.started


@pytest.mark.parametrize("expected", [False, True])
def test_a_rank_that_is_stopped_before_its_first_word_is_seen_and_ended(cluster: RayCluster, *, expected: bool) -> None:
    """Also one of which the group does not know, by the place that is reserved for it."""
    group = RayGroup.here()
    actor, member = silent_rank()
    os.kill(member.pid, signal.SIGSTOP)
    if expected:
        group.expect({0: replace(member, started="", actor=actor)})
        assert group.look() == {0: (0, UNHEARD)}
        until(lambda: group.see([0]).get(0, (None, ""))[0] is Seen.STOPPED)
    group.end()
    until(lambda: is_gone(member), 30)
    if expected:
        until(lambda: group.see([0])[0][0] is Seen.GONE)


class Starting:
    """A process that Ray Train has begun to make a rank of; its constructor takes its time."""

    def __init__(self, folder: str) -> None:
        (Path(folder) / str(os.getpid())).touch()
        time.sleep(0 if os.listdir(folder) == [str(os.getpid())] else 600)


@pytest.mark.full
def test_a_process_that_is_stopped_before_it_has_a_rank_is_seen_and_ended(cluster: RayCluster, tmp_path: Path) -> None:
    """Of two, one is there and waits for the other, which is what is told."""
    Starting.__name__ = Starting.__qualname__ = Rank.__name__  # by which Ray's table is searched
    group, place = RayGroup.here(), ray.util.placement_group([{"CPU": 1}, {"CPU": 1}])
    here = PlacementGroupSchedulingStrategy(place)
    first, second = [ray.remote(num_cpus=1)(Starting).options(scheduling_strategy=here) for _ in (0, 1)]
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


def members_now(group: RayGroup) -> list[Member]:
    sightings = group.look() or {}
    assert all(sighting == (0, UNHEARD) for sighting in sightings.values())
    return list(group.members.values())


@pytest.mark.full
def test_a_group_of_two_nodes(cluster: RayCluster, tmp_path: Path) -> None:
    run = Location.at(tmp_path / "run")
    group, ranks = RayGroup.here(), [ray.remote(num_cpus=1)(Speaking).remote() for _ in (0, 1)]
    group.tell(STACKS)  # before there is anybody to be told
    members = ray.get([actor.begin.remote(run, rank) for rank, actor in enumerate(ranks)], timeout=60)
    group.expect({rank: replace(member, actor=actor) for rank, (member, actor) in enumerate(zip(members, ranks, strict=True))})
    assert group.look() == {0: (0, UNHEARD), 1: (0, UNHEARD)}
    assert not any(member.started for member in group.members.values())

    def poll() -> None:
        group.hear(dict(enumerate(ray.get([actor.reply.remote() for actor in ranks], timeout=60))))

    ray.get([actor.move.remote(2) for actor in ranks], timeout=60)
    poll()
    assert {rank: (count, beat.step) for rank, (count, beat) in (group.look() or {}).items()} == {0: (1, 2), 1: (1, 2)}
    assert all(process_start(member.pid) == member.started for member in group.members.values())
    group.tell(SAVE)
    until(lambda: poll() or (group.obeyed(STACKS), group.obeyed(SAVE)) == (2, 2))
    assert (group.look() or {})[0][0] > 1
    assert len(list((stacks_folder(RunFolder(run), 1)).children())) == 2
    assert ray.get(ranks[1].is_driver_there.remote(), timeout=60)
    assert len({member.node for member in group.members.values()} | {group.node}) == 3

    Polls(group).before_worker_group_shutdown(None)
    assert group.look() is None, "Ray Train ends the group and polls nobody"
    group.expect(group.members)
    assert group.look() == {0: (0, UNHEARD), 1: (0, UNHEARD)}

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
