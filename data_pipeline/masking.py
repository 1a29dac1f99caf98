"""Chooses the tokens to predict by a stateless hash of (sample, position): 80 % [MASK], 10 % random, 10 % kept (pure)."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from data_pipeline.chunks import IntArray
from data_pipeline.hashing import UInt64Array, mix64, threshold64

_CHOOSE, _REPLACE = 11, 12
_HALF_WORD = np.uint64(32)
_LOW = np.uint64(0xFFFFFFFF)


@dataclass(frozen=True)
class Vocabulary:
    """Token ids that have a meaning of their own, and the ordinary ones, which can be masked and drawn as replacements."""

    size: int
    pad: int
    unk: int
    cls: int
    sep: int
    mask: int
    ordinary_ranges: tuple[tuple[int, int], ...]
    """Ordinary ids as ascending [start, stop) ranges: every real token that is neither special nor a placeholder."""

    @property
    def ordinary_ids(self) -> IntArray:
        """All ordinary ids, ascending."""
        return np.concatenate([np.arange(start, stop) for start, stop in self.ordinary_ranges])


@dataclass(frozen=True)
class Masking:
    """Tables for masking with one vocabulary and rate."""

    mask_id: int
    is_ordinary: NDArray[np.bool_]
    ordinary_ids: IntArray
    threshold: np.uint64

    @classmethod
    def of(cls, vocabulary: Vocabulary, mask_rate: float) -> "Masking":
        """Tables for `vocabulary`; each ordinary token is chosen with probability `mask_rate`."""
        ordinary_ids = vocabulary.ordinary_ids
        is_ordinary = np.zeros(vocabulary.size, dtype=np.bool_)
        is_ordinary[ordinary_ids] = True
        return cls(vocabulary.mask, is_ordinary, ordinary_ids, threshold64(mask_rate))


def mask_rows(ids_BT: IntArray, keys_B: UInt64Array, masking: Masking) -> tuple[IntArray, IntArray]:
    """Mask `ids_BT` in place; return the flat positions chosen (ascending) and the tokens that were there.

    What happens at (b, t) depends on keys_B[b], t and the token only, not on the other rows nor on the padding.
    """
    hashes_BT = mix64(mix64(keys_B, _CHOOSE)[:, None], np.arange(ids_BT.shape[1]))
    flat = ids_BT.reshape(-1)
    positions = np.flatnonzero(hashes_BT < masking.threshold)
    positions = positions[masking.is_ordinary[flat[positions]]]
    labels = flat[positions]
    hashes = mix64(hashes_BT.reshape(-1)[positions], _REPLACE)
    action = (hashes >> _HALF_WORD).astype(np.float64) / 2**32
    drawn = ((hashes & _LOW) * np.uint64(len(masking.ordinary_ids))) >> _HALF_WORD
    replaced = np.where(action < 0.8, masking.mask_id, np.where(action < 0.9, masking.ordinary_ids[drawn.astype(np.int64)], labels))
    flat[positions] = replaced
    return positions, labels
