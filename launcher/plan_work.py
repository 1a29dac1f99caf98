"""What a run has to compute: tokens and passes of each phase, and what world sizes make of them (pure)."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from data_pipeline.config import ObjectiveConfig, Phase
from data_pipeline.mixture import Mixture
from data_pipeline.order import micro_steps
from trainer.flops import StepFlops


@dataclass(frozen=True)
class MeanSample:
    """A sample of the corpus at a sequence length, on average."""

    num_tokens: float
    """Special tokens included."""
    is_bound: bool
    """Whether nothing is known of the corpus, and this is what fits a row."""


@dataclass(frozen=True)
class PhaseWork:
    """A phase's optimizer steps. Its counts are those of a step, as `trainer.flops` wants them."""

    phase: Phase
    samples: float
    tokens: float
    masked: float
    squared_lengths: float
    """At most: samples of unequal lengths have between the square of their mean and the mean times the longest."""
    is_bound: bool
    """Whether the samples are those of full rows, for want of a corpus."""

    @classmethod
    def of(cls, phase: Phase, sample: MeanSample, objective: ObjectiveConfig) -> "PhaseWork":
        """A step of `phase` over samples like this."""
        samples = phase.num_micro_batches * phase.micro_batch_size
        tokens = samples * sample.num_tokens
        masked = tokens - samples if objective.kind == "clm" else objective.mask_rate * (tokens - special_tokens(objective) * samples)
        return cls(phase, samples, tokens, masked, tokens * phase.sequence_length, sample.is_bound)

    def flops_of_step(self, network: StepFlops) -> float:
        """Useful operations of a step."""
        return network.of_step(self)

    def flops_of_round(self, network: StepFlops) -> float:
        """Of a micro-batch: what a rank does between two of its micro-steps."""
        return network.of_step(self) / self.phase.num_micro_batches


def mean_sample(mixture: Mixture | None, sequence_length: int, objective: ObjectiveConfig) -> MeanSample:
    """A sample of the corpora on average, by weight; without them what fits a row."""
    if mixture is None or any(sequence_length not in index.sequence_lengths for index in mixture.indexes):
        return MeanSample(sequence_length, is_bound=True)
    means = [int(index.manifest["counts"]["train_tokens"]) / max(1, index.num_samples("train", sequence_length)) for index in mixture.indexes]
    text = sum(mean * weight for mean, weight in zip(means, mixture.weights, strict=True)) / sum(mixture.weights)
    return MeanSample(min(float(sequence_length), text + special_tokens(objective)), is_bound=False)


def special_tokens(objective: ObjectiveConfig) -> int:
    """Of a sample: [CLS], and [SEP] behind each segment."""
    return 2 if objective.sentence_objective == "none" else 3


def total_tokens(work: Sequence[PhaseWork]) -> int:
    """Of the whole run."""
    return round(sum(part.tokens * part.phase.num_steps for part in work))


@dataclass(frozen=True)
class WorldSize:
    """So many ranks."""

    world_size: int
    micro_steps: int
    """Of a rank, in a step of the largest global batch."""
    waste: float
    """Share of all ranks' micro-steps that are empty (D5), over the whole run."""

    def to_json(self) -> dict[str, Any]:
        """JSON object."""
        return asdict(self)


def world_size_of(num_ranks: int, phases: Sequence[Phase]) -> WorldSize:
    """What `num_ranks` make of the phases: each step of M micro-batches takes a rank ⌈M/W⌉ micro-steps."""
    done = sum(phase.num_steps * phase.num_micro_batches for phase in phases)
    taken = num_ranks * sum(phase.num_steps * micro_steps(phase.num_micro_batches, num_ranks) for phase in phases)
    largest = max(phase.num_micro_batches for phase in phases)
    return WorldSize(num_ranks, micro_steps(largest, num_ranks), 1 - done / taken)


def world_sizes(phases: Sequence[Phase], chosen: int) -> list[WorldSize]:
    """Those that make some step shorter than all smaller ones do, and the chosen one; about 2 √M of M."""
    largest = max(phase.num_micro_batches for phase in phases)
    sizes = {chosen} if chosen <= largest else set[int]()
    for count in {phase.num_micro_batches for phase in phases}:
        sizes |= {math.ceil(count / rounds) for rounds in range(1, count + 1)}  # the fewest ranks that do it in so many rounds
    return [world_size_of(size, phases) for size in sorted(sizes)]
