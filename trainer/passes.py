"""Passes over micro-batches: a step's forward and backward, and validation (every function is collective)."""

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from data_pipeline.config import Phase
from data_pipeline.hashing import mix64
from data_pipeline.mixture import Mixture
from data_pipeline.stream import MicroBatchStream, empty_micro_batch
from trainer.batch import TensorBatch, tensor_batches
from trainer.config import RunConfig
from trainer.engine import Engine
from trainer.objectives import LossWeights
from trainer.reading import StepPart, read_steps
from trainer.skips import newly_skipped
from trainer.state import TrainState
from trainer.totals import StepCounts, StepLosses, raise_together

if TYPE_CHECKING:
    from data_pipeline.micro_batch import SkippedBlock
    from data_pipeline.stream import MicroBatch

_DROPOUT = 0xD509  # keeps dropout's seeds apart from those of other uses of `mix64`


class StepWork:
    """What a rank computes in a step: the micro-batches of its part, each in `batch.split` pieces, and empty ones up to the passes of every rank.

    Made by `StepWork.of`, they are counted, and the first is on its way to the device: what a GPU would wait for is done while it computes the step
    before.
    """

    def __init__(
        self,
        part: StepPart,
        counts: StepCounts,
        batches: "Sequence[MicroBatch]",
        first: Sequence[TensorBatch],
        config: RunConfig,
        device: torch.device,
    ) -> None:
        self.part = part
        self.counts = counts
        """Of this rank alone, which says nothing of stops and failures yet."""
        self._batches = batches
        self._first = first
        self._config = config
        self._device = device

    @classmethod
    def of(cls, part: StepPart, empty: "MicroBatch", config: RunConfig, device: torch.device) -> "StepWork":
        """The work of a rank whose part of the step has been read."""
        batches = _padded(part, empty)
        first = [piece.to(device) for piece in tensor_batches(batches[0], config.batch.split)]
        return cls(part, StepCounts.of(part.batches, part.first_position), batches, first, config, device)

    @property
    def num_pieces(self) -> int:
        """The same on every rank."""
        return len(self._batches) * self._config.batch.split

    def pieces(self) -> Iterator[tuple[TensorBatch, int]]:
        """Each piece on the device, and the seed of its dropout; once.

        By (seed, micro-batch number, piece): it depends neither on the rank nor on restarts, and no random state needs saving.
        """
        ready, self._first = self._first, ()
        for batch in self._batches:
            for number, piece in enumerate(ready or tensor_batches(batch, self._config.batch.split)):
                yield piece.to(self._device), dropout_seed(self._config.seed, batch.number, number)
            ready = ()


def forward_backward(
    engine: Engine, work: StepWork, counts: StepCounts, world_size: int, enter: Callable[[str], None] = lambda phase: None
) -> Tensor:
    """Accumulate the gradients of this rank's work in a step; returns its sums as `LossSums.detached` does, still on the device.

    `counts` are those of all ranks. `enter` hears each time whether `forward`, `backward` or `reduce` begins. The loss of an empty micro-batch has
    weight zero.
    """
    weights = LossWeights.for_step(num_masked=counts.masked, num_pairs=counts.pairs, world_size=world_size)
    sums = torch.zeros(4, dtype=torch.float64, device=engine.device)
    for number, (piece, seed) in enumerate(work.pieces(), start=1):
        _seed_dropout(engine.device, seed)
        sums += engine.accumulate(piece, weights, last=number == work.num_pieces, enter=enter).detached()
    return sums


def _seed_dropout(device: torch.device, seed: int) -> None:
    """What `torch.manual_seed` does for `device`, without half a millisecond in which it asks for back ends that are not there."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)


def dropout_seed(seed: int, micro_batch: int, piece: int) -> int:
    """Seed of dropout in one piece of a micro-batch."""
    return int(mix64(_DROPOUT, seed, micro_batch, piece)) >> 1


class Validation:
    """Held-out losses: the same micro-batches of the validation split each time, whatever the number of ranks."""

    def __init__(self, corpora: Mixture, config: RunConfig, rank: int, world_size: int) -> None:
        self._corpora = corpora
        self._config = config
        self._rank = rank
        self._world_size = world_size
        self._shape: tuple[int, ...] = ()
        self._part: StepPart | None = None

    def measure(self, engine: Engine, phase: Phase, state: TrainState, go_on: Callable[[], None]) -> "tuple[StepLosses, list[SkippedBlock]]":
        """Mean losses and accuracies over the validation micro-batches, in the shape of `phase`, without dropout; and the damaged blocks
        that were left out and that `state` does not know yet. `go_on` is called before each: a long validation is no hang.

        Raises:
            MaskwrightError: a rank could not read its part.
        """
        go_on()
        part = self._read(phase)
        counts = StepCounts.of(part.batches, part.first_position, failed=part.error is not None).total(engine.device)
        if counts.failures:
            raise_together(part.error, "read the validation data")
        sums = torch.zeros(4, dtype=torch.float64, device=engine.device)
        for batch in _padded(part, empty_micro_batch(self._corpora.vocabulary)):
            go_on()
            sums += engine.evaluate(tensor_batches(batch)[0].to(engine.device)).detached()
        losses = StepLosses.total(sums, counts, engine.device)
        return losses, newly_skipped(part.batches, counts, state)

    def _read(self, phase: Phase) -> StepPart:
        """This rank's part, kept while the shape of micro-batches stays the same."""
        shape = (phase.sequence_length, phase.micro_batch_size)
        if self._part is None or self._part.error is not None or self._shape != shape:
            stream = self._stream(phase)
            self._part = next(read_steps(stream, stream.phases, first_step=0, rank=self._rank, world_size=self._world_size, workers=0))
            self._shape = shape
        return self._part

    def _stream(self, phase: Phase) -> MicroBatchStream:
        """The validation split as the one step of a run of its own, with as many micro-batches as there are and as are wanted."""
        config, alone = self._config, phase.model_copy(update={"first_step": 0, "num_steps": 1, "first_micro_batch": 0})
        whole = MicroBatchStream(self._corpora, config.objective, (alone,), config.seed, "validation", config.batch.row_packing)
        num_micro_batches = min(config.validation.micro_batches, whole.num_validation_micro_batches)
        part = alone.model_copy(update={"num_micro_batches": num_micro_batches})
        return MicroBatchStream(self._corpora, config.objective, (part,), config.seed, "validation", config.batch.row_packing)


def _padded(part: StepPart, empty: "MicroBatch") -> "list[MicroBatch]":
    return part.batches + [empty] * (part.num_passes - len(part.batches))
