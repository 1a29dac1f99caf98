"""The shape of a worker group, the environment of a rank, and what a rank leaves behind when it ends."""

import multiprocessing
import os
import signal
import socket
import tempfile
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec.config
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.errors import ConfigError, EnvironmentMismatchError, InterruptedRunError, StorageError
from data_pipeline.storage import Location
from launcher import rank_log
from launcher.attempts import attempt_folder, claim_attempt, read_failure
from launcher.cluster_config import ClusterConfig, LocalCluster
from launcher.clusters import local
from launcher.clusters.local import Machine, Workers, resolve_workers, start_ray
from launcher.policy import FailureKind
from launcher.rank_log import keep_logs_of_killed
from launcher.rank_watch import SAVE, watch_of_process
from launcher.worker_process import WorkerTask, resolve, run_task
from trainer.context import RunContext
from trainer.runlog import RunFolder


@pytest.mark.parametrize(
    ("machine", "config", "workers"),
    [
        (Machine(1, 0), {}, Workers(1, 1, False)),
        (Machine(2, 0), {}, Workers(2, 1, False)),
        (Machine(16, 0), {}, Workers(2, 8, False)),
        (Machine(16, 4), {}, Workers(4, 4, True)),
        (Machine(16, 4), {"use_gpu": False}, Workers(2, 8, False)),
        (Machine(16, 4), {"num_workers": 2}, Workers(2, 8, True)),
        (Machine(2, 0), {"num_workers": 5}, Workers(5, 1, False)),
        (Machine(8, 0), {"num_workers": 2, "threads_per_worker": 1}, Workers(2, 1, False)),
    ],
)
def test_workers(machine: Machine, config: dict[str, Any], workers: Workers) -> None:
    assert resolve_workers(ClusterConfig(**config), machine) == workers


@given(st.integers(1, 256), st.integers(0, 8))
def test_automatic_workers_never_take_more_than_there_is(num_cpus: int, num_gpus: int) -> None:
    workers = resolve_workers(ClusterConfig(), Machine(num_cpus, num_gpus))
    assert workers.num_workers >= 1
    assert workers.num_workers * workers.threads_per_worker <= max(num_cpus, workers.num_workers)
    assert workers.num_workers == num_gpus if workers.use_gpu else workers.num_workers <= 2


@pytest.mark.parametrize("config", [{"use_gpu": True}, {"num_workers": 0}, {"threads_per_worker": 0}, {"use_gpu": True, "num_workers": 3}])
def test_impossible_workers_are_refused(config: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        resolve_workers(ClusterConfig(**config), Machine(4, 0))


def test_no_more_ranks_than_a_step_has_micro_batches() -> None:
    assert resolve_workers(ClusterConfig(), Machine(16, 8), num_micro_batches=3) == Workers(3, 5, True)
    with pytest.raises(ConfigError, match="exceeds the 3 micro-batches"):
        resolve_workers(ClusterConfig(num_workers=4), Machine(16, 8), num_micro_batches=3)


def test_ray_leaves_our_handler_of_sigterm_alone(tmp_path: Path) -> None:
    """`ray.init` takes SIGTERM over, and would end a run that wants to save first."""

    def ours(*_: object) -> None: ...

    def theirs(*_: object) -> None: ...

    ray = SimpleNamespace(init=lambda **_: signal.signal(signal.SIGTERM, theirs))
    before = signal.signal(signal.SIGTERM, ours)
    try:
        start_ray(ray, LocalCluster(), Workers(1, 1, False), Machine(1, 0), tmp_path / "ray")
        assert signal.getsignal(signal.SIGTERM) is ours
    finally:
        signal.signal(signal.SIGTERM, before)


def test_ray_that_is_late_is_started_once_more_and_then_told(monkeypatch: pytest.MonkeyPatch) -> None:
    late = "The current node timed out during startup."
    errors, folders = iter([Exception(late), None, Exception(late), Exception(late)]), list[Path]()

    def start(*arguments: Any) -> None:
        folders.append(arguments[-1])
        if error := next(errors):
            raise error

    monkeypatch.setattr(local, "start_ray", start)
    shape = LocalCluster(), Workers(1, 1, False), Machine(1, 0)
    with local.local_cluster(*shape):
        assert folders[-1].parent.exists()
    with pytest.raises(EnvironmentMismatchError, match=f"Ray did not start: {late}"), local.local_cluster(*shape):
        pytest.fail("it has not started")
    assert [folder.name for folder in folders] == ["ray1", "ray0"] * 2
    assert not any(folder.parent.exists() for folder in folders)


def test_interface_of_an_address() -> None:
    from launcher.interfaces import interface_of

    assert interface_of("127.0.0.1") == interface_of("127.0.0.2") == "lo"
    assert interface_of("192.0.2.254") is None or socket.gethostname()


def test_a_site_s_own_interface_is_kept_but_not_for_the_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    from launcher.interfaces import choose_interface

    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "ib0")
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "set for once, so that it is put back")
    del os.environ["NCCL_SOCKET_IFNAME"]
    choose_interface("eth1")
    assert (os.environ["GLOO_SOCKET_IFNAME"], os.environ["NCCL_SOCKET_IFNAME"]) == ("ib0", "=eth1")
    choose_interface("lo")
    assert (os.environ["GLOO_SOCKET_IFNAME"], os.environ["NCCL_SOCKET_IFNAME"]) == ("lo", "=lo")


# Entries, named by string as the launcher names the trainer's.


def entry_ok(context: RunContext, word: str) -> None:
    import torch

    os.write(2, b"from C\n")
    print(word, context.rank, context.world_size, torch.get_num_threads(), Path.cwd())


def entry_stops(context: RunContext) -> None:
    deadline = time.monotonic() + 20
    while not context.stop_requested():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    raise InterruptedRunError("saved", "resume")


def entry_full(context: RunContext) -> None:
    raise StorageError("disk full", "free some")


def entry_killed(context: RunContext) -> None:
    os.write(2, b"last words\n")
    os.kill(os.getpid(), signal.SIGKILL)


def entry_superseded(context: RunContext, folder: str) -> None:
    claim_attempt(RunFolder(Location(folder)))
    time.sleep(30)


def run_told(task: WorkerTask, rank: int, world_size: int, *commands: str) -> None:
    """Run a task as a worker process does, whose driver gives it `commands`."""

    def tell() -> None:
        while (watch := watch_of_process()) is None:
            time.sleep(0.01)
        for command in commands:
            watch.obey(command)

    threading.Thread(target=tell, daemon=True).start()
    run_task(task, rank, world_size, lambda: True)


def in_process(run: RunFolder, entry: str, *commands: str, rank: int = 0, world_size: int = 2, **arguments: Any) -> int:
    """Run a task as rank `rank` of `world_size` in a process of its own, because it takes over stdout; the process' exit code."""
    attempt = claim_attempt(run)
    task = WorkerTask(f"{__name__}:{entry}", arguments, run.root.url, attempt, threads=1, home=run.root.parent.url)
    process = multiprocessing.get_context("fork").Process(target=run_told, args=(task, rank, world_size, *commands))
    process.start()
    process.join(60)
    if process.is_alive():
        process.kill()
    assert process.exitcode is not None
    return process.exitcode


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder(Location.at(tmp_path / "run"))


def test_entry_is_resolved_by_name() -> None:
    assert resolve("launcher.policy:decide").__name__ == "decide"


def test_output_of_a_rank_is_its_log(run: RunFolder) -> None:
    assert in_process(run, "entry_ok", rank=1, word="hello") == 0
    log = run.rank_log(1, 1).read_bytes().decode()
    assert f"hello 1 2 1 {run.root.parent}" in log
    assert "from C" in log
    assert "rank 1 of 2" in log
    assert read_failure(run, 1) is None


def test_the_log_of_a_run_in_a_store_leaves_nothing_on_the_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path / "scratch"))
    monkeypatch.setenv("FSSPEC_FILE", '{"auto_mkdir": true}')  # folders as stores have them, in the process that is started
    monkeypatch.setitem(fsspec.config.conf, "file", {"auto_mkdir": True})
    (tmp_path / "scratch").mkdir()
    run = RunFolder(Location(f"file://{tmp_path}/store/run"))  # as a URL it is a store
    attempt = claim_attempt(run)
    task = WorkerTask(f"{__name__}:entry_ok", {"word": "hello"}, run.root.url, attempt, threads=1, home=str(tmp_path))
    process = multiprocessing.get_context("spawn").Process(target=run_told, args=(task, 0, 2))
    process.start()
    process.join(60)
    assert process.exitcode == 0
    assert "hello 0 2 1" in run.rank_log(1, 0).read_bytes().decode()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["scratch", "store"]
    assert list((tmp_path / "scratch").glob("maskwright-*")) == []


def test_in_a_large_group_rank_0_and_ranks_that_fail_leave_a_log(run: RunFolder) -> None:
    assert in_process(run, "entry_ok", rank=1, world_size=16, word="hello") == 0
    assert in_process(run, "entry_ok", rank=0, world_size=17, word="hello") == 0
    assert in_process(run, "entry_ok", rank=1, world_size=17, word="hello") == 0
    assert in_process(run, "entry_stops", SAVE, rank=1, world_size=17) == 0
    assert in_process(run, "entry_full", rank=16, world_size=17) == 1
    logs = [[name for name in attempt_folder(run, attempt).children() if name.startswith("rank-")] for attempt in range(1, 6)]
    assert logs == [["rank-00001.log"], ["rank-00000.log"], [], [], ["rank-00016.log"]]
    log = run.rank_log(5, 16).read_bytes().decode()
    assert "rank 16 of 17" in log
    assert "disk full" in log


def test_the_log_of_a_rank_that_is_killed_can_be_kept_until_another_rank_begins(
    run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "node").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "node"))
    assert in_process(run, "entry_killed", rank=16, world_size=17) == -signal.SIGKILL
    assert not run.rank_log(1, 16).exists()
    keep_logs_of_killed([run.rank_log(1, rank) for rank in (7, 16)])
    assert b"rank 16 of 17" in run.rank_log(1, 16).read_bytes()
    assert b"last words" in run.rank_log(1, 16).read_bytes()
    assert not run.rank_log(1, 7).exists()
    assert not os.listdir(tmp_path / "node")

    assert in_process(run, "entry_killed", rank=16, world_size=17) == -signal.SIGKILL
    assert len(os.listdir(tmp_path / "node")) == 1
    assert in_process(run, "entry_ok", rank=16, world_size=17, word="hello") == 0
    assert not os.listdir(tmp_path / "node")


def test_a_log_is_copied_out_while_it_grows_whatever_goes_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log, write, sizes, failures = Location.at(tmp_path / "log"), Location.write_bytes, list[int](), [RuntimeError("odd"), OSError("odd")]

    def writes(location: Location, data: bytes, patience_s: float | None = None) -> None:
        if failures:
            raise failures.pop()
        sizes.append(len(data))
        write(location, data, patience_s)

    monkeypatch.setattr(Location, "write_bytes", writes)
    monkeypatch.setattr(rank_log, "_UPLOAD_S", 0.02)
    with tempfile.TemporaryFile() as file:
        done = threading.Event()
        copier = threading.Thread(target=rank_log._copy_out, args=(file.fileno(), log, done))
        copier.start()
        os.write(file.fileno(), b"first\n")
        time.sleep(0.4)
        assert sizes == [6]
        monkeypatch.setattr(rank_log, "_UPLOAD_S", 60.0)
        os.write(file.fileno(), b"last\n")
        done.set()
        copier.join(10)
    assert log.read_bytes() == b"first\nlast\n"


def test_interrupted_rank_returns_and_failed_rank_raises(run: RunFolder) -> None:
    assert in_process(run, "entry_stops", SAVE) == 0
    found = read_failure(run, 1)
    assert found is not None
    assert found.kind is FailureKind.INTERRUPTED
    assert in_process(run, "entry_full") == 1
    found = read_failure(run, 2)
    assert found is not None
    assert (found.kind, found.cause) == (FailureKind.KNOWN, "disk full")
    assert "StorageError" in run.rank_log(2, 0).read_bytes().decode()


def test_superseded_attempt_ends_itself(run: RunFolder) -> None:
    started_at = time.monotonic()
    assert in_process(run, "entry_superseded", folder=run.root.url) == 75
    assert time.monotonic() - started_at < 20
