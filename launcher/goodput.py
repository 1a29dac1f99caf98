"""Goodput: what the wall time of pretraining was spent on, by cause; the parts add up to the whole (pure)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from launcher.history import Attempt, Events, History

if TYPE_CHECKING:
    from launcher.answers.runs import GoodputAnswer

USEFUL = "useful"
CAUSES = {
    USEFUL: "training: steps that count",
    "start_up": "start-up of cluster and workers, until their first step",
    "repeated": "steps that were lost and trained again",
    "down": "noticing a failure, and until the next start",
    "checkpoint": "training stood still for a checkpoint",
    "data_wait": "waiting for data",
    "validation": "validation",
    "growth": "growing the world, its start-up included",
    "shut_down": "ending the workers",
    "other": "between steps",
}
"""Keys of the JSON, in the order in which they are shown, and what they mean."""

Seconds = NDArray[np.float64]


@dataclass
class Goodput:
    """Seconds by cause, from when workers were first asked for to the end of the last; without the time for which somebody had stopped the run."""

    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(CAUSES, 0.0))
    paused_s: float = 0.0

    @property
    def wall_s(self) -> float:
        """The sum of all causes."""
        return sum(self.seconds.values())

    @property
    def share(self) -> float:
        """Useful time as a share of all; 0 before there is any."""
        return self.seconds[USEFUL] / self.wall_s if self.wall_s else 0.0

    def to_json(self) -> "GoodputAnswer":
        """JSON object."""
        lost = {cause: round(seconds, 3) for cause, seconds in self.seconds.items() if cause != USEFUL}
        return {
            "wall_s": round(self.wall_s, 3),
            "useful_s": round(self.seconds[USEFUL], 3),
            "goodput": round(self.share, 4),
            "lost_s": lost,
            "paused_s": round(self.paused_s, 3),
        }


def goodput(attempts: Sequence[Attempt], history: History, events: Events) -> Goodput:
    """Account for all time between the first attempt's beginning and the last one's end; of one that runs, its last step."""
    spent, now = Goodput(), attempts[0].asked_at if attempts else 0.0
    before: Attempt | None = None
    for attempt in attempts:
        begin = max(now, attempt.asked_at)
        if before is not None and before.ended in {"stopped", "finished"}:
            spent.paused_s += begin - now
        else:
            spent.seconds["growth" if before is not None and before.grew else "down"] += begin - now
        own = [event for event in events if event.get("attempt") == attempt.number]
        grown = before is not None and before.grew
        now = _spend_attempt(spent.seconds, attempt, history.of_attempt(attempt.number), own, begin, start_up="growth" if grown else "start_up")
        before = attempt
    return spent


def _spend_attempt(seconds: dict[str, float], attempt: Attempt, history: History, events: Events, begin: float, *, start_up: str) -> float:
    """Add an attempt's time from `begin` on; return when it ended."""
    times = history.values["time"]
    if not np.isfinite(times).all() or not len(times):  # records of older releases have no times
        end = max(begin, attempt.ended_at or begin)
        seconds["other" if len(times) else start_up] += end - begin
        return end
    ends = np.maximum.accumulate(np.maximum(times, begin))
    previous = np.concatenate([[begin], ends[:-1]])
    begins = np.clip(ends - history.values["step_s"], previous, ends)
    gaps = begins - previous
    seconds[start_up] += float(gaps[0])
    _spend_steps(seconds, history, ends - begins)
    _spend_gaps(seconds, gaps[1:], history.values["checkpoint_stall_s"][1:], _validation(events, previous[1:], begins[1:]))
    return _spend_end(seconds, attempt, events, float(ends[-1]))


def _spend_steps(seconds: dict[str, float], history: History, lengths: Seconds) -> None:
    waits = np.minimum(np.nan_to_num(history.values["data_wait_s"]), lengths)
    kept = history.survives
    seconds["repeated"] += float(lengths[~kept].sum())
    seconds["data_wait"] += float(waits[kept].sum())
    seconds["useful"] += float((lengths - waits)[kept].sum())


def _spend_gaps(seconds: dict[str, float], gaps: Seconds, stalls: Seconds, validation: Seconds) -> None:
    """Between two steps a run validates first, then saves."""
    validation = np.minimum(validation, gaps)
    stalls = np.minimum(np.nan_to_num(stalls), gaps - validation)
    seconds["validation"] += float(validation.sum())
    seconds["checkpoint"] += float(stalls.sum())
    seconds["other"] += float((gaps - validation - stalls).sum())


def _validation(events: Events, previous: Seconds, begins: Seconds) -> Seconds:
    """Seconds of validation in each gap: from its start until the losses were recorded."""
    found = np.zeros(len(begins))
    for told_at in (event["time"] for event in events if event["kind"] == "validation"):
        place = int(np.searchsorted(begins, told_at))
        if place < len(begins) and told_at >= previous[place]:
            found[place] += told_at - previous[place]
    return found


def _spend_end(seconds: dict[str, float], attempt: Attempt, events: Events, last: float) -> float:
    """From the last step on: a failure is noticed, or the run validates and saves, and its workers end."""
    end = last if attempt.ended_at is None else max(last, attempt.ended_at)
    if attempt.ended in {"failed", "rewound"}:
        seconds["down"] += end - last
        return end
    if attempt.grew:
        seconds["growth"] += end - last
        return end
    for kind, cause in (("validation", "validation"), ("checkpoint_committed", "checkpoint")):
        told_at = min(end, max([last, *_times(events, kind)]))
        seconds[cause] += told_at - last
        last = told_at
    seconds["shut_down"] += end - last
    return end


def _times(events: Events, kind: str) -> list[float]:
    return [event["time"] for event in events if event["kind"] == kind]


def lost_parts(found: Goodput) -> list[Mapping[str, Any]]:
    """For people: every cause that took time, in order, with its seconds and its share."""
    wall_s = found.wall_s or 1.0
    return [
        {"cause": cause, "text": CAUSES[cause], "seconds": seconds, "share": seconds / wall_s} for cause, seconds in found.seconds.items() if seconds
    ]
