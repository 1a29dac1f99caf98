"""Losses of masked-language modelling and next-sentence prediction, as sums, and their weights in the global batch (pure).

Shape suffixes: N masked positions, V vocabulary, B samples.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

IGNORED = -100  # the label of what is not to be predicted


@dataclass(frozen=True)
class LossSums:
    """Sums over the samples of one forward pass. Tensors: reading one on the host waits for the device."""

    mlm_loss: Tensor
    nsp_loss: Tensor
    mlm_correct: Tensor
    nsp_correct: Tensor

    def detached(self) -> Tensor:
        """The four sums as one float64 vector, outside the graph."""
        return torch.stack([value.detach().double() for value in (self.mlm_loss, self.nsp_loss, self.mlm_correct, self.nsp_correct)])


@dataclass(frozen=True)
class LossWeights:
    """What a rank multiplies its sums with, so that the mean over ranks of the gradients is the gradient of the global batch's loss."""

    mlm: float
    nsp: float

    @classmethod
    def for_step(cls, *, num_masked: int, num_pairs: int, world_size: int) -> "LossWeights":
        """Weights of a step whose global batch has `num_masked` masked tokens and `num_pairs` labelled pairs.

        L = sum of MLM losses / num_masked + sum of NSP losses / num_pairs, over all ranks; the engine averages over ranks, hence the
        factor. A batch without pairs (or masks) has no such term.
        """
        return cls(mlm=world_size / max(1, num_masked), nsp=world_size / max(1, num_pairs))

    def loss(self, sums: LossSums) -> Tensor:
        """The weighted loss: a scalar in fp32 with a graph through every parameter, whatever the batch holds."""
        return sums.mlm_loss * self.mlm + sums.nsp_loss * self.nsp


def loss_sums(mlm_logits_NV: Tensor, mlm_labels_N: Tensor, nsp_logits_B2: Tensor, nsp_labels_B: Tensor) -> LossSums:
    """Cross-entropy and correct predictions, summed over the labels that are not IGNORED; both computed in fp32.

    With no label at all the loss is a zero that still has a gradient (of zeros): ZeRO waits for the gradient of every parameter.
    """
    mlm_logits_NV, nsp_logits_B2 = mlm_logits_NV.float(), nsp_logits_B2.float()
    return LossSums(
        mlm_loss=functional.cross_entropy(mlm_logits_NV, mlm_labels_N, reduction="sum", ignore_index=IGNORED),
        nsp_loss=functional.cross_entropy(nsp_logits_B2, nsp_labels_B, reduction="sum", ignore_index=IGNORED),
        mlm_correct=_correct(mlm_logits_NV, mlm_labels_N),
        nsp_correct=_correct(nsp_logits_B2, nsp_labels_B),
    )


def _correct(logits: Tensor, labels: Tensor) -> Tensor:
    return (logits.detach().argmax(dim=-1) == labels).sum()
