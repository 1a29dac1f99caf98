"""`Reduction`, which says when DeepSpeed reduces gradients over the ranks: it stands around the calls in which it does.

Stages 0 and 1 reduce in one call, after a step's last backward pass. Stage 2 does so after every one, and within it whenever a bucket is
full. Stage 3, and any stage with `overlap_comm`, reduces beside the backward pass, where no time is its own.
"""

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

from trainer.zero_buckets import cut_into_buckets


def nobody(phase: str) -> None:
    """Hears what nobody else does."""
    del phase


class Reduction:
    """The reductions of a DeepSpeed engine. Build it with `Reduction.over`."""

    def __init__(self, engine: Any, *, is_apart: bool) -> None:
        self._engine = engine
        self._enter: Callable[[str], None] = nobody
        self._reduces = False
        self.is_apart = is_apart
        """Whether training stands still for them, so that they can be told from the backward pass."""

    @classmethod
    def over(cls, engine: Any) -> "Reduction":
        """Stand around the calls of `engine`, where reductions are apart. `zero_buckets` says of what they are."""
        cut_into_buckets(engine)
        is_apart = engine.zero_optimization_stage() < 3 and not engine.zero_overlap_comm()
        reduction, optimizer = cls(engine, is_apart=is_apart), engine.optimizer
        if is_apart:
            engine.allreduce_gradients = reduction._told(engine.allreduce_gradients)
        if is_apart and hasattr(optimizer, "reduce_ipg_grads"):  # of a full bucket, in the midst of a backward pass
            optimizer.reduce_ipg_grads = reduction._told(optimizer.reduce_ipg_grads)
        return reduction

    @contextmanager
    def heard_by(self, enter: Callable[[str], None]) -> Generator[None]:
        """For the length of a backward pass `enter` hears when it is interrupted: `reduce`, and then `backward` again."""
        self._enter = enter
        try:
            yield
        finally:
            self._enter = nobody

    def _told(self, reduce: Callable[..., Any]) -> Callable[..., Any]:
        def told(*arguments: Any, **named: Any) -> Any:
            if self._reduces or not self._communicates():
                return reduce(*arguments, **named)
            self._reduces = True
            self._enter("reduce")
            try:
                return reduce(*arguments, **named)
            finally:
                self._reduces = False
                self._enter("backward")

        return told

    def _communicates(self) -> bool:
        """Between two boundaries stages 0 and 1 only accumulate."""
        return self._engine.is_gradient_accumulation_boundary() or self._engine.zero_optimization_partition_gradients()
