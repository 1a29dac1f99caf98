"""The transformers configuration of a new network, from `ModelConfig` and a vocabulary (pure)."""

import difflib
from typing import Any

from transformers import AutoConfig, PreTrainedTokenizerBase

from data_pipeline.errors import ConfigError
from trainer.config import ModelConfig

_DIMENSIONS = {
    "hidden_size": "hidden_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "max_position_embeddings": "max_positions",
}
"""Names of transformers, which all its architectures know, and ours."""
_INNER = ("intermediate_size", "n_inner", "hidden_dim", "ffn_dim")
_DROPOUTS = (
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "resid_pdrop",
    "embd_pdrop",
    "attn_pdrop",
    "dropout",
    "attention_dropout",
    "embedding_dropout",
    "mlp_dropout",
)
"""What architectures call the dropout of hidden states and of attention probabilities."""
_COUNT_FROM_PAD = {
    *("roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "camembert", "mpnet"),
    *("longformer", "ibert", "data2vec-text", "luke", "mluke", "lilt", "esm", "xmod"),
}
"""Architectures whose positions begin after the id of the padding token."""
_USUAL_ROW = 512
_NOT_SETTINGS = {"architectures", "dtype", "model_type", "torch_dtype", "transformers_version"}


def new_network_config(config: ModelConfig, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> Any:
    """A `PretrainedConfig` of `config.architecture` with the dimensions of `config` and the special tokens of `tokenizer`.

    Raises:
        ConfigError: the architecture lacks a dimension, or does not know a key of `config.transformers`.
    """
    plain = require_architecture(config)
    settings = _derived(config, plain, vocab_size)
    settings |= {name: int(getattr(tokenizer, f"{role}_token_id")) for name, role in _special_tokens(config.architecture, plain).items()}
    settings["max_position_embeddings"] += _unused_positions(config.architecture, settings["pad_token_id"])
    return AutoConfig.for_model(config.architecture, **settings, **config.transformers)


def require_architecture(config: ModelConfig) -> Any:
    """The plain configuration of the architecture, a known one, if it has the dimensions and the keys that `config` gives it.

    Raises:
        ConfigError: it lacks one; or a key of `config.transformers` is derived from others, under whatever name.
    """
    plain: Any = AutoConfig.for_model(config.architecture)
    aliases: dict[str, str] = plain.attribute_map
    derived = _derived(config, plain, 0).keys() | _special_tokens(config.architecture, plain).keys()
    taken, known = {aliases.get(name, name) for name in derived}, plain.to_dict().keys() - _NOT_SETTINGS
    for key in config.transformers:
        if aliases.get(key, key) in taken:
            raise ConfigError(f"model.transformers.{key} is derived and cannot be set", "Set the dimensions of `model`, or the tokenizer.")
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            raise ConfigError(
                f"model.transformers.{key}: {config.architecture} has no such setting" + (f"; nearest: {near[0]}" if near else ""),
                f"See {type(plain).__name__} in the documentation of transformers.",
            )
    return plain


def with_dropout(network_config: Any, dropout: float) -> Any:
    """`network_config`, changed to drop out hidden states and attention probabilities with probability `dropout`."""
    for name in _DROPOUTS:
        if hasattr(network_config, name):
            setattr(network_config, name, dropout)
    return network_config


def longest_row(network_config: Any) -> int:
    """Tokens of the longest row that a network with this configuration takes; 512 where it does not say."""
    longest = getattr(network_config, "max_position_embeddings", None) or _USUAL_ROW
    return int(longest) - _unused_positions(network_config.model_type, getattr(network_config, "pad_token_id", None))


def _unused_positions(architecture: str, pad_token_id: int | None) -> int:
    return (pad_token_id or 0) + 1 if architecture in _COUNT_FROM_PAD else 0


def _derived(config: ModelConfig, plain: Any, vocab_size: int) -> dict[str, Any]:
    missing = [ours for theirs, ours in _DIMENSIONS.items() if not hasattr(plain, theirs)]
    if missing:
        raise ConfigError(f"model.{missing[0]}: {config.architecture} has no such dimension", "Choose another model.architecture.")
    settings = {theirs: getattr(config, ours) for theirs, ours in _DIMENSIONS.items()}
    settings |= {name: config.inner_size for name in _INNER if hasattr(plain, name)}
    settings |= {name: config.dropout for name in _DROPOUTS if hasattr(plain, name)}
    if hasattr(plain, "initializer_range"):
        settings["initializer_range"] = config.initializer_range
    return settings | {"vocab_size": vocab_size}


def _special_tokens(architecture: str, plain: Any) -> dict[str, str]:
    """Roles of a tokenizer's tokens by the names of ids in transformers. Texts begin with [CLS] and end with [SEP], which a causal model calls their
    begin and end."""
    roles = {"pad": "pad"} if architecture == "bert" else {"pad": "pad", "bos": "cls", "eos": "sep", "cls": "cls", "sep": "sep"}
    return {f"{theirs}_token_id": ours for theirs, ours in roles.items() if hasattr(plain, f"{theirs}_token_id")}
