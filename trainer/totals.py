"""What the ranks tell each other about a step: counts before the first forward pass, loss sums before the optimizer moves.

Both are one small all-reduce of float64, in which counts and 16-bit limbs add up exactly.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from trainer.writing import as_known

if TYPE_CHECKING:
    from data_pipeline.stream import MicroBatch

T = TypeVar("T")

_LIMBS = 4
_LIMB_BITS = 16


@dataclass(frozen=True)
class StepCounts:
    """Counts of a rank's part of a global batch; `total` makes them those of the whole batch."""

    masked: int = 0
    pairs: int = 0
    tokens: int = 0
    samples: int = 0
    squared_lengths: int = 0
    digest: int = 0
    skipped_blocks: int = 0
    """Damaged blocks met, a block as often as it was."""
    stops: int = 0
    failures: int = 0

    @classmethod
    def of(cls, batches: Sequence["MicroBatch"], first_position: int, *, failed: bool = False) -> "StepCounts":
        """Count the micro-batches at positions `first_position`, … of the step."""
        from data_pipeline.stream import step_digest

        return cls(
            masked=sum(batch.num_masked for batch in batches),
            pairs=sum(batch.num_pairs for batch in batches),
            tokens=sum(batch.num_tokens for batch in batches),
            samples=sum(batch.num_samples for batch in batches),
            squared_lengths=sum(int((batch.lengths.astype("int64") ** 2).sum()) for batch in batches),
            digest=step_digest([(first_position + place, batch.digest) for place, batch in enumerate(batches)]),
            skipped_blocks=sum(len(batch.skipped) for batch in batches),
            failures=int(failed),
        )

    def total(self, device: torch.device) -> "StepCounts":
        """Sum over ranks (the digest modulo 2**64). Collective; waits for the slowest reader."""
        numbers = [getattr(self, name) for name in _COUNTS] + _limbs(self.digest)
        summed = [int(value) for value in _summed(torch.tensor(numbers, dtype=torch.float64), device)]
        return StepCounts(**dict(zip(_COUNTS, summed, strict=False)), digest=_from_limbs(summed[len(_COUNTS) :]))


_COUNTS = [field.name for field in fields(StepCounts) if field.name != "digest"]


@dataclass(frozen=True)
class StepLosses:
    """Mean losses and accuracies of a global batch; NaN where the batch has nothing to predict, infinite where a loss is not finite."""

    mlm_loss: float
    nsp_loss: float
    mlm_accuracy: float
    nsp_accuracy: float

    @property
    def loss(self) -> float:
        """What is minimised; a term without labels does not count."""
        return sum(term for term in (self.mlm_loss, self.nsp_loss) if not math.isnan(term))

    @classmethod
    def total(cls, sums: Tensor, counts: StepCounts, device: torch.device) -> "StepLosses":
        """Add the ranks' vectors of `LossSums.detached` and divide by the global counts. Collective; waits for the device."""
        mlm_loss, nsp_loss, mlm_correct, nsp_correct = _summed(sums, device)
        masked, pairs = counts.masked or math.nan, counts.pairs or math.nan
        mlm_loss, nsp_loss = (loss if math.isfinite(loss) else math.inf for loss in (mlm_loss, nsp_loss))
        return cls(mlm_loss / masked, nsp_loss / pairs, mlm_correct / masked, nsp_correct / pairs)


def on_rank_zero(what: str, action: Callable[[], T]) -> T:
    """The result of `action`, which rank 0 runs, on every rank; its failure is raised on every rank. Collective.

    Raises:
        MaskwrightError: it failed; with the type, cause and remedy of the original where it had them.
    """
    result: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            result[0] = action()
        except Exception as error:  # noqa: BLE001 - whatever it is, the other ranks wait for word of it
            result[1] = as_known(error, f"rank 0 could not {what}")
    dist.broadcast_object_list(result)
    if result[1] is not None:
        raise result[1]
    return result[0]


def raise_together(error: Exception | None, what: str) -> None:
    """Raise on every rank the error of the lowest rank that has one; at least one has. Collective.

    Raises:
        MaskwrightError: always; with the type, cause and remedy of the original where it had them.
    """
    errors: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(errors, None if error is None else as_known(error, f"rank {dist.get_rank()} could not {what}"))
    raise next(other for other in errors if other is not None) from error


def _summed(values: Tensor, device: torch.device) -> list[float]:
    if dist.get_world_size() > 1:  # else counts need not wait for the device
        values = values.to(device)
        dist.all_reduce(values)
    return values.tolist()


def _limbs(number: int) -> list[int]:
    return [(number >> (_LIMB_BITS * place)) & (2**_LIMB_BITS - 1) for place in range(_LIMBS)]


def _from_limbs(limbs: Sequence[int]) -> int:
    return sum(limb << (_LIMB_BITS * place) for place, limb in enumerate(limbs)) % 2 ** (_LIMB_BITS * _LIMBS)
