"""Layers of transformers in a form that a device likes better: the same parameters under the same names, computed in another way."""

import math
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.activations import GELUActivation

from trainer.dimensions import ALIGNED_ROWS

_SAME_SIZE = {torch.bfloat16: torch.int16, torch.float32: torch.int32}


class AlignedLinear(nn.Linear):
    """A projection to a vocabulary, on a GPU in 16 bits as `project_aligned` computes it."""

    def forward(self, input: Tensor) -> Tensor:
        """(…, D) → (…, V), or more than V"""
        if not _is_for_tensor_cores(input):
            return super().forward(input)
        return project_aligned(input, self.weight, cast("Tensor | None", self.bias))


class CutLinear(AlignedLinear):
    """The same for a network that goes on with the logits."""

    def forward(self, input: Tensor) -> Tensor:
        """(…, D) → (…, V)"""
        return super().forward(input)[..., : self.out_features]


def project_aligned(hidden: Tensor, weight_VD: Tensor, bias_V: Tensor | None) -> Tensor:
    """(…, D) → (…, W), W being V rounded up to a multiple of `ALIGNED_ROWS`. The logits of tokens that there are not are minus infinity, and no loss
    sees them: to cut them off would copy all others."""
    missing = -len(weight_VD) % ALIGNED_ROWS
    if not missing:
        return functional.linear(hidden, weight_VD, bias_V)
    bias = weight_VD.new_zeros(len(weight_VD)) if bias_V is None else bias_V
    return functional.linear(hidden, functional.pad(weight_VD, (0, 0, 0, missing)), functional.pad(bias, (0, missing), value=-math.inf))


def align_projection(network: nn.Module, *, ends: bool) -> None:
    """Let the projection to the vocabulary of a network of transformers compute as `AlignedLinear`; its parameters stay as they are. `ends`: nothing
    but the loss comes after it."""
    projection: Any = cast(Any, network).get_output_embeddings()
    if type(projection) is nn.Linear:
        projection.__class__ = AlignedLinear if ends else CutLinear


class ShortGelu(GELUActivation):
    """GELU as `short_gelu` computes it, where it is compiled for a GPU in 16 bits: torch's error function takes that longer than memory does."""

    def forward(self, input: Tensor) -> Tensor:
        """Of any shape."""
        if torch.compiler.is_compiling() and _is_for_tensor_cores(input):
            return short_gelu(input)
        return super().forward(input)


def replace_gelu(network: nn.Module) -> None:
    """Let every GELU of a network compute as `ShortGelu`."""
    for module in network.modules():
        if type(module) is GELUActivation:
            module.__class__ = ShortGelu


class _ShortGelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.save_for_backward(input)
        below, _ = _normal(input.float())
        return (input.float() * below).to(input.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        (input,) = ctx.saved_tensors
        below, density = _normal(input.float())
        return (gradient.float() * (below + input.float() * density)).to(gradient.dtype)


def short_gelu(input: Tensor) -> Tensor:
    """x times the normal distribution up to x (Hendrycks and Gimpel 2016), which is off by less than 1e-7."""
    return cast(Tensor, _ShortGelu.apply(input))


def _normal(x: Tensor) -> tuple[Tensor, Tensor]:
    """The normal distribution up to x and its density there, by Abramowitz and Stegun (1964), 7.1.26."""
    exponential = torch.exp(-0.5 * x * x)
    t = 1 / (1 + 0.3275911 * math.sqrt(0.5) * x.abs())
    beyond = 0.5 * exponential * t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))))
    return torch.where(x >= 0, 1 - beyond, beyond), exponential / math.sqrt(2 * math.pi)


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

    torch draws a number of 53 bits for each value on a CPU, a tenth of the time of a training step; here 16 bits decide in bf16, 32 in fp32. What the
    compiler makes for a GPU draws 128 bits for each value, which takes it longer than reading and writing them; here 16 bits decide, drawn before.
    """
    if probability == 0:
        return values
    if values.device.type == "cpu" and values.dtype in _SAME_SIZE:
        return values * _factors(values.detach(), probability)
    if torch.compiler.is_compiling():
        return drop_compiled(values, probability)
    return functional.dropout(values, probability)


def drop_compiled(values: Tensor, probability: float) -> Tensor:
    """`drop` as it is to be compiled for a GPU: one pass over `values` and the bits that decide."""
    first = _first_kept(probability, 16)
    return torch.where(_bits(values.detach()) >= first, values * ((1 << 16) / ((1 << 15) - first)), 0.0)


@torch.library.custom_op("maskwright::dropout_bits", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,))
def _bits(values: Tensor) -> Tensor:
    """For each of `values` 16 random bits as a whole number."""
    return _draw(values, 16).view(torch.int16)[: values.numel()].view(values.shape)


@_bits.register_fake
def _(values: Tensor) -> Tensor:
    return torch.empty(values.shape, dtype=torch.int16, device=values.device)


@torch.library.custom_op("maskwright::dropout_factors", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,))
def _factors(values: Tensor, probability: float) -> Tensor:
    """For each of `values` 0, or else 1 / (1 - probability): random bits, compared as whole numbers and made the bits of these factors in place."""
    bits, whole = 8 * values.element_size(), _SAME_SIZE[values.dtype]
    kept = torch.tensor(1 / (1 - probability), dtype=values.dtype).view(whole)
    draws = _draw(values, bits).view(whole)[: values.numel()].view(values.shape)
    return draws.ge_(_first_kept(probability, bits)).mul_(kept).view(values.dtype)


@_factors.register_fake
def _(values: Tensor, probability: float) -> Tensor:
    del probability
    return values.new_empty(values.shape)


def _draw(values: Tensor, bits: int) -> Tensor:
    """At least `bits` random bits for each of `values`, as numbers of 64."""
    return torch.empty(-(-values.numel() * bits // 64), dtype=torch.int64, device=values.device).random_(-(1 << 63), None)


def _first_kept(probability: float, bits: int) -> int:
    """The least whole number of so many bits, of which half are negative, that is kept."""
    return min(round(probability * (1 << bits)), (1 << bits) - 1) - (1 << bits - 1)


def _is_for_tensor_cores(values: Tensor) -> bool:
    """Whether they are on a GPU in 16 bits."""
    return values.device.type == "cuda" and values.element_size() == 2
