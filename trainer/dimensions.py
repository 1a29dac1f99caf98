"""`Dimensions`: what can be said of a network without building it, its parameters, its multiply-adds and what a forward pass leaves (pure).

Exact for `bert`, `modernbert` and `gpt2`, of which nothing else is known here; tests hold it against the networks themselves.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from trainer.config import ModelConfig
from trainer.flops import StepFlops

KNOWN = ("bert", "modernbert", "gpt2")
ALIGNED_ROWS = 64
"""What GPUs want the rows of a matrix product in 16 bits to be a multiple of."""
MASKED_MULTIPLE = 16
"""Masked positions of a pass come in multiples of it: for each size of the products with the vocabulary a CPU makes kernels of its own, and keeps
them. Where every size occurred they took 220 MB after 400 steps of 4L/256 with 30,000 tokens."""
_NAMES = {"hidden_size": "n_embd", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head", "max_position_embeddings": "n_positions"}
"""What GPT-2 calls them."""
_FULL, _NEAR = "full_attention", "sliding_attention"


@dataclass(frozen=True)
class Dimensions:
    """A network of one of the known architectures."""

    architecture: str
    vocab_size: int
    num_layers: int
    hidden_size: int
    num_heads: int
    inner_size: int
    max_positions: int
    dropout: float
    settings: Mapping[str, Any]
    """Others of its configuration in transformers, where they are not at their defaults."""

    @classmethod
    def of(cls, config: ModelConfig, vocab_size: int) -> "Dimensions":
        """Those of a new network."""
        return cls(
            architecture=config.architecture,
            vocab_size=vocab_size,
            num_layers=config.num_layers,
            hidden_size=config.hidden_size,
            num_heads=config.num_heads,
            inner_size=config.inner_size,
            max_positions=config.max_positions,
            dropout=config.dropout,
            settings=config.transformers,
        )

    @classmethod
    def read(cls, config_json: Mapping[str, Any], dropout: float) -> "Dimensions":
        """Those of a network of transformers, from its config.json; its dropout is the run's.

        Raises:
            KeyError: it lacks a dimension.
        """
        found = {ours: config_json.get(theirs, config_json.get(ours)) for ours, theirs in _NAMES.items()}
        missing = [name for name, value in found.items() if value is None]
        if missing:
            raise KeyError(missing[0])
        inner = config_json.get("intermediate_size") or config_json.get("n_inner") or 4 * found["hidden_size"]
        return cls(
            architecture=config_json["model_type"],
            vocab_size=config_json["vocab_size"],
            num_layers=found["num_hidden_layers"],
            hidden_size=found["hidden_size"],
            num_heads=found["num_attention_heads"],
            inner_size=inner,
            max_positions=found["max_position_embeddings"],
            dropout=dropout,
            settings=config_json,
        )

    @property
    def embedding(self) -> int:
        """Elements of the table of tokens, the largest matrix of a small network."""
        return self.vocab_size * self.hidden_size

    @property
    def parameters(self) -> int:
        """All of them; a decoder that shares the table of tokens counts once."""
        untied = 0 if self.settings.get("tie_word_embeddings", True) else self.embedding
        return untied + {"bert": self._bert, "modernbert": self._modernbert, "gpt2": self._gpt2}[self.architecture]()

    @property
    def reaches(self) -> tuple[int | None, ...]:
        """Of each layer, how far a token looks to each side (None: as far as there is)."""
        if self.architecture != "modernbert":
            return (None,) * self.num_layers
        every = self.settings.get("global_attn_every_n_layers", 3)
        kinds = self.settings.get("layer_types") or [_NEAR if layer % every else _FULL for layer in range(self.num_layers)]
        return tuple(self.settings.get("local_attention", 128) // 2 if kind == _NEAR else None for kind in kinds)

    @property
    def flops(self) -> StepFlops:
        """The same as `StepFlops.of` the network."""
        width, inner = self.hidden_size, self.inner_size
        gates = 3 if self.architecture == "modernbert" else 2
        return StepFlops(
            per_token=self.num_layers * (4 * width**2 + gates * width * inner),
            per_prediction=self.embedding + (0 if self.architecture == "gpt2" else width**2),
            per_sample=width**2 + 2 * width if self.architecture == "bert" else 0,
            attention=tuple((width, reach) for reach in self.reaches),
            is_causal=self.architecture == "gpt2",
        )

    def _bert(self) -> int:
        width, inner = self.hidden_size, self.inner_size
        embeddings = self.embedding + (self.max_positions + self.settings.get("type_vocab_size", 2)) * width + 2 * width
        layer = 4 * _linear(width, width) + _linear(width, inner) + _linear(inner, width) + 4 * width
        transform, pooler, pairs = _linear(width, width) + 2 * width, _linear(width, width), _linear(width, 2)
        biases = self.vocab_size * (1 if self.settings.get("tie_word_embeddings", True) else 2)
        return embeddings + self.num_layers * layer + transform + pooler + pairs + biases

    def _modernbert(self) -> int:
        width, inner, has = self.hidden_size, self.inner_size, self.settings.get
        norm = width * (2 if has("norm_bias", False) else 1)
        attention = _linear(width, 3 * width, bias=has("attention_bias", False)) + _linear(width, width, bias=has("attention_bias", False))
        gated = _linear(width, 2 * inner, bias=has("mlp_bias", False)) + _linear(inner, width, bias=has("mlp_bias", False))
        head = _linear(width, width, bias=has("classifier_bias", False)) + norm + (self.vocab_size if has("decoder_bias", True) else 0)
        norms = 2 * self.num_layers + 1  # one for the embeddings and one at the end, none before the first attention
        return self.embedding + self.num_layers * (attention + gated) + norms * norm + head

    def _gpt2(self) -> int:
        width, inner = self.hidden_size, self.inner_size
        layer = _linear(width, 3 * width) + _linear(width, width) + _linear(width, inner) + _linear(inner, width) + 4 * width
        return self.embedding + self.max_positions * width + self.num_layers * layer + 2 * width


def _linear(inputs: int, outputs: int, *, bias: bool = True) -> int:
    return inputs * outputs + (outputs if bias else 0)
