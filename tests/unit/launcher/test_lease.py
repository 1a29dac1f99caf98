"""The lease: one driver at a time, and a dead one does not block the run."""

import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from data_pipeline.errors import ConflictError, StorageUnreachableError
from data_pipeline.storage import Location
from launcher import lease as lease_module
from launcher.lease import STALE_AFTER_S, Lease, LeaseState, holder, process_start, read_lease, this_machine
from trainer.runlog import RunFolder


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder(Location.at(tmp_path / "run"))


def test_held_lease_refuses_a_second_and_is_free_after(run: RunFolder) -> None:
    with Lease.acquire(run) as lease:
        lease.beat(stage="pretrain", attempt=3)
        with pytest.raises(ConflictError, match="already running") as caught:
            Lease.acquire(run)
        assert "pretrain" in caught.value.cause
        held = holder(run)
        assert held is not None
        assert (held.stage, held.attempt, held.pid) == ("pretrain", 3, os.getpid())
    assert holder(run) is None
    with Lease.acquire(run) as again:
        assert again.state.number == lease.state.number + 1


def test_of_many_commands_at_once_one_wins(run: RunFolder) -> None:
    def attempt(_: int) -> Lease | None:
        try:
            return Lease.acquire(run)
        except ConflictError:
            return None

    with ThreadPoolExecutor(8) as pool:
        leases = [lease for lease in pool.map(attempt, range(8)) if lease]
    for lease in leases:
        lease.beat()
    assert [lease for lease in leases if not lease.lost.is_set()] == [max(leases, key=lambda lease: lease.state.number)]


def test_a_run_that_is_taken_between_two_looks_is_not_taken_again(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[Lease] = []

    def nobody_yet(run: RunFolder, say: object) -> None:
        if not taken:
            taken.append(Lease(run, LeaseState(0, "", 0, "", "", 0.0, 0.0)))
            taken[0] = Lease.acquire(run)

    monkeypatch.setattr(lease_module, "proven_holder", nobody_yet)
    with pytest.raises(ConflictError, match="just now"):
        Lease.acquire(run)
    taken[0].beat()
    assert not taken[0].lost.is_set()


def dead_process() -> LeaseState:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    started = process_start(process.pid)
    assert started
    process.kill()
    process.wait()
    now = time.time()
    return LeaseState(1, "token", process.pid, started, os.uname().nodename, now, now, machine=this_machine())


def test_dead_holder_is_taken_over_at_once(run: RunFolder) -> None:
    run.lease.write_json(asdict(dead_process()))
    assert holder(run) is None
    with Lease.acquire(run):
        pass


def test_zombie_is_dead(run: RunFolder) -> None:
    process = subprocess.Popen([sys.executable, "-c", "pass"])
    while Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
        time.sleep(0.01)
    assert process_start(process.pid) == ""
    process.wait()


def elsewhere(skew_s: float = 0.0) -> LeaseState:
    """A holder on another machine of the same name, whose clock is ahead by `skew_s`."""
    return replace(dead_process(), machine="another", time=time.time() + skew_s)


def test_who_only_looks_judges_another_machine_by_its_clock() -> None:
    far = elsewhere()
    assert far.is_live(far.time + STALE_AFTER_S - 1)
    assert not far.is_live(far.time + STALE_AFTER_S + 1)


@pytest.mark.parametrize("skew_s", [-3600.0, 0.0, 3600.0])
def test_a_dead_holder_elsewhere_is_taken_over_whatever_its_clock_said(run: RunFolder, skew_s: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease_module, "STALE_AFTER_S", 1.0)
    run.lease.write_json(asdict(elsewhere(skew_s)))
    said, started_at = list[str](), time.monotonic()
    with Lease.acquire(run, said.append):
        assert 1.0 <= time.monotonic() - started_at < 10
    assert "looking whether it still is" in said[0]


@pytest.mark.parametrize("skew_s", [-3600.0, 0.0, 3600.0])
def test_a_living_holder_elsewhere_is_left_alone_whatever_its_clock_says(run: RunFolder, skew_s: float) -> None:
    far, done = elsewhere(skew_s), threading.Event()
    run.lease.write_json(asdict(far))

    def beat() -> None:
        while not done.wait(0.3):
            run.lease.write_json(asdict(replace(far, time=time.time() + skew_s)))

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(ConflictError, match="already running"):
            Lease.acquire(run)
    finally:
        done.set()
        thread.join()


def test_a_released_lease_is_never_written_again(run: RunFolder) -> None:
    """The heartbeat's thread, or that of a stage, may be a moment behind."""
    with Lease.acquire(run) as lease:
        lease.require_held()
    lease.beat(stage="late")
    assert read_lease(run) is None
    with pytest.raises(ConflictError):
        lease.require_held()


def test_who_ends_after_another_has_taken_over_leaves_the_new_lease_alone(run: RunFolder) -> None:
    """It was stopped for longer than its lease lived, and ends before its next beat."""
    with Lease.acquire(run) as old:
        run.lease.write_json(asdict(replace(old.state, time=time.time() - 2 * STALE_AFTER_S)))
        new = Lease.acquire(run)
        old.__exit__()
        current = read_lease(run)
        assert current is not None
        assert current.token == new.state.token


def test_a_heartbeat_that_fails_goes_on(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    failures = [RuntimeError("nobody foresaw it"), RuntimeError("nobody foresaw it")]
    exists = Location.exists

    def fails(location: Location, patience_s: float | None = None) -> bool:
        if failures and threading.current_thread().name == "lease":
            raise failures.pop()
        return exists(location, patience_s)

    monkeypatch.setattr(lease_module, "HEARTBEAT_S", 0.05)
    monkeypatch.setattr(Location, "exists", fails)
    with Lease.acquire(run) as lease:
        started_at, deadline = lease.state.started_at, time.monotonic() + 10
        while failures or (read_lease(run) or lease.state).time <= started_at:
            assert time.monotonic() < deadline
            time.sleep(0.02)
    assert not lease.lost.is_set()


def test_how_a_run_ended_is_not_hidden_by_storage_that_is_gone(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(location: Location, patience_s: float | None = None) -> bool:
        raise StorageUnreachableError("gone", "wait")

    lease = Lease.acquire(run).__enter__()
    monkeypatch.setattr(Location, "exists", fails)
    lease.__exit__()
    monkeypatch.undo()
    assert read_lease(run) == lease.state  # it goes stale


def test_superseded_holder_notices_and_leaves_the_new_lease_alone(run: RunFolder) -> None:
    old = Lease.acquire(run)
    run.lease.write_json(asdict(replace(old.state, time=time.time() - 2 * STALE_AFTER_S)))
    with Lease.acquire(run) as new:
        with pytest.raises(ConflictError, match="taken over"):
            old.require_held()
        assert old.lost.is_set()
        old.__exit__()
        current = read_lease(run)
        assert current is not None
        assert current.token == new.state.token
