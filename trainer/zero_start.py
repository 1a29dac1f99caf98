"""What DeepSpeed leaves wrong in an engine that it has just built, put right before the first step (imports nothing of it)."""

from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from data_pipeline.errors import EnvironmentMismatchError


def correct_start(engine: Any, stage: int, precision: str) -> None:
    """Make a freshly built DeepSpeed engine begin like those of other stages, with the same bits each time.

    Raises:
        EnvironmentMismatchError: torch is too old for 16 bits at stage 0.
    """
    if stage == 0 and precision != "fp32":
        _make_stage_0_like_the_others(engine)
    if stage == 3:
        _clear_padding(engine.optimizer, dist.get_rank())


def _make_stage_0_like_the_others(engine: Any) -> None:
    """Undo two habits of the optimizer that DeepSpeed takes for 16-bit weights at stage 0.

    While it is built it steps once on zero gradients: AdamW counts a step and decays the weights. And it accumulates gradients in
    16 bits; `grad_dtype` makes autograd accumulate them in fp32, which it then uses without a copy.
    """
    if not hasattr(nn.Parameter, "grad_dtype"):  # setting it would do nothing, and the sums would silently be 16-bit
        raise EnvironmentMismatchError(
            f"torch {torch.__version__} cannot accumulate gradients in fp32 for 16-bit weights at ZeRO stage 0",
            "Set zero.stage to 1, or upgrade torch.",
        )
    engine.optimizer.state.clear()
    engine.optimizer.refresh_fp32_params()
    for parameter in engine.module.parameters():
        parameter.grad_dtype = torch.float32


def _clear_padding(optimizer: Any, rank: int) -> None:
    """Stage 3 pads parts of parameters with whatever is in memory, and saves it: the same weights would have other files each time."""
    for group, master in zip(optimizer.fp16_groups, optimizer.fp32_partitioned_groups_flat, strict=True):
        offset = 0
        for parameter in group:
            part = parameter.ds_tensor.ds_numel
            own = min(part, max(0, parameter.ds_numel - rank * part))
            for values in (parameter.ds_tensor.data, master.data[offset : offset + part]):
                values.view(-1)[own:] = 0
            offset += part
