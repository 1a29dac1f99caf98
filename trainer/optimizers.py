"""The optimizer of a run, by `optimizer.kind`. All of them keep AdamW's state, so checkpoints know nothing of the difference."""

import importlib
from typing import Any

import torch
from torch import nn

from trainer.config import OptimizerConfig
from trainer.lamb import Lamb


def parameter_groups(model: nn.Module, config: OptimizerConfig) -> list[dict[str, Any]]:
    """The optimizer's two groups: matrices with weight decay; biases and layer norms without."""
    decayed = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    others = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    shared: dict[str, Any] = {"lr": config.lr, "betas": config.betas, "eps": config.eps}
    return [{"params": decayed, "weight_decay": config.weight_decay, **shared}, {"params": others, "weight_decay": 0.0, **shared}]


def build_optimizer(model: nn.Module, config: OptimizerConfig, *, deepspeeds_own: bool) -> torch.optim.Optimizer:
    """The optimizer of `model`; `deepspeeds_own` is for state that the raw block offloads, of which DeepSpeed insists on an Adam of its own."""
    groups = parameter_groups(model, config)
    if config.kind == "lamb":
        groups[1]["trust_ratio"] = False  # as in the paper's own code: a bias or layer norm says nothing about the length of its update
        return Lamb(groups, lr=config.lr)
    if deepspeeds_own:
        return importlib.import_module("deepspeed.ops.adam").DeepSpeedCPUAdam(groups, lr=config.lr, adamw_mode=True)
    return torch.optim.AdamW(groups, lr=config.lr, fused=True)
