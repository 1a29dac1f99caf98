"""Trackers are told what rank 0 records, and whatever becomes of them is no concern of the run."""

import json
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, get_args

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from data_pipeline.errors import ConfigError
from data_pipeline.storage import Location
from tests.support import trackio_package
from tests.support.batches import small_config
from trainer import trackers
from trainer.runlog import RunFolder
from trainer.trackers import Feed, Trackers, open_tracker, settings_of
from trainer.tracking_config import Tracker, TrackingConfig, require_installed

VALUES = {"loss": 2.5, "nsp_loss": None, "time": 17e8, "batch_digest": "ab", "memory_bytes": 7, "lr": 0.1}


@pytest.fixture(autouse=True)
def as_found(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What accelerate keeps and reads in a process is there for the length of a test, as on ranks."""
    from accelerate import PartialState

    monkeypatch.setenv("OMP_NUM_THREADS", str(torch.get_num_threads()))
    yield
    PartialState._reset_state()


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder(Location.at(tmp_path / "storage/a run"))


@pytest.fixture
def told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package `trackio` is installed; the file in which it writes down what it is told."""
    record = tmp_path / "trackio.jsonl"
    monkeypatch.setenv("TRACKIO_STAND_IN", str(record))
    (tmp_path / "packages").mkdir()
    shutil.copyfile(trackio_package.__file__, tmp_path / "packages/trackio.py")
    monkeypatch.syspath_prepend(str(tmp_path / "packages"))
    monkeypatch.delitem(sys.modules, "trackio", raising=False)
    return record


def feed(run: RunFolder, *names: str, steps: int = 3, first_step: int = 0) -> None:
    all_of_them = Trackers(run, small_config(tracking={"trackers": names}), attempt=1, first_step=first_step)
    for step in range(first_step, first_step + steps):
        all_of_them.log("train", VALUES, step)
    all_of_them.close()


def failures(run: RunFolder) -> list[tuple[str, str]]:
    return [(event["tracker"], event["cause"]) for event in run.read_events() if event["kind"] == "tracker_failed"]


def test_tensorboard_is_the_default_and_a_resume_takes_back_what_it_repeats(run: RunFolder) -> None:
    assert TrackingConfig().trackers == ("tensorboard",)
    feed(run, "tensorboard", steps=5)
    feed(run, "tensorboard", steps=2, first_step=3)
    found = EventAccumulator(str(run.tensorboard)).Reload()
    assert set(found.Tags()["scalars"]) == {"train/loss", "train/lr"}
    assert [event.step for event in found.Scalars("train/loss")] == [0, 1, 2, 3, 4]
    assert failures(run) == []


def test_a_tracker_of_accelerate_is_told_settings_and_numbers(run: RunFolder, told: Path) -> None:
    feed(run, "trackio")
    (_, init), (_, settings), *logged, last = [json.loads(line) for line in told.read_text().splitlines()]
    assert init["project"] == "maskwright"
    assert init["name"].startswith("a run-")
    assert settings["optimizer.lr"] == small_config().optimizer.lr
    assert logged == [["log", [step, {"train/loss": 2.5, "train/lr": 0.1}]] for step in range(3)]
    assert (last[0], failures(run)) == ("finish", [])


def test_trackers_are_told_no_addresses() -> None:
    config = small_config(storage="s3://user:hunter2@bucket/runs", model={"init_from": "s3://user:hunter2@bucket/bert"})
    told = settings_of(config)
    assert told["model.num_layers"] == config.model.num_layers
    assert "://" not in str(told), "an address without a password is one, too"
    assert [name for name in told if "init_from" in name] == []


def test_wandb_sends_nothing_of_its_own_accord(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither rank 0's log nor the machine, its load, the command, the code or where that comes from."""
    begun: list[dict[str, Any]] = []
    stand_in = ModuleType("wandb")
    vars(stand_in).update(init=lambda **arguments: begun.append(arguments), config=SimpleNamespace(update=lambda *_, **__: None))
    monkeypatch.setitem(sys.modules, "wandb", stand_in)
    open_tracker("wandb", run, small_config())
    (arguments,) = begun
    assert arguments["settings"] == {
        "console": "off",
        "disable_git": True,
        "disable_code": True,
        "save_code": False,
        "host": "",
        "x_disable_meta": True,
        "x_disable_stats": True,
        "x_save_requirements": False,
    }
    assert (arguments["name"], arguments["resume"], arguments["dir"]) == ("a run", "allow", str(run.root.path))


def test_a_tracker_that_fails_leaves_an_event_without_secrets(run: RunFolder, told: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_FAILS_AT", "1")
    feed(run, "trackio", "tensorboard", steps=50)
    assert failures(run) == [("trackio", "ConnectionError: http://(redacted)@trackio.example refused")]
    assert len(EventAccumulator(str(run.tensorboard)).Reload().Scalars("train/loss")) == 50, "the other one goes on"


def test_a_key_that_a_tracker_failed_with_is_not_told(run: RunFolder, told: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_API_KEY", "trackio.example")
    monkeypatch.setenv("TRACKIO_FAILS_AT", "1")
    feed(run, "trackio")
    ((_, cause),) = failures(run)
    assert "trackio.example" not in cause


def test_a_tracker_that_hangs_holds_up_nobody() -> None:
    release, causes = threading.Event(), list[str]()

    def hang() -> Any:
        release.wait(30)
        raise ConnectionError("at last")

    hung = Feed.start("wandb", hang, lambda _, cause: causes.append(cause))
    for step in range(trackers.MOST_WAITING + 10):
        hung.put({"train/loss": 1.0}, step)
    hung.end()
    hung.wait(0.0)
    assert causes == [f"does not keep up: {trackers.MOST_WAITING} records wait, others are left out"], "and what follows is not told"
    release.set()


def test_storage_that_hangs_while_a_failure_is_recorded_holds_up_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers, "_RECORD_S", 0.0)
    monkeypatch.setattr(trackers, "MOST_WAITING", 1)
    release, recorded, callers = threading.Event(), threading.Event(), list[int]()

    def hang() -> Any:
        release.wait(30)
        raise ConnectionError

    def record(*_: str) -> None:
        callers.append(threading.get_ident())
        recorded.set()
        release.wait(1)

    full = Feed.start("wandb", hang, record)
    for step in range(3):
        full.put({"train/loss": 1.0}, step)
    full.end()
    full.wait(0.0)
    assert recorded.wait(10)
    release.set()
    assert len(callers) == 1
    assert threading.get_ident() not in callers


def test_an_attempt_that_failed_waits_less(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next one is to begin."""
    monkeypatch.setattr(trackers, "FAILED_S", 0.0)
    release = threading.Event()

    def hang(*_: object) -> Any:
        release.wait(30)
        raise ConnectionError

    monkeypatch.setattr(trackers, "open_tracker", hang)
    hung = Trackers(run, small_config(tracking={"trackers": ["wandb"]}), attempt=1, first_step=0)
    hung.log("train", VALUES, 0)
    started_at = time.monotonic()
    hung.close(failed=True)
    assert time.monotonic() - started_at < trackers.FINISH_S / 2
    assert failures(run) == [("wandb", "did not finish in time: its last records are lost")]
    release.set()


def test_one_that_does_not_finish_is_named() -> None:
    release, causes = threading.Event(), list[str]()

    def hang() -> Any:
        release.wait(30)
        raise ConnectionError

    hung = Feed.start("wandb", hang, lambda name, cause: causes.append(f"{name} {cause}"))
    hung.end()
    hung.wait(0.0)
    assert causes == ["wandb did not finish in time: its last records are lost"]
    release.set()


def test_a_tracker_that_is_not_installed_is_refused_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("wandb", "mlflow"):
        monkeypatch.setitem(sys.modules, name, None)
    require_installed(TrackingConfig())
    with pytest.raises(ConfigError, match=r"tracking.trackers: wandb, mlflow not installed on the machine of rank 0") as caught:
        require_installed(TrackingConfig(trackers=("tensorboard", "wandb", "mlflow")))
    assert 'pip install "maskwright[trackers]" mlflow' in caught.value.remedy


def test_trackers_are_those_of_accelerate() -> None:
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    assert set(get_args(Tracker)) <= set(LOGGER_TYPE_TO_CLASS)
    assert set(get_args(Tracker)) - {"tensorboard"} == set(trackers._ARGUMENTS)


def test_a_tracker_is_named_once() -> None:
    with pytest.raises(ValueError, match="trackers must be unique"):
        TrackingConfig(trackers=("tensorboard", "tensorboard"))
