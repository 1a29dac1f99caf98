"""Micro-batches as tensors: made from the stream's arrays, cut into parts where memory is short (pure but for the copy to a device).

Shape suffixes: B samples, T tokens of the longest row, N masked positions.
"""

from dataclasses import dataclass, fields
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from trainer.objectives import IGNORED

if TYPE_CHECKING:
    from data_pipeline.stream import MicroBatch


@dataclass(frozen=True)
class TensorBatch:
    """One micro-batch, or a part of one, on a device. `mlm_positions_N` indexes the flattened (B, T) tokens and is never empty."""

    input_ids_BT: Tensor
    token_type_ids_BT: Tensor
    attention_mask_BT: Tensor
    mlm_positions_N: Tensor
    mlm_labels_N: Tensor
    nsp_labels_B: Tensor

    def to(self, device: torch.device) -> "TensorBatch":
        """This batch on `device`; copies to a GPU do not wait."""
        if device.type == "cpu":
            return self
        return TensorBatch(**{field.name: getattr(self, field.name).pin_memory().to(device, non_blocking=True) for field in fields(self)})


def tensor_batches(batch: "MicroBatch", parts: int = 1) -> list[TensorBatch]:
    """Cut a micro-batch into exactly `parts` batches of nearly equal numbers of samples, in order.

    Every rank has to run the same number of passes, or collectives would not match; so a batch with fewer samples than parts (the
    empty micro-batch) gets parts without any label.
    """
    bounds = np.linspace(0, batch.num_samples, min(parts, batch.num_samples) + 1).round().astype(int)
    batches = [_rows(batch, int(first), int(last)) for first, last in pairwise(bounds)]
    return batches + [_without_labels(batches[0])] * (parts - len(batches))


def _rows(batch: "MicroBatch", first: int, last: int) -> TensorBatch:
    num_tokens = batch.input_ids.shape[1]
    low, high = np.searchsorted(batch.mlm_positions, [first * num_tokens, last * num_tokens])
    positions = batch.mlm_positions[low:high] - first * num_tokens
    labels = batch.mlm_labels[low:high]
    if not len(positions):  # the head must run all the same, so that its parameters stay in the graph
        positions, labels = np.zeros(1, np.int64), np.full(1, IGNORED)
    mask = np.arange(num_tokens)[None, :] < batch.lengths[first:last, None]
    return TensorBatch(
        input_ids_BT=_tensor(batch.input_ids[first:last]),
        token_type_ids_BT=_tensor(batch.token_type_ids[first:last]),
        attention_mask_BT=_tensor(mask),
        mlm_positions_N=_tensor(positions),
        mlm_labels_N=_tensor(labels),
        nsp_labels_B=_tensor(batch.nsp_labels[first:last]),
    )


def _without_labels(batch: TensorBatch) -> TensorBatch:
    return TensorBatch(
        input_ids_BT=batch.input_ids_BT[:1],
        token_type_ids_BT=batch.token_type_ids_BT[:1],
        attention_mask_BT=batch.attention_mask_BT[:1],
        mlm_positions_N=torch.zeros(1, dtype=torch.int64),
        mlm_labels_N=torch.full((1,), IGNORED),
        nsp_labels_B=torch.full((1,), IGNORED),
    )


def _tensor(array: Any) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array, dtype=np.int64))
