"""What the training benchmarks measure on: networks, shapes of batches, and the precisions of this processor."""

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from benchmarks.harness import Options


@dataclass(frozen=True)
class Network:
    """A network by its dimensions; a BERT unless something else is said."""

    layers: int
    width: int
    heads: int
    vocab_size: int = 30522
    architecture: str = "bert"

    @property
    def name(self) -> str:
        """Layers and width, as the goals name it."""
        return f"{self.layers}L/{self.width}"

    def section(self, length: int, dropout: float) -> dict[str, Any]:
        """`model` of a run.yaml."""
        dimensions = {"num_layers": self.layers, "hidden_size": self.width, "num_heads": self.heads}
        return {"architecture": self.architecture, **dimensions, "max_positions": max(512, length), "dropout": dropout}

    @property
    def objective(self) -> dict[str, Any]:
        """`objective` of a run.yaml: pairs of sentences are BERT's alone."""
        return {"bert": {}, "gpt2": {"kind": "clm"}}.get(self.architecture, {"sentence_objective": "none"})

    def bert(self, dropout: float) -> dict[str, Any]:
        """Arguments of transformers' BertConfig; everything else at its default."""
        dimensions = {"num_hidden_layers": self.layers, "hidden_size": self.width, "num_attention_heads": self.heads}
        dropouts = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
        return {**dimensions, **dropouts, "intermediate_size": 4 * self.width, "vocab_size": self.vocab_size}


@dataclass(frozen=True)
class Shape:
    """Micro-batches of generated tokens: the same for whoever makes them."""

    samples: int
    length: int
    """Longest row; one sample of each micro-batch has it."""
    fill: float = 1.0
    """Mean length of the samples as a share of `length`."""
    packing: Literal["none", "rows"] = "none"
    count: int = 4
    """Different micro-batches, which take turns."""


@dataclass(frozen=True)
class Work:
    """What one rank trains: steps of `accumulation` micro-batches."""

    network: Network
    shape: Shape
    accumulation: int = 1
    compiled: bool = False
    dropout: float = 0.1

    @property
    def name(self) -> str:
        """For people."""
        parts = [self.network.name, f"steps of {self.accumulation} x {self.shape.samples} x {self.shape.length}", f"dropout {self.dropout:g}"]
        return ", ".join([*parts, "compiled"] if self.compiled else parts)


SMALL, BASE, LARGE = Network(4, 256, 4), Network(12, 768, 12), Network(24, 1024, 16)
TINY = Network(2, 64, 2, vocab_size=1024)
"""For `--short`."""


def networks(options: "Options") -> tuple[Network, ...]:
    """The networks that goals are stated for; with --short one that trains at once."""
    return (TINY,) if options.short else (SMALL, BASE)


def seconds_of(network: Network, options: "Options") -> float:
    """Length of a measurement: a step of a large network takes seconds."""
    return options.seconds * (4 if network.layers >= BASE.layers else 1)


def arguments(network: Network, shape: Shape, **others: Any) -> dict[str, Any]:
    """As a contestant gets them: JSON."""
    return {"network": asdict(network), "shape": asdict(shape), **others}


def our_precision() -> str:
    """What `precision: auto` chooses on this machine."""
    import torch

    from trainer.choices import fastest_precision
    from trainer.engine import training_device

    torch.set_num_threads(1)
    return fastest_precision(training_device())


def emulates_bf16() -> bool:
    """Whether this processor computes bf16 without instructions for it, some fifty times slower than fp32."""
    import torch

    return not torch.cuda.is_available() and not torch.ops.mkldnn._is_mkldnn_bf16_supported()


NO_BF16 = "not measured: this processor has no instructions for bf16"
