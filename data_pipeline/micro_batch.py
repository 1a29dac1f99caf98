"""A micro-batch as arrays, its digest, and the digest of a step that ranks can add up in any order (pure)."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from data_pipeline.chunks import IntArray
from data_pipeline.hashing import mix64
from data_pipeline.masking import Masking, Vocabulary, mask_rows
from data_pipeline.pairs import NO_PAIR, Samples

ROW_MULTIPLE = 8
"""Rows are padded to the longest one, rounded up to this: kernels like it and fewer shapes occur."""


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """B samples of up to T tokens; T is the longest row rounded up to a multiple of 8."""

    number: int
    """Number within the run; -1 of an empty micro-batch."""
    input_ids: IntArray
    """(B, T), masking applied, padded with [PAD]."""
    token_type_ids: IntArray
    """(B, T): 1 for the second segment and its [SEP]."""
    lengths: IntArray
    """(B,) tokens of each row, special tokens included."""
    mlm_positions: IntArray
    """(N,) flat index into B*T, ascending."""
    mlm_labels: IntArray
    """(N,) the tokens that were there."""
    nsp_labels: IntArray
    """(B,) 0: B follows A. 1: B is of another document. -100: a single segment."""

    @property
    def num_samples(self) -> int:
        """Rows."""
        return len(self.lengths)

    @property
    def num_tokens(self) -> int:
        """Tokens without padding."""
        return int(self.lengths.sum())

    @property
    def num_masked(self) -> int:
        """Tokens to predict."""
        return len(self.mlm_labels)

    @property
    def num_pairs(self) -> int:
        """Rows with a next-sentence label."""
        return int(np.count_nonzero(self.nsp_labels != NO_PAIR))

    @property
    def digest(self) -> int:
        """64 bits over token ids, segments, masks, labels and NSP labels in sample order; padding does not enter."""
        real_BT = np.arange(self.input_ids.shape[1]) < self.lengths[:, None]
        before = np.cumsum(self.lengths) - self.lengths
        row, column = np.divmod(self.mlm_positions, self.input_ids.shape[1])
        arrays = (
            self.lengths, self.input_ids[real_BT], self.token_type_ids[real_BT],
            before[row] + column, self.mlm_labels, self.nsp_labels,
        )  # fmt: skip
        digest = hashlib.blake2b(digest_size=8)
        for array in arrays:
            digest.update(len(array).to_bytes(4, "little") + array.astype("<i4").tobytes())
        return int.from_bytes(digest.digest(), "little")


def step_digest(parts: Iterable[tuple[int, int]]) -> int:
    """Digest of a step from (position within the step, digest) of its micro-batches: a sum modulo 2^64, so that ranks can add theirs up."""
    return sum(int(mix64(position, digest)) for position, digest in parts) % 2**64


def empty_micro_batch(vocabulary: Vocabulary) -> MicroBatch:
    """One row [CLS] [SEP] without labels: what a rank computes, with weight zero, when it has no micro-batch left in a step."""
    input_ids = np.full((1, ROW_MULTIPLE), vocabulary.pad, dtype=np.int64)
    input_ids[0, :2] = vocabulary.cls, vocabulary.sep
    nothing = np.zeros(0, dtype=np.int64)
    return MicroBatch(-1, input_ids, np.zeros_like(input_ids), np.array([2]), nothing, nothing, np.array([NO_PAIR]))


def assemble(number: int, parts: list[tuple[NDArray[np.integer], Samples]], vocabulary: Vocabulary, masking: Masking) -> MicroBatch:
    """Make the micro-batch of some samples, each part with the tokens that its samples point into."""
    lengths = np.concatenate([samples.lengths for _, samples in parts])
    width = -(-int(lengths.max()) // ROW_MULTIPLE) * ROW_MULTIPLE
    input_ids = np.full((len(lengths), width), vocabulary.pad, dtype=np.int64)
    row = 0
    for tokens, samples in parts:
        _fill_rows(input_ids[row : row + len(samples)], tokens, samples, vocabulary)
        row += len(samples)
    a_length = np.concatenate([samples.a_length for _, samples in parts])
    column = np.arange(width)
    token_type_ids = ((column >= a_length[:, None] + 2) & (column < lengths[:, None])).astype(np.int64)
    positions, labels = mask_rows(input_ids, np.concatenate([samples.keys for _, samples in parts]), masking)
    nsp_labels = np.concatenate([samples.labels for _, samples in parts])
    return MicroBatch(number, input_ids, token_type_ids, lengths, positions, labels, nsp_labels)


def _fill_rows(ids_BT: IntArray, tokens: NDArray[np.integer], samples: Samples, vocabulary: Vocabulary) -> None:
    """[CLS] A [SEP] B [SEP] in each row; the tokens of all segments move in one gather."""
    rows = np.arange(len(samples))
    row_start = rows * ids_BT.shape[1]
    ids_BT[:, 0] = vocabulary.cls
    ids_BT[rows, samples.a_length + 1] = vocabulary.sep
    ids_BT[rows, samples.lengths - 1] = vocabulary.sep
    source = np.stack([samples.a_start, samples.b_start], axis=1).ravel()
    target = np.stack([row_start + 1, row_start + samples.a_length + 2], axis=1).ravel()
    length = np.stack([samples.a_length, samples.b_length], axis=1).ravel()
    before = np.cumsum(length) - length
    nth = np.arange(int(length.sum()))
    flat = ids_BT.reshape(-1)
    flat[np.repeat(target - before, length) + nth] = tokens[np.repeat(source - before, length) + nth]
