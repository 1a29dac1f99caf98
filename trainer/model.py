"""Builds the network: fresh weights under a seed, or those of `model.init_from` where they fit the tokenizer and the objective."""

from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, PreTrainedTokenizerBase

from data_pipeline.errors import ConfigError, MaskwrightError, NotFoundError, UnreachableError
from trainer.architectures import longest_row, new_network_config, require_architecture, with_dropout
from trainer.attention import usual_kernel
from trainer.config import ModelConfig, RunConfig
from trainer.layers import align_projection, replace_dropout, replace_gelu
from trainer.networks import PretrainingMaskedLM, PretrainingNetwork, network_class


def build_model(
    config: ModelConfig, tokenizer_folder: str, *, seed: int, sequence_length: int, device: torch.device, reentrant_checkpointing: bool = False
) -> PretrainingNetwork:
    """The network in fp32 on the CPU, in training mode: initialised under `seed`, or with the weights of `init_from`.

    `sequence_length` is the longest row it will see. Leaves torch's random state as it was.

    Raises:
        ConfigError: there is no such architecture, or `init_from` does not fit it, the tokenizer or the sequence length.
        NotFoundError: `init_from` is not there.
        UnreachableError: the hub cannot be reached.
    """
    from data_pipeline.tokenizer import load_tokenizer, vocabulary_of

    tokenizer = load_tokenizer(tokenizer_folder)
    vocab_size = vocabulary_of(tokenizer).size  # not len(tokenizer): ids may have gaps
    attention = usual_kernel(device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if config.init_from is None:
            model = _new_network(config, tokenizer, vocab_size, attention)
        else:
            model = _load_weights(config, config.init_from, tokenizer, vocab_size, sequence_length, attention)
            require_same_vocabulary(config.init_from, tokenizer)
    align_projection(model, ends=not isinstance(model, PretrainingMaskedLM))  # the heads of others may add a bias of their own
    replace_dropout(model)
    replace_gelu(model)
    if isinstance(model, PretrainingMaskedLM):
        _require_rows(model, sequence_length, cast(int, tokenizer.cls_token_id))
    if config.activation_checkpointing:
        # ZeRO-3 frees parameters after the forward pass; only the re-entrant kind gathers them again before it recomputes.
        enable: Any = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": reentrant_checkpointing})
    return cast(PretrainingNetwork, model.train())


def require_buildable(config: RunConfig) -> None:
    """Refuse, before any text is prepared, what would be when the network is built and reads its first batch.

    Raises:
        ConfigError: the architecture is not known, or lacks a setting; or the tokenizer to be loaded has no mask token, and the objective needs one.
    """
    from data_pipeline.tokenizer import load_tokenizer

    if config.model.init_from is None and (config.model.architecture != "bert" or config.model.transformers):
        network_class(config.model.architecture)
        require_architecture(config.model)
    if config.objective.kind == "mlm" and config.tokenizer.path is not None and load_tokenizer(config.tokenizer.path).mask_token_id is None:
        raise ConfigError(
            f"tokenizer.path {config.tokenizer.path} has no mask token", "Choose a tokenizer made for masked language models, or `objective: clm`."
        )


def _new_network(config: ModelConfig, tokenizer: PreTrainedTokenizerBase, vocab_size: int, attention: str) -> PretrainingNetwork:
    kind, network_config = network_class(config.architecture), new_network_config(config, tokenizer, vocab_size)
    network_config._attn_implementation = _kernel(kind, attention)
    return kind(network_config)


def _kernel(kind: Any, attention: str) -> str:
    return attention if kind._supports_sdpa else "eager"


def _require_rows(network: PretrainingNetwork, sequence_length: int, token: int) -> None:
    """Refuse a network that cannot take rows of `sequence_length`. Of architectures that are not known here a dry run alone tells."""
    ids_1T = torch.full((1, sequence_length), token)
    try:
        with torch.no_grad():
            network.eval().logits(ids_1T, torch.zeros_like(ids_1T), torch.ones_like(ids_1T))
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
        raise ConfigError(
            f"a row of {sequence_length} tokens does not pass through {network.config.model_type}: {_first_line(error)}",
            "Choose a shorter batch.sequence_length, raise model.max_positions (of a new model), or choose another model.architecture.",
        ) from error


def _load_weights(
    config: ModelConfig, source: str, tokenizer: PreTrainedTokenizerBase, vocab_size: int, sequence_length: int, attention: str
) -> PretrainingNetwork:
    found = _read_config(source)
    if found.model_type != config.architecture:
        raise ConfigError(
            f"model.init_from {source} is a {found.model_type} model; expected {config.architecture}",
            f"Set model.architecture to {found.model_type}, or choose another folder or hub id.",
        )
    if found.vocab_size < vocab_size:  # more is padding, which GPUs like; `require_same_vocabulary` looks at the tokens
        raise ConfigError(
            f"model.init_from {source} has a vocabulary of {found.vocab_size}; the corpus' tokenizer has {vocab_size}",
            "Prepare the corpus with the model's own tokenizer: set tokenizer.path to the same folder or hub id.",
        )
    if longest_row(found) < sequence_length:
        raise ConfigError(
            f"batch.sequence_length {sequence_length} exceeds the {longest_row(found)} positions of model.init_from {source}",
            "Choose a shorter sequence_length.",
        )
    if found.pad_token_id is None:  # as of GPT-2 on the hub: a classifier made of the model needs one
        found.pad_token_id = tokenizer.pad_token_id
    kind = network_class(found.model_type)
    try:
        return kind.from_pretrained(
            source,
            config=with_dropout(found, config.dropout),
            dtype=torch.float32,
            use_safetensors=True,
            trust_remote_code=False,
            attn_implementation=_kernel(kind, attention),
        )
    except (OSError, SafetensorError) as error:
        raise ConfigError(
            f"model.init_from {source} holds no model.safetensors that can be read: {_first_line(error)}",
            "Weights are read from safetensors only; convert the model with save_pretrained(..., safe_serialization=True).",
        ) from error


def require_same_vocabulary(source: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a model that was trained on other tokens than `tokenizer`'s, however many. One that comes without a tokenizer cannot be told.

    Raises:
        ConfigError: a token has another id.
    """
    from data_pipeline.tokenizer import load_tokenizer

    folder = Path(source)
    if folder.is_dir() and not any((folder / name).exists() for name in ("tokenizer.json", "vocab.txt")):
        return  # transformers would make up a tokenizer of special tokens alone
    try:
        theirs = load_tokenizer(source).get_vocab()
    except MaskwrightError:
        return
    ours = tokenizer.get_vocab()
    different = [token for token, number in ours.items() if theirs.get(token) != number]
    if different:
        raise ConfigError(
            f"model.init_from {source} has another vocabulary than the corpus' tokenizer: {len(different)} of {len(ours)} tokens differ",
            "Prepare the corpus with the model's own tokenizer: set tokenizer.path to the same folder or hub id.",
        )


def _read_config(source: str) -> Any:
    if not Path(source).expanduser().exists() and _looks_like_a_path(source):
        raise NotFoundError(f"model.init_from {source} does not exist", "Check the path.")
    try:
        return AutoConfig.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError) as error:
        if isinstance(error, ValueError) or Path(source).expanduser().exists():
            cause = f"model.init_from {source} is not a model that transformers knows: {_first_line(error)}"
            raise ConfigError(cause, "It needs the config.json of a masked language model, or of GPT-2.") from error
        raise UnreachableError(
            f"model.init_from {source} is not a folder, and the hub did not deliver it: {_first_line(error)}",
            "Check the name and the network, or download the model and give its folder.",
        ) from error


def _looks_like_a_path(source: str) -> bool:
    return source.startswith(("/", ".", "~")) or source.count("/") != 1


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
