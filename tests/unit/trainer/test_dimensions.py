"""What is said of a network without building it, against the network itself."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from trainer.architectures import new_network_config
from trainer.config import ModelConfig
from trainer.dimensions import KNOWN, Dimensions
from trainer.flops import StepFlops
from trainer.networks import network_class

TOKENIZER: Any = SimpleNamespace(pad_token_id=0, cls_token_id=1, sep_token_id=2)
SETTINGS: list[tuple[str, dict[str, Any]]] = [
    *((architecture, {}) for architecture in KNOWN),
    ("bert", {"type_vocab_size": 3}),
    ("bert", {"tie_word_embeddings": False}),
    ("modernbert", {"norm_bias": True, "attention_bias": True, "mlp_bias": True, "classifier_bias": True, "local_attention": 64}),
    ("modernbert", {"tie_word_embeddings": False, "decoder_bias": False}),
    ("gpt2", {"tie_word_embeddings": False}),
]


def built(config: ModelConfig, vocab_size: int) -> Any:
    """The network, without memory for its weights."""
    with torch.device("meta"):
        return network_class(config.architecture)(new_network_config(config, TOKENIZER, vocab_size))


@pytest.mark.parametrize(("architecture", "settings"), SETTINGS)
@pytest.mark.parametrize(("layers", "width", "heads", "inner"), [(5, 48, 4, 80), (2, 64, 2, None)])
def test_parameters_and_flops_are_those_of_the_network(
    architecture: str, settings: dict[str, Any], layers: int, width: int, heads: int, inner: int | None
) -> None:
    config = ModelConfig(
        architecture=architecture,
        num_layers=layers,
        hidden_size=width,
        num_heads=heads,
        intermediate_size=inner,
        max_positions=72,
        transformers=settings,
    )
    network = built(config, 1009)
    for found in (Dimensions.of(config, 1009), Dimensions.read(network.config.to_dict(), config.dropout)):
        assert found.parameters == sum(parameter.numel() for parameter in network.parameters())
        assert found.flops == StepFlops.of(network)


@pytest.mark.parametrize(("config", "vocab_size", "millions"), [(ModelConfig(), 30522, 110.1), (ModelConfig(architecture="gpt2"), 50257, 124.1)])
def test_published_sizes(config: ModelConfig, vocab_size: int, millions: float) -> None:
    config = config.model_copy(update={"max_positions": 1024 if config.architecture == "gpt2" else 512})
    assert Dimensions.of(config, vocab_size).parameters / 1e6 == pytest.approx(millions, abs=0.4)


def test_a_config_without_dimensions_is_told() -> None:
    with pytest.raises(KeyError, match="hidden_size"):
        Dimensions.read({"model_type": "bert", "vocab_size": 10}, 0.1)
