"""Layers of transformers that GPUs like better in another form: the same parameters under the same names, computed by other matrix products."""

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from trainer.dimensions import ALIGNED_ROWS


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
