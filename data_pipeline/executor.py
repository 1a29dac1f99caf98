"""What runs the pure per-partition functions of `prepare`: in this process here, on a cluster in the launcher."""

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


class Executor(Protocol):
    """Runs picklable, pure functions over picklable items, in any order and on any number of machines."""

    def map(self, function: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[Result]:
        """Results in the order of `items`. The first error is raised as it was, when its turn comes or earlier."""
        ...


class InProcessExecutor:
    """One item after the other, in this process."""

    def map(self, function: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[Result]:
        """See `Executor.map`."""
        return map(function, items)
