"""Sequence classifiers as transformers networks: made from an exported model, written as a model folder, read back (no collective calls)."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from data_pipeline.errors import ConfigError, NotFoundError
from data_pipeline.storage import Location
from data_pipeline.tokenizer import load_tokenizer
from trainer.finetune_results import Init
from trainer.layers import replace_dropout
from trainer.model_folder import publish
from trainer.quiet import quiet_transformers

DEFAULT_MAX_LENGTH = 128


def build_classifier(model_folder: str, label_names: Sequence[str], init: Init, seed: int) -> nn.Module:
    """The encoder of `model_folder`, or with `init` "scratch" the same network with fresh weights, under a new classification head.

    New weights are drawn from `seed`. Weights are fp32. Attention is the plain kind, which is as fast as any at these lengths.

    Raises:
        ConfigError: the model has no model.safetensors: pickled weights are not read.
    """
    from transformers import AutoConfig, AutoModelForSequenceClassification

    labels: dict[str, Any] = {"id2label": dict(enumerate(label_names)), "label2id": {name: number for number, name in enumerate(label_names)}}
    config: Any = AutoConfig.from_pretrained(model_folder, trust_remote_code=False, num_labels=len(label_names), **labels)
    if getattr(config, "pad_token_id", None) is None:  # a classifier that looks at the last token must know what comes after it
        config.pad_token_id = load_tokenizer(model_folder).pad_token_id
    with torch.random.fork_rng(), quiet_transformers():
        torch.manual_seed(seed)
        if init == "scratch":
            network = AutoModelForSequenceClassification.from_config(config, trust_remote_code=False, attn_implementation="eager")
        else:
            network = load_weights(AutoModelForSequenceClassification, model_folder, config=config, attn_implementation="eager")
    replace_dropout(network)
    return network.float().train()


def save_classifier(network: Any, model_folder: str, lineage: dict[str, Any], destination: Location) -> None:
    """Write a classifier with the tokenizer of `model_folder` and its lineage.json to `destination`, replacing what is there."""
    partial = destination.path.with_name(f"{destination.name}.partial") if destination.is_local else Path(model_folder) / "classifier"
    shutil.rmtree(partial, ignore_errors=True)
    with quiet_transformers():
        network.save_pretrained(partial)
        load_tokenizer(model_folder).save_pretrained(partial)
    (Location.at(partial) / "lineage.json").write_json(lineage)
    publish(partial, destination)


def load_classifier(folder: str, label_names: tuple[str, ...], task_name: str) -> nn.Module:
    """A classifier's model folder whose labels are `label_names`, in fp32.

    Raises:
        NotFoundError: it is not a model folder.
        ConfigError: it is no classifier, has other labels, or no model.safetensors.
    """
    from transformers import AutoConfig, AutoModelForSequenceClassification

    try:
        config: Any = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise NotFoundError(
            f"{folder} is not a model folder: {error}", "Name the folder of a classifier, such as <run>/finetune/<task>/model."
        ) from error
    if not any(name.endswith("ForSequenceClassification") for name in config.architectures or ()):
        raise ConfigError(
            f"{folder} holds {', '.join(config.architectures or ['no known model'])}, which is not a classifier",
            "Run `maskwright finetune` first and evaluate <run>/finetune/<task>/model.",
        )
    names = tuple(str(config.id2label[number]) for number in range(config.num_labels))
    if names != label_names:
        raise ConfigError(
            f"the model's labels are {', '.join(names)}; task {task_name} has {', '.join(label_names)}", "Evaluate on the model's own task."
        )
    return load_weights(AutoModelForSequenceClassification, folder, attn_implementation="eager")  # as it was scored: a tie falls alike


def load_weights(auto_class: Any, folder: str, **settings: Any) -> Any:
    """`auto_class.from_pretrained` of a local folder: fp32, from safetensors only, no code of the folder's.

    Raises:
        ConfigError: there is no model.safetensors, or it is damaged.
    """
    try:
        with quiet_transformers():
            return auto_class.from_pretrained(folder, trust_remote_code=False, use_safetensors=True, dtype=torch.float32, **settings)
    except (OSError, SafetensorError) as error:
        raise ConfigError(
            f"{folder} has no readable model.safetensors: {str(error).strip().partition(chr(10))[0]}",
            "Weights are read from safetensors only: export the run again, or convert the model with save_pretrained.",
        ) from error


def trained_max_length(folder: str) -> int:
    """The longest row, in tokens, that a classifier was trained with."""
    lineage = Location.at(folder) / "lineage.json"
    return int(lineage.read_json().get("max_length", DEFAULT_MAX_LENGTH)) if lineage.exists() else DEFAULT_MAX_LENGTH
