"""The run folder: where everything of a run lies, its events and its metrics (append-only JSON lines)."""

import json
import math
import time
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, cast

from data_pipeline.lines import last_lines
from data_pipeline.storage import Location
from trainer.redaction import without_hidden_values

STORE_EVERY_S = 5.0
"""How long records of steps are held back for a store: `status` is no later than that."""


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
        """Every record as it was written, those of steps that were repeated later too, without holding all of them."""
        return records(self.metrics.iter_lines())

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


@dataclass
class MetricsWriter:
    """Records optimizer steps: on a disk at once, in a store, where each time is a request that training waits for, those of some seconds together.

    What a killed process holds back are steps after its newest checkpoint, which are lost with it, as long as each save is preceded by `flush`.
    """

    run: RunFolder
    _held: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    _written_at: float = -math.inf

    def add(self, record: dict[str, Any]) -> None:
        """Record a step, or hold it back for a moment."""
        self._held.append(record)
        if self.run.metrics.is_local or time.monotonic() - self._written_at >= STORE_EVERY_S:
            self.flush()

    def flush(self) -> None:
        """Write what is held back. Where that fails it is gone: storage was patient already, and the run ends."""
        held, self._held = self._held, []
        if held:
            self.run.append_metrics(*held)
            self._written_at = time.monotonic()


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
