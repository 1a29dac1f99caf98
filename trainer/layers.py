"""Layers of transformers in a form that a device likes better: the same parameters under the same names, computed in another way."""

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from trainer.dimensions import ALIGNED_ROWS

_SAME_SIZE = {torch.bfloat16: torch.int16, torch.float32: torch.int32}


class AlignedLinear(nn.Linear):
    """A projection to a vocabulary, on a GPU in 16 bits for a few tokens more: its rows are to be a multiple of `ALIGNED_ROWS`."""

    def forward(self, input: Tensor) -> Tensor:
        """(…, D) → (…, V)"""
        missing = -self.out_features % ALIGNED_ROWS
        if not missing or input.device.type != "cuda" or input.dtype == torch.float32:
            return super().forward(input)
        own = cast("Tensor | None", self.bias)
        bias = None if own is None else functional.pad(own, (0, missing))
        return functional.linear(input, functional.pad(self.weight, (0, 0, 0, missing)), bias)[..., : self.out_features]


def align_projection(network: nn.Module) -> None:
    """Let the projection to the vocabulary of a network of transformers compute as `AlignedLinear`; its parameters stay as they are."""
    projection: Any = cast(Any, network).get_output_embeddings()
    if type(projection) is nn.Linear:
        projection.__class__ = AlignedLinear


class DrawnDropout(nn.Dropout):
    """Dropout as `drop` computes it."""

    def forward(self, input: Tensor) -> Tensor:
        """Of any shape; as it is in evaluation."""
        return drop(input, self.p) if self.training else input


def replace_dropout(network: nn.Module) -> None:
    """Let every `nn.Dropout` of a network compute as `DrawnDropout`."""
    for module in network.modules():
        if type(module) is nn.Dropout:
            module.__class__ = DrawnDropout


def drop(values: Tensor, probability: float) -> Tensor:
    """Dropout (Srivastava et al. 2014) of `values`, by torch's own generator of their device.

    torch draws a number of 53 bits for each value on a CPU, a tenth of the time of a training step; here 16 bits decide in bf16, 32 in fp32.
    """
    if probability == 0:
        return values
    if values.device.type == "cpu" and values.dtype in _SAME_SIZE:
        return values * _factors(values.detach(), probability)
    return functional.dropout(values, probability)


@torch.library.custom_op("maskwright::dropout_factors", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,))
def _factors(values: Tensor, probability: float) -> Tensor:
    """For each of `values` 0, or else 1 / (1 - probability): random bits, compared as whole numbers and made the bits of these factors in place."""
    bits, whole = 8 * values.element_size(), _SAME_SIZE[values.dtype]
    draws = torch.empty(-(-values.numel() * bits // 64), dtype=torch.int64).random_(-(1 << 63), None)
    dropped = min(round(probability * (1 << bits)), (1 << bits) - 1) - (1 << bits - 1)
    kept = torch.tensor(1 / (1 - probability), dtype=values.dtype).view(whole)
    return draws.view(whole)[: values.numel()].view(values.shape).ge_(dropped).mul_(kept).view(values.dtype)


@_factors.register_fake
def _(values: Tensor, probability: float) -> Tensor:
    del probability
    return values.new_empty(values.shape)
