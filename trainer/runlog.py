"""The run folder: where everything of a run lies, its events and its metrics (append-only JSON lines)."""

import json
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import groupby
from typing import Any, cast

from data_pipeline.errors import StorageUnreachableError
from data_pipeline.lines import last_lines
from data_pipeline.storage import Location
from trainer.redaction import without_hidden_values

STORE_EVERY_S = 5.0
"""How long records of steps are held back for a store: `status` is no later than that."""
OUTAGE_S = 600.0
"""How long a store may fail to answer before that ends the attempt."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunFolder:
    """Names of everything inside `<storage>/<run-id>/`."""

    root: Location

    @property
    def config(self) -> Location:
        """Resolved config; itself valid input."""
        return self.root / "run.yaml"

    @property
    def events(self) -> Location:
        """One JSON object per event."""
        return self.root / "events.jsonl"

    @property
    def metrics(self) -> Location:
        """One JSON object per optimizer step and attempt."""
        return self.root / "metrics.jsonl"

    @property
    def choices(self) -> Location:
        """What was chosen by measurement before step 1."""
        return self.root / "choices.json"

    @property
    def tensorboard(self) -> Location:
        """TensorBoard event files."""
        return self.root / "tensorboard"

    @property
    def lease(self) -> Location:
        """Who drives the run now."""
        return self.root / "lease.json"

    @property
    def stop_request(self) -> Location:
        """Exists while somebody wants the run to stop."""
        return self.root / "stop-request.json"

    @property
    def checkpoints(self) -> Location:
        """Folder of checkpoints."""
        return self.root / "checkpoints"

    @property
    def models(self) -> Location:
        """Folder of exported models."""
        return self.root / "models"

    @property
    def finetune(self) -> Location:
        """Folder of fine-tune results, one folder per task."""
        return self.root / "finetune"

    @property
    def report(self) -> Location:
        """The HTML report."""
        return self.root / "report.html"

    def rank_log(self, attempt: int, rank: int) -> Location:
        """Log of one rank in one attempt."""
        return self.root / "logs" / f"attempt-{attempt:04d}" / f"rank-{rank:05d}.log"

    def append_event(self, kind: str, *, attempt: int, step: int | None = None, **details: Any) -> None:
        """Record that something happened: `kind`, when, at which step, with `details` (steps_lost, seconds_lost, cause, …)."""
        self.events.append_line(event_line(kind, attempt=attempt, step=step, **details))

    def read_events(self) -> list[dict[str, Any]]:
        """All events, oldest first. One that is there twice, to the letter, was written again because the answer was lost: it counts once."""
        return list(records(dict.fromkeys(self.events.iter_lines())))

    def append_metrics(self, *records: dict[str, Any]) -> None:
        """Record optimizer steps."""
        self.metrics.append_line(*map(json.dumps, records))

    def iter_metrics(self) -> Iterator[dict[str, Any]]:
        """Every record as it was written, those of steps that were repeated later too, without holding all of them. One that its attempt wrote again,
        because a store's answer was lost, comes once."""
        last: dict[int, int] = {}
        for record in records(self.metrics.iter_lines()):
            if record["step"] > last.get(record["attempt"], -1):
                last[record["attempt"]] = record["step"]
                yield record

    def read_metrics(self) -> list[dict[str, Any]]:
        """One record per optimizer step, ascending: the newest attempt's where a step was repeated, whatever one that it superseded wrote after it.

        For runs that fit in memory.
        """
        by_step: dict[int, dict[str, Any]] = {}
        for record in self.iter_metrics():
            if record["attempt"] >= by_step.get(record["step"], record)["attempt"]:
                by_step[record["step"]] = record
        return [by_step[step] for step in sorted(by_step)]

    def newest_metrics(self) -> dict[str, Any]:
        """The record written last: where training is now, which after a resume may be behind where it was. Reads only the end of the file."""
        return next(records(reversed(last_lines(self.metrics))), {})

    def metrics_of(self, step: int) -> dict[str, Any]:
        """The newest record of a step, without reading the others; in a store only where it is among the last."""
        lines = self.metrics.iter_lines() if self.metrics.is_local else last_lines(self.metrics)
        start = json.dumps({"step": step})[:-1] + ","  # `step` is the first key of every record
        newest = deque((line for line in lines if line.startswith(start)), maxlen=1)
        return next(records(newest), {})


class RecordWriter:
    """Writes the records of an attempt's steps: to a disk at once; to a store beside training, those of some seconds in one request.

    A store that does not answer for less than `OUTAGE_S` holds up nothing, and an attempt that goes on loses nothing. What a killed process holds
    back are steps after its newest checkpoint, which are lost with it, as long as each commit is preceded by `flush`.
    """

    def __init__(self, run: RunFolder) -> None:
        self._run = run
        self._held: list[tuple[Location, str]] = []
        self._writing = threading.Lock()
        self._thread: threading.Thread | None = None
        self._written_at = -math.inf
        self._error: Exception | None = None
        """Of the last try, where it failed."""
        self._failing_since = self._failed_at = 0.0

    def add(self, record: dict[str, Any]) -> None:
        """Record a step. Errors as `Location.append_line` has them; of a store that does not answer after a while only, and at a later step."""
        self._hold(self._run.metrics, json.dumps(record))

    def add_event(self, kind: str, *, attempt: int, step: int | None = None, **details: Any) -> None:
        """`RunFolder.append_event`, in the same way."""
        self._hold(self._run.events, event_line(kind, attempt=attempt, step=step, **details))

    def flush(self) -> None:
        """Write what is held back, and wait for it. What cannot be written stays, for the next time."""
        with self._writing:
            self._write()

    def close(self) -> None:
        """The same, unless the last try failed: who ends is not to wait for a store that does not answer."""
        with self._writing:
            if self._error is not None:
                raise self._error
            self._write()

    def _hold(self, file: Location, line: str) -> None:
        self._held.append((file, line))
        if file.is_local:
            self.flush()
            return
        error = self._error  # which the thread may take back between two looks
        if error is not None and (not isinstance(error, StorageUnreachableError) or self._failed_at - self._failing_since > OUTAGE_S):
            raise error
        if time.monotonic() - self._written_at >= STORE_EVERY_S and (self._thread is None or not self._thread.is_alive()):
            self._thread = threading.Thread(target=self._write_beside, daemon=True, name="records")
            self._thread.start()

    def _write_beside(self) -> None:
        is_news = self._error is None
        try:
            self.flush()
        except Exception as error:  # noqa: BLE001 - kept, and raised at a later step
            if is_news:
                _log.warning("records of steps are held back: %s", error)

    def _write(self) -> None:
        try:
            for file, lines in groupby(list(self._held), key=lambda entry: entry[0]):
                written = [line for _, line in lines]
                file.append_line(*written)
                del self._held[: len(written)]
        except Exception as error:
            self._failed_at = time.monotonic()
            self._failing_since = self._failed_at if self._error is None else self._failing_since
            self._error = error
            raise
        self._written_at, self._error = time.monotonic(), None


def event_line(kind: str, *, attempt: int, step: int | None = None, **details: Any) -> str:
    """The record of something that happens now, for who appends it more than once until storage takes it. See `RunFolder.append_event`.

    It has no value of a secret that this process was given, whatever the details say.
    """
    return json.dumps({"time": time.time(), "kind": kind, "attempt": attempt, "step": step, **without_hidden_values(details)})


def records(lines: Iterable[str]) -> Iterator[dict[str, Any]]:
    """Whole records of JSON lines. One that a full disk or a crash has cut was never written, and must not stop the next resume."""
    for line in lines:
        with suppress(ValueError):
            record = json.loads(line)
            if isinstance(record, dict):  # and not a number that is left of one
                yield cast("dict[str, Any]", record)
