"""CPU seconds by step of a task: measured where the work is done, summed where it is told, never part of a corpus."""

import time
from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager


class Stopwatch:
    """Adds up the CPU seconds, all threads of this process, that pass inside `with watch("step"):`."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, step: str) -> Generator[None]:
        started_at = time.process_time()
        try:
            yield
        finally:
            self.seconds[step] = self.seconds.get(step, 0.0) + time.process_time() - started_at


def total(measured: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """The sum over several stopwatches, steps in the order of their first appearance."""
    sums: dict[str, float] = {}
    for seconds in measured:
        for step, value in seconds.items():
            sums[step] = sums.get(step, 0.0) + value
    return sums
