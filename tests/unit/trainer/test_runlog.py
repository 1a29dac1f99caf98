"""The run folder's records: streamed, the newest from the end, and how far training had got."""

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.errors import StorageUnreachableError
from data_pipeline.storage import Location
from tests.support.object_store import reachable_object_store
from trainer import runlog
from trainer.interruption import steps_done
from trainer.runlog import RecordWriter, RunFolder, event_line


def test_the_newest_record_is_the_last_whole_one_and_costs_no_reading_of_all(tmp_path: Path) -> None:
    run = RunFolder(Location.at(tmp_path / "run"))
    assert run.newest_metrics() == {}
    lines = [f'{{"step": {step}, "attempt": 1, "padding": "{"x" * 300}"}}\n' for step in range(5000)]
    run.metrics.write_bytes("".join([*lines, '{"step": 5000, "att', "\n7\n", '{"st']).encode())
    assert run.newest_metrics()["step"] == 4999
    assert [record["step"] for record in run.iter_metrics()] == list(range(5000))
    run.append_metrics({"step": 47, "attempt": 2})
    assert (run.metrics_of(47)["attempt"], run.metrics_of(470)["attempt"], run.metrics_of(5000)) == (2, 1, {})


@pytest.mark.parametrize(
    ("newest", "resumed", "done"),
    [
        ({}, [], 0),
        ({"step": 7, "attempt": 1}, [], 8),
        ({"step": 7, "attempt": 2}, [(2, 5)], 8),
        ({"step": 7, "attempt": 1}, [(2, 5)], 5),  # the second attempt took no step: what the first had lost is not lost again
    ],
)
def test_steps_done_are_those_since_the_last_resume(newest: dict[str, Any], resumed: list[tuple[int, int]], done: int) -> None:
    events = [{"kind": "resumed", "attempt": attempt, "step": step} for attempt, step in resumed]
    assert steps_done(newest, [*events, {"kind": "validation", "attempt": 9, "step": 9}]) == done


def test_an_event_that_is_written_again_counts_once(tmp_path: Path) -> None:
    """An append whose answer was lost may have been carried out; events that are alike and happen one after the other are two."""
    run = RunFolder(Location.at(tmp_path / "run"))
    line = event_line("worker_failed", attempt=1, cause="killed")
    run.events.append_line(line)
    run.append_event("worker_failed", attempt=1, cause="killed")
    run.events.append_line(line)
    assert [(event["kind"], event["cause"]) for event in run.read_events()] == [("worker_failed", "killed")] * 2


def test_steps_are_recorded_on_a_disk_at_once(tmp_path: Path) -> None:
    run = RunFolder(Location.at(tmp_path / "run"))
    writer = RecordWriter(run)
    for step in range(3):
        writer.add({"step": step, "attempt": 1})
        assert run.newest_metrics()["step"] == step


def test_a_store_gets_the_steps_of_some_seconds_in_one_request(monkeypatch: pytest.MonkeyPatch) -> None:
    with reachable_object_store() as store:
        run = RunFolder(Location(f"s3://{store.bucket}/run"))
        writer = RecordWriter(run)
        for step in range(50):
            writer.add({"step": step, "attempt": 1})
        assert len(store.requests()) - 1 < 10  # the first, and then one every few seconds
        writer.flush()
        writer.flush()
        assert [record["step"] for record in run.read_metrics()] == list(range(50))
        assert run.newest_metrics()["step"] == 49
        monkeypatch.setattr(runlog, "STORE_EVERY_S", 0.0)
        writer.add({"step": 50, "attempt": 1})
        wait_until(lambda: run.newest_metrics()["step"] == 50)  # status sees it when the time has come


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


class _Store(Location):
    """A store in a folder, which takes as long as `has_answered` is not set, and then does what `is_up` says."""

    is_local = False  # pyright: ignore[reportAssignmentType, reportIncompatibleMethodOverride]
    is_up = False
    has_answered = threading.Event()

    def append_line(self, *lines: str) -> None:
        assert self.has_answered.wait(20)
        if not self.is_up:
            raise StorageUnreachableError("no answer", "Wait.")
        Location.at(self.url).append_line(*lines)


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> type[_Store]:
    """What a run's records go to, at each step; it answers at once, that it is down."""
    monkeypatch.setattr(runlog, "STORE_EVERY_S", 0.0)
    monkeypatch.setattr(_Store, "is_up", False)
    monkeypatch.setattr(RunFolder, "metrics", _Store(str(tmp_path / "metrics")))
    monkeypatch.setattr(RunFolder, "events", _Store(str(tmp_path / "events")))
    _Store.has_answered.set()
    return _Store


def test_a_store_that_does_not_answer_for_a_while_holds_no_step_up_and_loses_none(tmp_path: Path, store: type[_Store]) -> None:
    writer = RecordWriter(RunFolder(Location.at(tmp_path / "run")))
    store.has_answered.clear()
    for step in range(20):
        writer.add({"step": step, "attempt": 1})
        writer.add_event("validation", attempt=1, step=step)
    store.has_answered.set()
    with pytest.raises(StorageUnreachableError):
        writer.flush()
    store.is_up = True
    writer.add({"step": 20, "attempt": 1})
    writer.flush()
    assert [json.loads(line)["step"] for line in Location.at(tmp_path / "metrics").read_lines()] == list(range(21))
    assert [json.loads(line)["step"] for line in Location.at(tmp_path / "events").read_lines()] == list(range(20))
    writer.close()


@pytest.mark.usefixtures("store")
def test_a_store_that_does_not_answer_for_long_ends_the_attempt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = RecordWriter(RunFolder(Location.at(tmp_path / "run")))

    def is_refused() -> bool:
        try:
            writer.add({"step": 1, "attempt": 1})
        except StorageUnreachableError:
            return True
        return False

    for _ in range(3):
        assert not is_refused()
        with pytest.raises(StorageUnreachableError):
            writer.flush()
    monkeypatch.setattr(runlog, "OUTAGE_S", 0.0)
    wait_until(is_refused)
    with pytest.raises(StorageUnreachableError):
        writer.close()


def test_no_step_is_counted_twice_where_an_answer_was_lost(tmp_path: Path) -> None:
    """What its attempt wrote again; another attempt's repetition is one of its own."""
    run = RunFolder(Location.at(tmp_path / "run"))
    for attempt, steps in ((1, (0, 1)), (1, (0, 1, 2)), (2, (1, 2)), (1, (3,))):
        run.append_metrics(*({"step": step, "attempt": attempt} for step in steps))
    assert [(record["attempt"], record["step"]) for record in run.iter_metrics()] == [(1, 0), (1, 1), (1, 2), (2, 1), (2, 2), (1, 3)]
