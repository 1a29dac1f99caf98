"""Useful floating-point operations of a step: what its real tokens need, padding and recomputation left out (pure;
torch only to look at a network)."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from trainer.networks import PretrainingNetwork

_POOLED = ("pooler", "seq_relationship")


class Counts(Protocol):
    """What a step holds: measured (`trainer.totals.StepCounts`), or expected."""

    @property
    def tokens(self) -> float:
        """Of all samples."""
        ...

    @property
    def masked(self) -> float:
        """Tokens to be predicted."""
        ...

    @property
    def samples(self) -> float: ...

    @property
    def squared_lengths(self) -> float:
        """Sum over the samples."""
        ...


@dataclass(frozen=True)
class StepFlops:
    """Multiply-adds of a forward pass by what they are done for; `of_step` counts two operations each, and the backward pass twice."""

    per_token: int
    """Weights of the encoder's matrices."""
    per_prediction: int
    """Weights of the head over the vocabulary, which is needed only where something is predicted."""
    per_sample: int
    """Weights of the pooler and the head for pairs."""
    attention: tuple[tuple[int, int | None], ...]
    """Of each layer its width, and how far a token looks to each side (None: as far as there is)."""
    is_causal: bool

    @classmethod
    def of(cls, network: "PretrainingNetwork") -> "StepFlops":
        """Those of a network, partitioned or not."""
        from torch import nn
        from transformers.pytorch_utils import Conv1D

        whole: Any = network
        encoder = {id(module) for module in whole.base_model.modules()}
        sizes = {"token": 0, "prediction": 0, "sample": 0}
        for name, module in network.named_modules():
            if isinstance(module, nn.Linear | Conv1D):
                is_pooled = any(part in _POOLED for part in name.split("."))
                sizes["sample" if is_pooled else "token" if id(module) in encoder else "prediction"] += _numel(module.weight)
        return cls(sizes["token"], sizes["prediction"], sizes["sample"], _attention(network.config), network.is_causal)

    def of_step(self, counts: Counts) -> float:
        """Operations of a step's global batch, forward and backward.

        A token of a sample of T attends to T places, half of them in a causal network: 2 T D multiply-adds a layer.
        """
        linear = counts.tokens * self.per_token + counts.masked * self.per_prediction + counts.samples * self.per_sample
        attended = sum(2 * width * _places(counts, reach) for width, reach in self.attention)
        return 3.0 * 2.0 * (linear + attended / (2 if self.is_causal else 1))


def _places(counts: Counts, reach: int | None) -> float:
    """Places that the tokens of a step attend to in a layer, all together."""
    return counts.squared_lengths if reach is None else min(counts.squared_lengths, counts.tokens * (2 * reach + 1))


def _attention(config: Any) -> tuple[tuple[int, int | None], ...]:
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    return tuple((config.hidden_size, config.sliding_window if kind == "sliding_attention" else None) for kind in kinds)


def _numel(parameter: Any) -> int:
    return int(getattr(parameter, "ds_numel", parameter.numel()))  # under ZeRO-3 a parameter holds nothing until it is gathered
