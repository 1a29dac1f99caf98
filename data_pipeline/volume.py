"""How much of its corpora a run reads: epochs and tokens (pure, but for the index that it is given)."""

from collections.abc import Sequence

from data_pipeline.config import Phase
from data_pipeline.mixture import HORIZON, Mixture


def epochs(mixture: Mixture, phases: Sequence[Phase]) -> list[float]:
    """How often each corpus of the mixture is gone through."""
    shares = [count / HORIZON for count in mixture.shares.counts]
    return [
        sum(share * _samples(phase) / max(1, index.num_samples("train", phase.sequence_length)) for phase in phases)
        for index, share in zip(mixture.indexes, shares, strict=True)
    ]


def tokens(mixture: Mixture, rounds: Sequence[float]) -> float:
    """About so many tokens of text are read in so many epochs of each corpus; special tokens come on top."""
    return sum(each * int(index.manifest["counts"]["train_tokens"]) for each, index in zip(rounds, mixture.indexes, strict=True))


def _samples(phase: Phase) -> int:
    return phase.num_steps * phase.num_micro_batches * phase.micro_batch_size
