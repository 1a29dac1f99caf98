"""Temporary folders: those of living processes stay, whichever container they run in; those of killed ones go."""

import multiprocessing
import os
import signal
from pathlib import Path

import pytest

from data_pipeline import scratch
from data_pipeline.scratch import Scratch, remove_abandoned

PREFIX = "maskwright-test-"


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))


def test_a_folder_is_there_until_it_is_removed(tmp_path: Path) -> None:
    first, second = Scratch.make(PREFIX), Scratch.make(PREFIX)
    (first.path / "deeper").mkdir()
    assert sorted(tmp_path.iterdir()) == sorted([first.path, second.path])
    first.remove()
    before = len(os.listdir("/proc/self/fd"))
    first.remove()
    assert len(os.listdir("/proc/self/fd")) == before
    assert list(tmp_path.iterdir()) == [second.path]
    second.remove()


def test_a_folder_of_another_machine_is_not_joined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A network file system shows it, and may keep its lock to the machine that made it."""
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(scratch, "_machine", lambda: "0000")
        theirs = Scratch.make(PREFIX)
    assert Scratch.join(theirs.path) is None
    theirs.remove()
    assert not theirs.path.exists()


def _own_a_folder(folder: str, ready: "multiprocessing.synchronize.Event") -> None:
    Scratch.make(PREFIX, folder)
    ready.set()
    signal.pause()


def test_a_folder_lives_as_long_as_its_process_whatever_its_number(tmp_path: Path) -> None:
    """In another container a process has another number, or one that is somebody else's here: the lock is what counts."""
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    owner = context.Process(target=_own_a_folder, args=(str(tmp_path), ready))
    owner.start()
    try:
        assert ready.wait(30)
        remove_abandoned(PREFIX, str(tmp_path))
        assert len(list(tmp_path.iterdir())) == 1
    finally:
        owner.kill()
        owner.join()
    (next(tmp_path.iterdir()) / "deeper").mkdir()
    new = Scratch.make(PREFIX)
    assert list(tmp_path.iterdir()) == [new.path]
    new.remove()


def test_a_link_and_other_names_are_left_alone(tmp_path: Path) -> None:
    precious, others = tmp_path / "precious", [tmp_path / "maskwright-other-1", tmp_path / f"{PREFIX}0000-of-another-machine"]
    for folder in (precious, *others):
        folder.mkdir()
    (tmp_path / f"{PREFIX}{scratch._machine()}-link").symlink_to(precious)
    remove_abandoned(PREFIX, str(tmp_path))
    assert precious.exists()
    assert all(other.exists() for other in others)
