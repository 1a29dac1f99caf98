"""Where the samples of a micro-batch lie in its rows: padded, packed or unpadded; nothing is carried to the next one (pure)."""

from bisect import bisect_left, insort
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from data_pipeline.chunks import IntArray

ROW_MULTIPLE = 8
"""Widths that are not given are rounded up to this: kernels like it and fewer shapes occur."""

Packing = Literal["none", "rows", "unpadded"]


@dataclass(frozen=True, eq=False)
class Layout:
    """R rows of T places, and the flat place in R*T of the first token of each of B samples; a sample never leaves its row."""

    num_rows: int
    width: int
    starts: IntArray
    """(B,)"""

    @property
    def num_places(self) -> int:
        """R * T."""
        return self.num_rows * self.width

    def places(self, lengths: IntArray) -> IntArray:
        """(N,) flat place of each token of the samples, one sample after the other."""
        ends = np.cumsum(lengths)
        return np.repeat(self.starts - ends + lengths, lengths) + np.arange(int(ends[-1]))


def pad_rows(lengths: IntArray, sequence_length: int) -> Layout:
    """A row for each sample; T is the longest one, rounded up to a multiple of 8."""
    del sequence_length
    width = _rounded(int(lengths.max()))
    return Layout(len(lengths), width, np.arange(len(lengths)) * width)


def pack_rows(lengths: IntArray, sequence_length: int) -> Layout:
    """Rows of `sequence_length` that hold several samples each, by best-fit decreasing (Johnson et al. 1974): the longest sample first, each
    into the row that it fills best."""
    row_of = np.empty(len(lengths), dtype=np.int64)
    column_of = np.empty(len(lengths), dtype=np.int64)
    room: list[tuple[int, int]] = []  # (places left, row), ascending
    num_rows = 0
    order = np.argsort(-lengths, kind="stable")
    for sample, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        at = bisect_left(room, (length, -1))
        if at == len(room):
            left, row = sequence_length, num_rows
            num_rows += 1
        else:
            left, row = room.pop(at)
        row_of[sample], column_of[sample] = row, sequence_length - left
        if left - length:
            insort(room, (left - length, row))
    return Layout(num_rows, sequence_length, row_of * sequence_length + column_of)


def unpad(lengths: IntArray, sequence_length: int) -> Layout:
    """One row that holds all samples in order, rounded up to a multiple of 8, for attention over sequences of variable length."""
    del sequence_length
    ends = np.cumsum(lengths)
    return Layout(1, _rounded(int(ends[-1])), ends - lengths)


LAYOUTS: dict[Packing, Callable[[IntArray, int], Layout]] = {"none": pad_rows, "rows": pack_rows, "unpadded": unpad}
"""From (B,) lengths and the sequence length to the layout, for each value of `batch.packing`."""


def _rounded(width: int) -> int:
    return -(-width // ROW_MULTIPLE) * ROW_MULTIPLE
