"""Folders that Ray works in: those of living commands stay, whichever container they run in; those of killed ones go."""

import multiprocessing
import os
import signal
from pathlib import Path

import pytest

from launcher.clusters import local
from launcher.clusters.local import open_session_folder, remove_abandoned_folders


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(local, "_LONGEST_SOCKET_FOLDER", 1000)


def test_a_folder_in_use_stays_and_an_abandoned_one_goes(tmp_path: Path) -> None:
    folder, lock = open_session_folder()
    assert folder.parent == tmp_path
    (folder / "ray1").mkdir()
    remove_abandoned_folders()
    assert folder.exists()
    os.close(lock)
    remove_abandoned_folders()
    assert not folder.exists()


def _own_a_folder(folder: str, ready: "multiprocessing.synchronize.Event") -> None:
    import tempfile

    tempfile.tempdir = folder
    _, lock = open_session_folder()
    ready.set()
    signal.pause()
    os.close(lock)


def test_a_folder_lives_as_long_as_its_process_whatever_its_number(tmp_path: Path) -> None:
    """In another container a process has another number, or one that is somebody else's here: the lock is what counts."""
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    owner = context.Process(target=_own_a_folder, args=(str(tmp_path), ready))
    owner.start()
    try:
        assert ready.wait(30)
        remove_abandoned_folders()
        assert len(list(tmp_path.iterdir())) == 1
    finally:
        owner.kill()
        owner.join()
    remove_abandoned_folders()
    assert list(tmp_path.iterdir()) == []


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (tmp_path / "maskwright-ray-link").symlink_to(precious)
    remove_abandoned_folders()
    assert precious.exists()
