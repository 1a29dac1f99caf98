"""Saves in the background, rank by rank as plain threads and processes: committed once all have written, never half (no collectives here)."""

import errno
import os
import signal
import time
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from threading import Event
from typing import Any

import pytest

from data_pipeline import storage
from data_pipeline.errors import ConflictError, MaskwrightError, StorageError, StorageUnreachableError
from tests.support.checkpoints import golden_run, run_folder, save_request, snapshot_of
from trainer.background_save import Save
from trainer.checkpoint import list_checkpoints, newest_usable, verify
from trainer.checkpoint_store import FolderCheckpoints
from trainer.runlog import RunFolder

FILES = {
    0: {"zero/mp_rank_00_model_states.pt": b"weights" * 50, "zero/zero_pp_rank_0_mp_rank_00_optim_states.pt": b"zero" * 99, "state.json": b"{}"},
    1: {"zero/zero_pp_rank_1_mp_rank_00_optim_states.pt": b"one" * 99},
}


def save_of(run: RunFolder, step: int, rank: int, world_size: int = 2, **changes: Any) -> Save:
    return Save(save_request(run, step, rank, world_size, **changes), snapshot_of(FILES[rank]))


def save_both(run: RunFolder, step: int, **changes: Any) -> None:
    saves = [save_of(run, step, rank, **changes).start() for rank in (1, 0)]
    for save in saves:
        save.wait(10.0)


def kinds(run: RunFolder) -> list[str]:
    return [event["kind"] for event in run.read_events()]


def test_both_ranks_parts_are_committed(tmp_path: Path) -> None:
    run = run_folder(tmp_path)
    save_both(run, 5, validation_loss=1.25, stall_s=0.5)
    (checkpoint,) = list_checkpoints(run)
    assert checkpoint.manifest.files.keys() == {name for files in FILES.values() for name in files}
    assert {path.relative_to(checkpoint.folder).as_posix() for path in checkpoint.folder.rglob("*") if path.is_file()} == {
        *checkpoint.manifest.files,
        "MANIFEST.json",
    }
    assert checkpoint.manifest.validation_loss == 1.25
    assert verify(checkpoint.folder) == []
    (event,) = run.read_events()
    assert (event["kind"], event["step"], event["stall_s"]) == ("checkpoint_committed", 5, 0.5)
    assert event["seconds"] == pytest.approx(event["stall_s"] + event["write_s"], abs=0.002)


def test_rank_0_may_commit_before_a_receipt_is_durable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, slow = run_folder(tmp_path), list[Path]()

    def sync_slowly(folder: Path, sync: Callable[[Path], None] = storage.sync_folder) -> None:
        if folder.name == "receipts":
            slow.append(folder)
            deadline = time.monotonic() + 5.0
            while folder.exists() and time.monotonic() < deadline:
                time.sleep(0.01)
        sync(folder)

    monkeypatch.setattr(storage, "sync_folder", sync_slowly)
    save_both(run, 5)
    assert [folder.exists() for folder in slow] == [False]
    assert kinds(run) == ["checkpoint_committed"]


def test_rank_0_waits_for_the_last_rank(tmp_path: Path) -> None:
    run = run_folder(tmp_path)
    first = save_of(run, 5, 0).start()
    time.sleep(0.3)
    assert not first.is_done
    assert list_checkpoints(run) == []
    save_of(run, 5, 1).start().wait(10.0)
    first.wait(10.0)
    assert [checkpoint.step for checkpoint in list_checkpoints(run)] == [5]


def test_who_waits_hears_of_progress_and_not_of_a_standstill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.background_save._LOOK_S", 0.1)
    run, heard, let_go, write = run_folder(tmp_path), list[float](), Event(), os.write

    def hangs(descriptor: int, data: Any) -> int:
        if "rank_1" in os.readlink(f"/proc/self/fd/{descriptor}"):
            let_go.wait(20)
        return write(descriptor, data)

    monkeypatch.setattr(os, "write", hangs)
    hanging, waiting = save_of(run, 5, 1).start(), save_of(run, 5, 0).start()
    with pytest.raises(MaskwrightError, match="not committed in 1 s"):
        waiting.wait(1.0, on_progress=lambda: heard.append(1))
    assert len(heard) >= 2  # rank 0 looks for the receipt
    heard.clear()
    with pytest.raises(MaskwrightError, match="not committed in 1 s"):
        hanging.wait(1.0, on_progress=lambda: heard.append(1))
    assert heard == []
    let_go.set()
    for save in (hanging, waiting):
        save.wait(10.0)


def test_a_rank_that_never_answers_is_named_in_time(tmp_path: Path) -> None:
    run = run_folder(tmp_path)
    save = save_of(run, 5, 0, timeout_s=0.5).start()
    with pytest.raises(MaskwrightError, match="no receipt of rank 1 and 0 others after 0 s"):
        save.wait(10.0)
    assert run.checkpoints.children() == []


@pytest.mark.parametrize(
    ("raised", "expected", "tries"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), StorageError, 1),
        (OSError(errno.EROFS, "Read-only file system"), StorageError, 1),
        (OSError(errno.EIO, "Input/output error"), StorageUnreachableError, 4),
        (ValueError("odd"), MaskwrightError, 1),
    ],
)
def test_a_rank_that_cannot_write_tells_rank_0_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, raised: Exception, expected: type[MaskwrightError], tries: int
) -> None:
    run, tried, write = run_folder(tmp_path), [], os.write

    def fails(descriptor: int, data: Any) -> int:
        if "rank_1" not in os.readlink(f"/proc/self/fd/{descriptor}"):
            return write(descriptor, data)
        tried.append(1)
        raise raised

    monkeypatch.setattr("tenacity.wait.wait_random_exponential.__call__", lambda *_: 0.1)
    monkeypatch.setattr(os, "write", fails)
    saves = [save_of(run, 5, rank).start() for rank in (0, 1)]
    for save in saves:
        with pytest.raises(expected, match="rank 1 could not write its part of the checkpoint") as error:
            save.wait(10.0)
        assert type(error.value) is expected
    assert len(tried) == tries
    assert run.checkpoints.children() == []
    recorded = [(event["kind"], event["rank"], event["retried"]) for event in run.read_events()]
    assert recorded[-1] == ("checkpoint_failed", 1, False)
    assert all(event == ("checkpoint_failed", 1, True) for event in recorded[:-1])
    assert bool(recorded[:-1]) == (tries > 1)


def test_a_write_that_fails_once_is_said_and_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, failures, write = run_folder(tmp_path), [OSError(errno.EIO, "Input/output error")], os.write

    def fails_once(descriptor: int, data: Any) -> int:
        if failures:
            raise failures.pop()
        return write(descriptor, data)

    monkeypatch.setattr(os, "write", fails_once)
    save_both(run, 5)
    (checkpoint,) = list_checkpoints(run)
    assert verify(checkpoint.folder) == []
    assert kinds(run)[-1] == "checkpoint_committed"


def test_a_rename_that_cannot_be_made_durable_at_once_is_no_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, failures, fsync = run_folder(tmp_path), [OSError(errno.EIO, "Input/output error")], os.fsync

    def fails_once(descriptor: int) -> None:
        if failures and os.readlink(f"/proc/self/fd/{descriptor}") == str(run.checkpoints.path) and list_checkpoints(run):
            raise failures.pop()
        fsync(descriptor)

    monkeypatch.setattr("tenacity.wait.wait_random_exponential.__call__", lambda *_: 0.1)
    monkeypatch.setattr(os, "fsync", fails_once)
    save_both(run, 5)
    assert not failures
    (checkpoint,) = list_checkpoints(run)
    assert verify(checkpoint.folder) == []
    assert (kinds(run), run.checkpoints.children()) == (["checkpoint_failed", "checkpoint_committed"], ["step-00000005"])


def test_a_look_for_newer_attempts_that_fails_once_is_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, failures = run_folder(tmp_path), [OSError(errno.EIO, "Input/output error")]

    def fails_once() -> None:
        if failures:
            raise failures.pop()

    monkeypatch.setattr("tenacity.wait.wait_random_exponential.__call__", lambda *_: 0.1)
    save_both(run, 5, require_current=fails_once)
    assert [checkpoint.step for checkpoint in list_checkpoints(run)] == [5]
    assert kinds(run) == ["checkpoint_failed", "checkpoint_committed"]


def test_a_superseded_attempt_never_publishes(tmp_path: Path) -> None:
    run = golden_run(tmp_path, 1)

    def superseded() -> None:
        raise ConflictError("attempt 1 is superseded by attempt 2", "Follow the other.")

    saves = [save_of(run, 5, rank, require_current=superseded).start() for rank in (1, 0)]
    with pytest.raises(ConflictError, match="superseded"):
        saves[1].wait(10.0)
    assert run.checkpoints.children() == ["step-00000001"]
    assert kinds(run) == []


def test_an_attempt_that_is_superseded_while_its_commit_is_tried_again_does_not_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, asked = run_folder(tmp_path), list[int]()

    def superseded_later() -> None:
        asked.append(1)
        if len(asked) > 1:
            raise ConflictError("attempt 1 is superseded by attempt 2", "Follow the other.")

    def fails(self: FolderCheckpoints, manifest: Any) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("tenacity.wait.wait_random_exponential.__call__", lambda *_: 0.1)
    monkeypatch.setattr(FolderCheckpoints, "publish", fails)
    with pytest.raises(ConflictError, match="superseded"):
        save_both(run, 5, require_current=superseded_later)
    assert run.checkpoints.children() == []


def test_a_newer_attempt_s_checkpoint_of_the_step_is_not_replaced(tmp_path: Path) -> None:
    run = run_folder(tmp_path)
    save_both(run, 5, attempt=3)
    with pytest.raises(ConflictError, match="attempt 3 has committed step 5; attempt 2 is superseded"):
        save_both(run, 5, attempt=2)
    (checkpoint,) = list_checkpoints(run)
    assert checkpoint.manifest.attempt == 3
    assert verify(checkpoint.folder) == []


def test_a_save_that_is_cancelled_leaves_nothing(tmp_path: Path) -> None:
    run = run_folder(tmp_path)
    save = save_of(run, 5, 0).start()
    save.cancel()
    save.wait(10.0)
    assert run.checkpoints.children() == []


CALLS = ("open", "write", "fsync", "mkdir", "rename", "replace", "link", "unlink", "rmdir")
"""The calls by which a save changes the disk."""


def save_and_die(root: str, rank: int, at: int) -> None:
    """Save step 2 in this process; die in place of the call number `at` that changes the disk."""
    calls = 0

    def counted(call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*arguments: Any, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == at:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*arguments, **options)

        return wrapper

    for name in CALLS:
        setattr(os, name, counted(getattr(os, name)))
    save_of(run_folder(root), 2, rank, attempt=2, checkpoint={"keep_last": 1}).run()
    os._exit(SURVIVED)


SURVIVED = 7


@pytest.mark.parametrize(
    ("rank", "replaces"), [(1, False), *(pytest.param(*each, marks=pytest.mark.full) for each in ((0, True), (0, False), (1, True)))]
)
def test_a_kill_at_any_write_of_any_rank_leaves_a_usable_run(tmp_path: Path, rank: int, replaces: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Step 1 is there, step 2 is saved (again, where it `replaces`): afterwards one of them is intact, and the newest is what is resumed from."""
    monkeypatch.setattr("trainer.background_save._CLEAN_UP_S", 0.0)
    at, code, outcomes = 0, None, set[int]()
    while code != SURVIVED:
        at += 1
        root = tmp_path / str(at)
        run = golden_run(root, 1)
        if replaces:
            save_both(run, 2)
        dying = get_context("fork").Process(target=save_and_die, args=(str(root), rank, at))
        other = save_of(run, 2, 1 - rank, attempt=2, timeout_s=0.05, checkpoint={"keep_last": 1})
        if rank == 0:
            other.run()
        dying.start()
        dying.join(20)
        code = dying.exitcode
        if rank == 1:
            other.run()
        found = newest_usable(run, rank=0, world_size=1, attempt=3, group=None)
        assert found is not None, at
        assert verify(found.folder) == [], at
        assert [name for name in run.checkpoints.children() if "." in name] == [], at
        assert "checkpoint_damaged" not in kinds(run), at
        outcomes.add(found.step)
        save_both(run, 3, attempt=3)  # and the run goes on
        assert [checkpoint.step for checkpoint in list_checkpoints(run)][-1] == 3, at
    assert at > (25 if rank == 0 else 8)
    assert outcomes == ({2} if replaces else {1, 2})
