"""Micro-batches as tensors: made from the stream's arrays, cut into parts where memory is short (pure but for the copy to a device).

Shape suffixes: B samples, R rows, T places of a row, N masked positions, S samples and stretches of padding, and one.
"""

from dataclasses import dataclass, fields
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainer.dimensions import MASKED_MULTIPLE
from trainer.objectives import IGNORED

if TYPE_CHECKING:
    from data_pipeline.stream import MicroBatch


@dataclass(frozen=True)
class TensorBatch:
    """One micro-batch, or a part of one, on a device. `mlm_positions_N` and `starts_B` index the flattened (R, T) places."""

    input_ids_RT: Tensor
    token_type_ids_RT: Tensor
    position_ids_RT: Tensor
    sample_ids_RT: Tensor
    """1, 2, … for the samples of the batch, 0 for padding: attention stays within equal numbers."""
    starts_B: Tensor
    """Where each sample's [CLS] is."""
    mlm_positions_N: Tensor
    """Never empty. N is filled up with place 0, whose label is IGNORED."""
    mlm_labels_N: Tensor
    nsp_labels_B: Tensor
    bounds_S: Tensor
    """Where samples and padding begin, as `bounds_of` says."""

    def to(self, device: torch.device) -> "TensorBatch":
        """This batch on `device`, where it may be already; copies to a GPU do not wait."""
        if device.type == self.input_ids_RT.device.type:
            return self
        return TensorBatch(**{field.name: getattr(self, field.name).pin_memory().to(device, non_blocking=True) for field in fields(self)})


def tensor_batches(batch: "MicroBatch", parts: int = 1) -> list[TensorBatch]:
    """Cut a micro-batch into exactly `parts` batches of nearly equal numbers of rows.

    Every rank has to run the same number of passes, or collectives would not match; so a batch with fewer rows than parts (the empty
    micro-batch) gets parts without any label.
    """
    rows = batch.layout.num_rows
    tables = [batch.input_ids, batch.token_type_ids, batch.position_ids, batch.sample_ids]
    bounds = np.linspace(0, rows, min(parts, rows) + 1).round().astype(int)
    batches = [_part(batch, tables, int(first), int(last)) for first, last in pairwise(bounds)]
    return batches + [_without_labels(batches[0])] * (parts - len(batches))


def bounds_of(sample_ids_RT: NDArray[np.int64]) -> NDArray[np.int32]:
    """(S,) Where in the flattened rows samples and padding begin, and at the end the number of places: S - 1 pieces that fill the rows."""
    begins_RT = np.ones(sample_ids_RT.shape, np.bool_)
    begins_RT[:, 1:] = sample_ids_RT[:, 1:] != sample_ids_RT[:, :-1]
    return np.append(np.flatnonzero(begins_RT), sample_ids_RT.size).astype(np.int32)


def _part(batch: "MicroBatch", tables: list[NDArray[np.int64]], first: int, last: int) -> TensorBatch:
    low, high = first * batch.layout.width, last * batch.layout.width
    positions = batch.mlm_positions
    masked, own = (positions >= low) & (positions < high), (batch.starts >= low) & (batch.starts < high)
    positions, labels = _filled(positions[masked] - low, batch.mlm_labels[masked])
    rows = [table[first:last] for table in tables]
    arrays = [*rows, batch.starts[own] - low, positions, labels, batch.nsp_labels[own], bounds_of(rows[-1])]
    return TensorBatch(*(_tensor(array) for array in arrays))


def _filled(places: NDArray[np.int64], labels: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Up to a multiple of MASKED_MULTIPLE with place 0, which is not labelled; never empty, so that the parameters of the head stay in the graph."""
    missing = -len(places) % MASKED_MULTIPLE if len(places) else MASKED_MULTIPLE
    return np.pad(places, (0, missing)), np.pad(labels, (0, missing), constant_values=IGNORED)


def _without_labels(batch: TensorBatch) -> TensorBatch:
    """The first row of a batch as one whose loss is zero."""
    return TensorBatch(
        input_ids_RT=batch.input_ids_RT[:1],
        token_type_ids_RT=batch.token_type_ids_RT[:1],
        position_ids_RT=batch.position_ids_RT[:1],
        sample_ids_RT=batch.sample_ids_RT[:1],
        starts_B=torch.zeros(1, dtype=torch.int64),
        mlm_positions_N=torch.zeros(MASKED_MULTIPLE, dtype=torch.int64),
        mlm_labels_N=torch.full((MASKED_MULTIPLE,), IGNORED),
        nsp_labels_B=torch.full((1,), IGNORED),
        bounds_S=_tensor(bounds_of(batch.sample_ids_RT[:1].numpy())),
    )


def _tensor(array: NDArray[np.int64] | NDArray[np.int32]) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array))
