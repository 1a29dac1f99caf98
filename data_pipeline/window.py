"""A window's samples as finished tokens: laid end to end in shuffled order, with what to predict; micro-batches are slices of it (pure)."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from data_pipeline.chunks import IntArray
from data_pipeline.masking import Tokens, Vocabulary
from data_pipeline.pairs import Samples


@dataclass(frozen=True, eq=False)
class Finished:
    """B samples laid end to end, N tokens in all, P of them to predict or to predict from. Compact: a rank keeps one of each of its lanes."""

    token_ids: NDArray[np.integer]
    """(N,) uint16 or uint32, special tokens included, masks applied."""
    lengths: IntArray
    """(B,) tokens of each sample."""
    first_lengths: IntArray
    """(B,) tokens of [CLS] A [SEP]; the rest of a sample is B [SEP]."""
    mlm_positions: IntArray
    """(P,) index into N, ascending."""
    mlm_labels: NDArray[np.integer]
    """(P,) the tokens that were there; under `objective: clm` the next ones."""
    nsp_labels: IntArray
    """(B,)"""

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, rows: slice) -> "Finished":
        """Consecutive samples; costs a search and views."""
        first, last, _ = rows.indices(len(self))
        ends = np.cumsum(self.lengths[:last])
        start, stop = (int(ends[row - 1]) if row > 0 else 0 for row in (first, last))
        low, high = np.searchsorted(self.mlm_positions, [start, stop])
        return Finished(
            self.token_ids[start:stop],
            self.lengths[first:last],
            self.first_lengths[first:last],
            self.mlm_positions[low:high] - start,
            self.mlm_labels[low:high],
            self.nsp_labels[first:last],
        )


_NOTHING = np.zeros(0, dtype=np.int64)
EMPTY = Finished(_NOTHING, _NOTHING, _NOTHING, _NOTHING, _NOTHING, _NOTHING)
"""No samples at all."""


Choose = Callable[[Tokens], tuple[IntArray, NDArray[np.integer]]]
"""Chooses the places to predict from and what is predicted there; may change the ids, as masking does."""


def finish(tokens: NDArray[np.integer], samples: Samples, vocabulary: Vocabulary, choose: Choose) -> Finished:
    """Lay out `samples`, which point into `tokens`, in the order of the samples, and choose what is predicted."""
    lengths = samples.lengths
    laid = Tokens(lay_out(tokens, samples, vocabulary), lengths, samples.a_length + 2, samples.keys)
    positions, labels = choose(laid)
    return Finished(laid.ids, lengths, laid.second_starts, positions, labels, samples.labels)


def lay_out(tokens: NDArray[np.integer], samples: Samples, vocabulary: Vocabulary) -> NDArray[np.integer]:
    """(N,) ids of [CLS] A [SEP] B [SEP] for each sample, one after the other; the tokens of all segments move in one gather."""
    lengths = samples.lengths
    ends = np.cumsum(lengths)
    starts = ends - lengths
    ids = np.empty(int(ends[-1]), dtype=tokens.dtype)
    source = np.stack([samples.a_start, samples.b_start], axis=1).ravel()
    target = np.stack([starts + 1, starts + samples.a_length + 2], axis=1).ravel()
    length = np.stack([samples.a_length, samples.b_length], axis=1).ravel()
    before = np.cumsum(length) - length
    nth = np.arange(int(length.sum()))
    ids[np.repeat(target - before, length) + nth] = tokens[np.repeat(source - before, length) + nth]
    ids[starts] = vocabulary.cls
    ids[starts + samples.a_length + 1] = vocabulary.sep
    ids[ends - 1] = vocabulary.sep
    return ids


def joined(parts: list[Finished]) -> Finished:
    """Several stretches of samples as one."""
    if len(parts) == 1:
        return parts[0]
    starts = np.cumsum([0, *(len(part.token_ids) for part in parts[:-1])])
    return Finished(
        np.concatenate([part.token_ids for part in parts]),
        np.concatenate([part.lengths for part in parts]),
        np.concatenate([part.first_lengths for part in parts]),
        np.concatenate([part.mlm_positions + start for part, start in zip(parts, starts, strict=True)]),
        np.concatenate([part.mlm_labels for part in parts]),
        np.concatenate([part.nsp_labels for part in parts]),
    )
