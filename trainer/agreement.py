"""`Ranks`, how ranks agree on the outcome of an action: within a bounded time, on a process group that carries nothing else."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Generic, TypeVar

import torch.distributed as dist

from data_pipeline.errors import MaskwrightError
from trainer.writing import as_known

T = TypeVar("T")


@dataclass(frozen=True)
class _Outcome(Generic[T]):
    """What an action came to on one rank."""

    value: T | None
    error: MaskwrightError | None


@dataclass(frozen=True)
class Ranks:
    """This rank, among how many, and the gloo group on which they agree (None when there is one rank)."""

    rank: int
    world_size: int
    group: dist.ProcessGroup | None
    timeout_s: float

    def all_do(self, what: str, action: Callable[[], T]) -> list[T]:
        """Run `action` on every rank and return every rank's result in rank order.

        If it fails on one rank, every rank raises that failure (the lowest failing rank's) as soon as all have finished;
        `what` names the action in the message.

        Raises:
            MaskwrightError: the action failed on some rank, or a rank did not finish within `timeout_s`.
        """
        outcome, original = self._attempt(what, action)
        outcomes = self._gather(outcome, what, original)
        for rank, other in enumerate(outcomes):
            if other.error is not None:
                raise other.error from (original if rank == self.rank else None)
        return [other.value for other in outcomes]  # pyright: ignore[reportReturnType]  # no error: T was returned

    def rank_zero_does(self, what: str, action: Callable[[], T]) -> T:
        """Run `action` on rank 0 only and return its result on every rank; its failure is raised on every rank."""
        box: list[Any] = [None]

        def act() -> None:
            if self.rank == 0:
                box[0] = action()

        self.all_do(what, act)  # gathers outcomes; the result, which may be large, goes out once
        if self.world_size > 1:
            dist.broadcast_object_list(box, src=0, group=self.group)
        return box[0]

    def _attempt(self, what: str, action: Callable[[], T]) -> tuple[_Outcome[T], Exception | None]:
        try:
            return _Outcome(action(), None), None
        except Exception as error:  # noqa: BLE001  # whatever it is, the other ranks wait for word of it
            return _Outcome(None, as_known(error, f"rank {self.rank} could not {what}")), error

    def _gather(self, outcome: _Outcome[T], what: str, original: Exception | None) -> list[_Outcome[T]]:
        if self.world_size == 1:
            return [outcome]
        outcomes: list[_Outcome[T]] = [outcome] * self.world_size
        started_at = time.monotonic()
        try:
            # Unlike a plain collective it takes a time-out of its own, and rank 0's error names the ranks that are missing.
            dist.monitored_barrier(self.group, timeout=timedelta(seconds=self.timeout_s), wait_all_ranks=True)
            dist.all_gather_object(outcomes, outcome, group=self.group)
        except RuntimeError as error:
            if outcome.error is not None:
                raise outcome.error from original
            elapsed_s = time.monotonic() - started_at
            raise MaskwrightError(
                f"rank {self.rank} waited {elapsed_s:.0f} s for every rank to {what}, but not all of them answered: {error}",
                "Look for the rank that died or hangs, then `maskwright resume` the run.",
            ) from error
        return outcomes


def agreement_group(world_size: int) -> dist.ProcessGroup | None:
    """A new gloo group over all ranks for `Ranks`; a collective call, made once per attempt."""
    return dist.new_group(backend="gloo") if world_size > 1 else None  # pyright: ignore[reportReturnType]
