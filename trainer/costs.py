"""What steps cost, by operator or kernel: torch.profiler's averages as shares of a whole, the largest first (pure)."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

LABEL = "phase: "
"""Begins the names of our own stretches in a trace."""
_STEP = "ProfilerStep"
"""Begins the names of the profiler's own stretches, one a step."""


@dataclass(frozen=True)
class Cost:
    """What an operator or kernel took for itself, what it called left out."""

    name: str
    calls: int
    seconds: float
    share: float
    """Of all costs together."""


def costs_of(averages: Iterable[Any], *, on_gpu: bool) -> list[Cost]:
    """Every cost in `torch.profiler.profile.key_averages()`, the largest first.

    On a GPU they are its kernels and copies. On a CPU they are operators, and for each phase what it does outside of operators: Python, and waiting
    for other ranks or for data.
    """
    found = _kernels(averages) if on_gpu else _operators(averages)
    spent = [(name, calls, seconds) for name, calls, seconds in found if seconds > 0]
    whole_s = sum(seconds for _, _, seconds in spent)
    return [Cost(name, calls, seconds, seconds / whole_s) for name, calls, seconds in sorted(spent, key=lambda cost: (-cost[2], cost[0]))]


def _kernels(averages: Iterable[Any]) -> list[tuple[str, int, float]]:
    return [
        (each.key, each.count, each.self_device_time_total / 1e6)
        for each in averages
        if each.device_type.name != "CPU" and not each.is_user_annotation
    ]


def _operators(averages: Iterable[Any]) -> list[tuple[str, int, float]]:
    return [(_named(each.key), each.count, each.self_cpu_time_total / 1e6) for each in averages if each.device_type.name == "CPU"]


def _named(key: str) -> str:
    if key.startswith(_STEP):
        return "Python between phases"
    return f"Python and waiting in {key.removeprefix(LABEL)}" if key.startswith(LABEL) else key
