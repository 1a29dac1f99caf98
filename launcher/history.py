"""What happened in a run's pretraining: the records of its steps as columns, and its attempts (pure, but for `read_history`)."""

import math
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.runlog import RunFolder

PHASES = ("data_wait_s", "agree_s", "forward_s", "backward_s", "reduce_s", "optimizer_s", "checkpoint_stall_s", "validation_s")
"""The time line of a step; what they are: `trainer.metrics.StepRecord`."""
VALUES = ("mlm_loss", "nsp_loss", "tokens_per_s", "mfu", "mfu_stated", "lr", "grad_norm", "time", "step_s", *PHASES)
_FAILURES = {"preemption": "preempted", "numeric": "rewound"}
"""Ends that are told as `worker_failed` and have a name of their own."""

Events = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class History:
    """Every record of a step as it was written, also of steps that were lost and repeated: about 170 bytes for each."""

    step: NDArray[np.int64]
    attempt: NDArray[np.int64]
    digest: NDArray[np.uint64]
    """Of the global batch; 0 where none was recorded."""
    survives: NDArray[np.bool_]
    """Whether the step is part of what the newest weights came from."""
    values: dict[str, NDArray[np.float64]]
    """The other columns, `VALUES`; NaN where there is none."""

    @classmethod
    def of(cls, records: Iterable[Mapping[str, Any]], events: Events) -> "History":
        """Columns of records as they come."""
        step, attempt, digest = array("q"), array("q"), array("Q")
        values = {name: array("d") for name in VALUES}
        for record in records:
            step.append(record["step"])
            attempt.append(record["attempt"])
            digest.append(int(record.get("batch_digest") or "0", 16))
            for name, column in values.items():
                value = record.get(name)
                column.append(math.nan if value is None else value)
        steps, attempts = np.array(step, dtype=np.int64), np.array(attempt, dtype=np.int64)
        columns = {name: np.array(column, dtype=np.float64) for name, column in values.items()}
        return cls(steps, attempts, np.array(digest, dtype=np.uint64), survivors(steps, attempts, resumes(events)), columns)

    def __len__(self) -> int:
        return len(self.step)

    def surviving(self) -> "History":
        """Only the records that survive, by step."""
        kept = np.flatnonzero(self.survives)
        return self._at(kept[np.argsort(self.step[kept], kind="stable")])

    def of_attempt(self, number: int) -> "History":
        """Only the records of one attempt, as they were written."""
        return self._at(np.flatnonzero(self.attempt == number))

    def _at(self, places: NDArray[np.intp]) -> "History":
        columns = {name: column[places] for name, column in self.values.items()}
        return History(self.step[places], self.attempt[places], self.digest[places], self.survives[places], columns)


def read_history(run: RunFolder, events: Events) -> History:
    """The history of a run, read as a stream."""
    return History.of(run.iter_metrics(), events)


def resumes(events: Events) -> dict[int, int]:
    """The step at which each attempt resumed, by attempt."""
    return {event["attempt"]: event["step"] for event in events if event["kind"] == "resumed"}


def survivors(step: NDArray[np.int64], attempt: NDArray[np.int64], resumed: Mapping[int, int]) -> NDArray[np.bool_]:
    """Which records belong to the surviving history: those of steps before the one at which any later attempt took over.

    An attempt took over where it says that it resumed; one that found no checkpoint, at its first step.
    """
    survives = np.ones(len(step), dtype=bool)
    begins = dict(resumed)
    for number in np.unique(attempt).tolist():
        begins.setdefault(number, int(step[attempt == number].min()))
    for number, begin in begins.items():
        survives &= (attempt >= number) | (step < begin)
    return survives


@dataclass(frozen=True)
class Attempt:
    """One start of the worker group for pretraining."""

    number: int
    world_size: int | None
    zero_stage: int | None
    device: str
    asked_at: float
    """When the driver began to start Ray, or to wait for nodes; `started_at` where that was not recorded."""
    started_at: float
    ended_at: float | None
    """None while it runs."""
    ended: str
    """`finished`, `failed`, `stopped`, `preempted`, `rewound` (numeric trouble), `resized`, or `running`."""
    cause: str
    resumed_at: int | None
    """The step of the checkpoint that it continued from."""
    first_step: int | None
    last_step: int | None
    """Of its records; None where it took none."""
    grew: bool
    """Whether it ended for the sake of more ranks."""


def attempts_of(events: Events, history: History) -> list[Attempt]:
    """The attempts of pretraining, in order. One of which nobody has said how it ended runs, or its driver was lost."""
    starts = [place for place, event in enumerate(events) if event["kind"] == "attempt_started" and event.get("stage", "pretrain") == "pretrain"]
    resumed = resumes(events)
    found: list[Attempt] = []
    for place, stop in pairwise([*starts, len(events)]):
        event = events[place]
        ends = [end for end in map(_end_of, events[place + 1 : stop]) if end is not None]
        first, told = (ends[0], _most_precise(ends)) if ends else ({}, {})
        own = history.step[history.attempt == event["attempt"]]
        found.append(
            Attempt(
                number=event["attempt"],
                world_size=event.get("world_size"),
                zero_stage=event.get("zero_stage"),
                device=event.get("device", ""),
                asked_at=event["time"] - event.get("cluster_s", 0.0),
                started_at=event["time"],
                ended_at=first.get("time"),
                ended=told.get("ended", "running"),
                cause=told.get("cause", ""),
                resumed_at=resumed.get(event["attempt"]),
                first_step=int(own[0]) if len(own) else None,
                last_step=int(own.max()) if len(own) else None,
                grew=told.get("grew", False),
            )
        )
    return found


def _end_of(event: Mapping[str, Any]) -> dict[str, Any] | None:
    """What an event says about the end of the attempt that runs; None when nothing."""
    kind, end = event["kind"], {"time": event.get("seen_at", event["time"]), "cause": str(event.get("cause") or "")}
    if kind == "stage_finished" and event["stage"] == "pretrain":
        return {**end, "ended": "finished"}
    if kind == "worker_failed":
        return {**end, "ended": _FAILURES.get(event.get("failure", ""), "failed")}
    if kind == "resized":
        before, after = event.get("before"), event.get("after")
        return {**end, "ended": "resized", "cause": f"{before} ranks, then {after}", "grew": _is_more(after, before)}
    return {**end, "ended": kind} if kind in {"failed", "stopped"} else None


def _most_precise(ends: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A rank that was asked to save and end says `stopped`; what the launcher says afterwards is why."""
    if ends[0]["ended"] != "stopped":
        return ends[0]
    return next((end for end in ends if end["ended"] in {"preempted", "resized"}), ends[-1] if ends[-1]["ended"] == "stopped" else ends[0])


def _is_more(after: Any, before: Any) -> bool:
    return isinstance(after, int) and isinstance(before, int) and after > before
