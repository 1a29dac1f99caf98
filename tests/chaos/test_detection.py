"""A rank that is stopped is named, and the run goes on by itself to the same bits; a rank that is only slow is left alone."""

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from launcher.health import DEADLINES_S
from launcher.lease import STALE_AFTER_S, process_start
from launcher.rank_watch import ORPHANED_AFTER_S
from tests.support.commands import Command, maskwright, worker_pid
from tests.support.faults import NumericFault, environment_of
from tests.support.ray_nodes import cluster_of
from tests.support.tiny_run import write_run

STEPS = 160
SLOW_S = 14
"""Longer than a rank may be stopped."""
HANGS_AT = 43
PER_STEP = 8
"""Micro-batches of a step."""
HANG_SLACK_S = 30
"""What the longest backward pass so far adds to the deadline, and the looks of the watch and the stacks."""
SAME = ("step", "loss", "grad_norm", "lr", "batch_digest")

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the runs of this module live; they share one corpus."""
    path = tmp_path_factory.mktemp("detection")
    write_run(path, schedule={"steps": STEPS, "warmup_steps": 5}, checkpoint={"every_steps": 10, "keep_last": 2})
    return path


@pytest.fixture(scope="module")
def undisturbed(folder: Path) -> Path:
    """The folder of a run that nobody touches."""
    code, output = maskwright("run", "run.yaml", "--cluster", "cluster.yaml", "--set", "name=undisturbed", folder=folder)
    assert code == 0, output
    return folder / "storage/undisturbed"


def surviving(run: Path) -> list[list[Any]]:
    """What is known of each step, from the last attempt that took it."""
    lines = (run / "metrics.jsonl").read_bytes().rpartition(b"\n")[0].splitlines() if (run / "metrics.jsonl").exists() else []
    by_step = {record["step"]: [record[key] for key in SAME] for record in map(json.loads, lines)}
    return [by_step[step] for step in sorted(by_step)]


def events(run: Path, *kinds: str) -> list[dict[str, Any]]:
    return [event for event in map(json.loads, (run / "events.jsonl").read_text().splitlines()) if event["kind"] in kinds]


def process_of(run: Path, rank: int) -> int:
    pid = worker_pid(run, attempt=1, rank=rank)
    assert pid is not None
    return pid


def slow_down(pid: int, seconds: float) -> None:
    """Four fifths of the time, the process stands still."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        os.kill(pid, signal.SIGSTOP)
        time.sleep(1.0)
        os.kill(pid, signal.SIGCONT)
        time.sleep(0.25)


@pytest.mark.full
def test_a_slow_rank_is_left_alone_and_a_stopped_one_is_named(folder: Path, undisturbed: Path) -> None:
    run = folder / "storage/stopped"
    command = Command(["run", "run.yaml", "--cluster", "cluster.yaml", "--set", "name=stopped"], folder).start()
    try:
        command.wait_until(lambda: len(surviving(run)) >= 2)
        slow_down(process_of(run, 0), SLOW_S)
        assert not events(run, "rank_unhealthy", "worker_failed"), "a slow rank is no failure"
        assert len(surviving(run)) < STEPS - 5, "too quick to be stopped: more steps are needed"
        victim, stopped_at = process_of(run, 1), time.time()
        os.kill(victim, signal.SIGSTOP)
        assert command.wait() == 0, command.text()
    finally:
        command.kill_everything()
    (verdict,) = events(run, "rank_unhealthy")
    assert (verdict["rank"], verdict["pid"], verdict["state"]) == (1, victim, "stopped")
    assert verdict["time"] - stopped_at < 30
    assert verdict["phase"] in {"data", "agree", "forward", "backward", "reduce", "optimizer", "checkpoint", "validation"}
    assert f"(process {victim}) has been stopped" in command.text()
    stacks = Path(verdict["stacks"])
    assert "trainer/pretrain.py" in (stacks / "rank-00000.txt").read_text(), "the rank that waits says where"
    assert "T (stopped)" in (stacks / "rank-00001.txt").read_text()
    (failed,) = events(run, "worker_failed")
    assert (failed["rank"], failed["failure"], failed["attempt"]) == (1, "infrastructure", 1)
    assert failed["time"] - verdict["time"] < 10, "the launcher ends the group itself"
    (resumed,) = events(run, "resumed")
    assert (resumed["repeated"], resumed["skipped"], resumed["attempt"]) == (0, 0, 2)
    assert surviving(run) == surviving(undisturbed)
    weights = "models/final/model.safetensors"
    assert (run / weights).read_bytes() == (undisturbed / weights).read_bytes()


def rank_in_set_up(command: Command) -> int | None:
    """A worker process at its part of what Ray does before any code of ours runs on a rank: Linux shows the name of the task."""
    for pid in command.processes():
        try:
            title = Path(f"/proc/{pid}/cmdline").read_bytes()
        except OSError:
            continue
        if title.startswith(b"ray::") and b"execute" in title:
            return pid
    return None


@pytest.mark.full
def test_a_rank_that_is_stopped_before_it_has_said_anything_is_named(folder: Path) -> None:
    """Its process group is not made, so that Ray's controller and all other ranks wait for it, without a limit."""
    run = folder / "storage/silent"
    settings = ["--set", "name=silent", "--set", "schedule.steps=10"]
    command = Command(["run", "run.yaml", "--cluster", "cluster.yaml", *settings], folder).start()
    try:
        victims: list[int] = []
        command.wait_until(lambda: victims.extend(filter(None, [rank_in_set_up(command)])) or victims)
        stopped_at = time.time()
        os.kill(victims[0], signal.SIGSTOP)
        assert worker_pid(run, attempt=1, rank=0) is None
        assert command.wait() == 0, command.text()
    finally:
        command.kill_everything()
    (verdict,) = events(run, "rank_unhealthy")
    assert (verdict["pid"], verdict["state"], verdict["phase"]) == (victims[0], "stopped", "set-up")
    assert verdict["time"] - stopped_at < 30
    (failed,) = events(run, "worker_failed")
    assert (failed["failure"], failed["attempt"]) == ("infrastructure", 1)
    assert failed["time"] - verdict["time"] < 20, "the launcher ends the group itself"
    assert [record[0] for record in surviving(run)] == list(range(10))


@pytest.mark.full
def test_a_rank_that_hangs_is_named_with_its_stacks(folder: Path, undisturbed: Path) -> None:
    """Its process lives and says so, and the others wait for it inside a collective."""
    run, once = folder / "storage/hung", folder / "hung"
    hang = NumericFault("hang", micro_batch=HANGS_AT * PER_STEP + 6, once=str(once))
    command = Command(["run", "run.yaml", "--cluster", "cluster.yaml", "--set", "name=hung"], folder, environment_of(hang)).start()
    try:
        assert command.wait() == 0, command.text()
        hung_at = once.stat().st_mtime
    finally:
        command.kill_everything()
    (verdict,) = events(run, "rank_unhealthy")
    assert (verdict["rank"], verdict["pid"], verdict["state"]) == (1, process_of(run, 1), "hung")
    assert (verdict["step"], verdict["phase"]) == (HANGS_AT, "backward")
    seconds = verdict["time"] - hung_at
    print(f"a hung rank was named after {seconds:.1f} s")
    assert DEADLINES_S["backward"] <= seconds <= DEADLINES_S["backward"] + HANG_SLACK_S
    assert "made no progress" in command.text()
    stacks = Path(verdict["stacks"])
    assert "in _hang" in (stacks / "rank-00001.txt").read_text()
    assert "trainer/pretrain.py" in (stacks / "rank-00000.txt").read_text(), "the rank that waits says where"
    (failed,) = events(run, "worker_failed")
    assert (failed["rank"], failed["failure"]) == (1, "infrastructure")
    assert failed["time"] - verdict["time"] < 10
    (resumed,) = events(run, "resumed")
    assert (resumed["repeated"], resumed["skipped"], resumed["step"]) == (0, 0, HANGS_AT // 10 * 10)
    assert surviving(run) == surviving(undisturbed)
    weights = "models/final/model.safetensors"
    assert (run / weights).read_bytes() == (undisturbed / weights).read_bytes()


@pytest.mark.full
def test_ranks_of_a_driver_that_is_stopped_end_when_another_takes_over(folder: Path) -> None:
    """The stopped driver cannot end them: they see for themselves that they are superseded; the driver, awake again, ends with 8."""
    run = folder / "storage/superseded"
    settings = ["--set", "name=superseded", "--set", "schedule.steps=100000", "--set", "checkpoint.every_steps=100000"]
    command = Command(["run", "run.yaml", "--cluster", "cluster.yaml", *settings], folder).start()
    second = Command(["resume", "superseded", "--storage", "storage"], folder)
    try:
        command.wait_until(lambda: len(surviving(run)) >= 2)
        ranks = [process_of(run, rank) for rank in (0, 1)]
        os.kill(command.process.pid, signal.SIGSTOP)
        time.sleep(STALE_AFTER_S + 1)
        second.start()
        second.wait_until((run / "logs/attempt-0002/claim").exists)
        deadline = time.monotonic() + 20
        while any(process_start(pid) for pid in ranks):
            assert time.monotonic() < deadline, "two attempts at once"
            time.sleep(0.1)
        os.kill(command.process.pid, signal.SIGCONT)
        assert command.wait() == 8, command.text()
        second.wait_until(lambda: worker_pid(run, attempt=2, rank=0) is not None)
    finally:
        command.kill_everything()
        second.kill_everything()


@pytest.mark.full
def test_a_driver_that_is_stopped_for_a_while_costs_no_attempt(folder: Path) -> None:
    """Its ranks ask the cluster, which knows it to be alive, and go on."""
    run = folder / "storage/paused"
    settings = ["--set", "name=paused", "--set", "schedule.steps=100000", "--set", "checkpoint.every_steps=100000"]
    command = Command(["run", "run.yaml", "--cluster", "cluster.yaml", *settings], folder).start()
    try:
        command.wait_until(lambda: len(surviving(run)) >= 2)
        os.kill(command.process.pid, signal.SIGSTOP)
        time.sleep(ORPHANED_AFTER_S + 15)
        os.kill(command.process.pid, signal.SIGCONT)
        reached = len(surviving(run))
        command.wait_until(lambda: len(surviving(run)) > reached)
        code, output = maskwright("stop", "paused", "--storage", "storage", folder=folder)
        assert code == 0, output
        assert command.wait() == 75, command.text()
    finally:
        command.kill_everything()
    assert not events(run, "rank_unhealthy", "worker_failed")
    assert [event["attempt"] for event in events(run, "attempt_started")] == [1]


@pytest.mark.full
@pytest.mark.parametrize(("settings", "code", "world_sizes"), [({"min_workers": 1}, 0, [2, 1]), ({"wait_s": 3}, 75, [2])])
def test_a_drained_node_costs_no_step(settings: dict[str, Any], code: int, world_sizes: list[int], tmp_path: Path) -> None:
    """All ranks save; what follows is an attempt on what is left, where that is allowed, or the end of the command: resumable."""
    write_run(tmp_path, schedule={"steps": 60, "warmup_steps": 5}, checkpoint={"every_steps": 1000, "keep_last": 2}, name="drained")
    run = tmp_path / "storage/drained"
    with cluster_of(tmp_path / "nodes", 2) as cluster:
        cluster.write_config(tmp_path / "cluster.yaml", num_workers=2, **settings)
        command = Command(["run", "run.yaml", "--cluster", "cluster.yaml"], tmp_path, cluster.environment).start()
        try:
            command.wait_until(lambda: len(surviving(run)) >= 5)
            cluster.ask(DRAIN)
            assert command.wait() == code, command.text()
        finally:
            command.kill_everything()
    (preempted,) = events(run, "preempted")
    (failed,) = events(run, "worker_failed")
    assert (failed["failure"], failed["attempt"], failed["node"]) == ("preemption", 1, preempted["nodes"][0])
    assert [event["world_size"] for event in events(run, "attempt_started")] == world_sizes
    assert [event["steps_lost"] for event in events(run, "resumed")] == [0] * (len(world_sizes) - 1)
    if code == 75:
        assert events(run, "stopped", "failed")[-1]["exit_code"] == 75


DRAIN = """
import time
from ray._raylet import GcsClient
node = next(node["NodeID"] for node in ray.nodes() if node["Resources"].get("CPU"))
GcsClient(address=ray.get_runtime_context().gcs_address).drain_node(node, 2, "the cloud wants it back", int((time.time() + 600) * 1000))
"""
