"""What held pretraining up before a resume, and what that cost (pure)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Event = Mapping[str, Any]

_ENDS = {"stopped", "worker_failed", "failed", "stage_finished"}
_PAUSES = {"stopped", "stage_finished"}
"""Ends after which the run waits for a person, who may take their time."""


@dataclass(frozen=True)
class Interruption:
    """The end of the attempt before, as the one that resumes sees it."""

    cause: str
    steps_lost: int
    seconds_lost: float

    @classmethod
    def before_resume(cls, events: Sequence[Event], *, reached: int, resumed_at: int, now: float) -> "Interruption":
        """Of a run that had taken `reached` steps and goes on from the checkpoint of `resumed_at`.

        Time is lost since that checkpoint where steps were lost with it, else since the end; not while the run was stopped or finished, until the
        command that continues it.
        """
        end = next((event for event in reversed(events) if _ends_pretraining(event, events)), {})
        committed = next((e for e in reversed(events) if e["kind"] == "checkpoint_committed" and e["step"] == resumed_at), {})
        steps_lost = max(0, reached - resumed_at)
        since = committed.get("time") if steps_lost else end.get("seen_at", end.get("time"))
        return cls(
            cause=end.get("cause") or ("the run had ended, and was given more steps" if end.get("kind") == "stage_finished" else "not recorded"),
            steps_lost=steps_lost,
            seconds_lost=0.0 if since is None else max(0.0, round(now - since - _paused_s(end, events), 3)),
        )


def _ends_pretraining(event: Event, events: Sequence[Event]) -> bool:
    """Not an end of fine-tuning, whose attempts have numbers of their own."""
    if event["kind"] not in _ENDS or event.get("stage", "pretrain") != "pretrain":
        return False
    started = next((e for e in reversed(events) if e["kind"] == "attempt_started" and e["attempt"] == event["attempt"]), {})
    return started.get("stage", "pretrain") == "pretrain"


def _paused_s(end: Event, events: Sequence[Event]) -> float:
    commands = [event["time"] for event in events if event["kind"] == "command_started" and event["time"] > end.get("time", 0.0)]
    return commands[-1] - end["time"] if commands and end.get("kind") in _PAUSES else 0.0


def steps_done(newest: Mapping[str, Any], events: Sequence[Event]) -> int:
    """How far training has got since it was last resumed: the newest record's step, or where an attempt resumed that took none."""
    resumed = next((event for event in reversed(events) if event["kind"] == "resumed"), None)
    if resumed is not None and resumed["attempt"] > newest.get("attempt", 0):
        return resumed["step"]
    return newest["step"] + 1 if newest else 0
