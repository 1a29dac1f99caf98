"""This rank's part of each optimizer step, read from the stream in order; failures are carried to where all ranks learn of them."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

from data_pipeline.config import Phase
from data_pipeline.order import micro_batches_of_step, micro_steps, rank_micro_batches
from data_pipeline.stream import MicroBatchStream, build_loader

if TYPE_CHECKING:
    from data_pipeline.stream import MicroBatch

T = TypeVar("T")


@dataclass(frozen=True)
class StepPart:
    """The micro-batches that a rank computes in a step, or the error that kept it from reading them."""

    batches: "list[MicroBatch]"
    first_position: int
    """Position within the step of the first of them."""
    num_passes: int
    """Micro-steps of every rank; those beyond `batches` are empty, so that collectives match."""
    num_micro_batches: int
    """Micro-batches of the whole step."""
    wait_s: float
    """Seconds that the training process waited for them."""
    error: Exception | None = None


def read_steps(
    stream: MicroBatchStream, phases: tuple[Phase, ...], *, first_step: int, rank: int, world_size: int, workers: int
) -> Iterator[StepPart]:
    """This rank's parts of the steps from `first_step` to the end of the last phase. Never raises: the last part may hold an error."""
    steps = range(first_step, phases[-1].first_step + phases[-1].num_steps)
    numbers = (number for step in steps for number in share_of(micro_batches_of_step(phases, step), rank, world_size))
    loader: Iterator[MicroBatch] | None = None
    for step in steps:
        whole = micro_batches_of_step(phases, step)
        share = share_of(whole, rank, world_size)
        batches: list[MicroBatch] = []
        error: Exception | None = None
        started_at = time.monotonic()
        try:
            loader = build_loader(stream, numbers, workers) if loader is None else loader
            batches = [next(loader) for _ in share]
        except Exception as reason:  # noqa: BLE001 - whatever it is, the other ranks must hear of it before they wait for gradients
            error = reason
        yield StepPart(
            batches=[] if error else batches,
            first_position=share.start - whole.start,
            num_passes=micro_steps(len(whole), world_size),
            num_micro_batches=len(whole),
            wait_s=time.monotonic() - started_at,
            error=error,
        )
        if error:
            return


class Ahead(Generic[T]):
    """Values that take a while to make, each of which can be made before its turn: a GPU computes a step long after its host has handed it out."""

    def __init__(self, values: Iterator[T]) -> None:
        self._values = values
        self._next: T | None = None

    def make(self) -> None:
        """Have the next value ready, if there is one."""
        if self._next is None:
            self._next = next(self._values, None)

    def take(self) -> T:
        """The next value, of which there is one: made now, if it has not been yet."""
        self.make()
        value, self._next = self._next, None
        assert value is not None
        return value


def share_of(numbers: range, rank: int, world_size: int) -> range:
    """The part of a step's micro-batches, by run-wide number, that a rank computes."""
    own = rank_micro_batches(len(numbers), rank, world_size)
    return range(numbers.start + own.start, numbers.start + own.stop)
