"""Where the time of steps goes: what a rank says of where it is (`RunContext.heartbeat`) is also how its time is counted."""

import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

import torch

from trainer.context import ForwardingContext, RunContext

ON_DEVICE = {"forward", "backward", "reduce"}
"""Phases whose work a GPU has still before it when the host has gone on."""


class Event(Protocol):
    """`torch.cuda.Event` with timing: an instant on the device."""

    def record(self) -> None:
        """The instant at which the device will have done what it has been given so far. Does not wait."""
        ...

    def elapsed_time(self, end_event: Any, /) -> float:
        """Milliseconds until another event; the device has come to both."""
        ...


@dataclass(frozen=True)
class _Mark:
    """A phase began."""

    phase: str
    at: float
    """By the host's clock, in seconds."""
    event: Event | None


class Timeline(ForwardingContext):
    """A `RunContext` that passes everything on, and on rank 0 notes when each phase began.

    On a CPU phases are told by the host's clock. A GPU is behind its host in forward, backward and reduce: these are told by events that the device
    records as it comes to them, and that are read once the ranks have agreed on the losses, which waits for the device in any case. Nothing waits for
    the sake of a time. What the device was behind is not counted twice: it is taken from what the host has done meanwhile (read the data of the next
    step), and from the agreement that has waited for it.
    """

    def __init__(self, context: RunContext, new_event: Callable[[], Event] | None) -> None:
        super().__init__(context)
        self._new_event = new_event
        self._marks: list[_Mark] = []

    @classmethod
    def of(cls, context: RunContext, device: torch.device) -> "Timeline":
        """The time line of a rank that computes on `device`."""
        return cls(context, (lambda: torch.cuda.Event(enable_timing=True)) if device.type == "cuda" else None)

    def heartbeat(self, step: int, phase: str) -> None:
        """See `RunContext.heartbeat`."""
        super().heartbeat(step, phase)
        if self.rank == 0:
            self._marks.append(_Mark(phase, time.monotonic(), self._event_for(phase)))

    def take(self) -> dict[str, float]:
        """Seconds of rank 0 in each phase since this was last called; what the device had to do before the last phase is done."""
        now = _Mark("", time.monotonic(), None)
        marks, self._marks = [*self._marks, now], [now]
        seconds: defaultdict[str, float] = defaultdict(float)
        behind_s = 0.0
        for mark, following in pairwise(marks):
            host_s = following.at - mark.at
            if mark.event is not None and following.event is not None:
                device_s = mark.event.elapsed_time(following.event) / 1000
                seconds[mark.phase] += device_s
                behind_s += device_s - host_s
            else:
                seconds[mark.phase] += max(0.0, host_s - behind_s)
                behind_s = max(0.0, behind_s - host_s)
        return dict(seconds)

    def _event_for(self, phase: str) -> Event | None:
        """An event where a phase on the device begins or ends."""
        ends = bool(self._marks) and self._marks[-1].phase in ON_DEVICE
        if self._new_event is None or not (phase in ON_DEVICE or ends):
            return None
        event = self._new_event()
        event.record()
        return event
