"""Normalised words of a text and their n-grams, as 64-bit hashes: what contamination and near-duplicates are measured with (pure)."""

import hashlib
import re
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from data_pipeline.hashing import UInt64Array, mix64

_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff]|[^\W_\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff]+")
"""Letters and digits; in scripts that write no spaces, each character. Punctuation is left out."""
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
_MAX_WORDS = 1 << 18


class WordHashes(dict[str, tuple[int, ...]]):
    """Remembers the hashes of the words in a piece of text without white space: natural text repeats itself."""

    def __missing__(self, piece: str) -> tuple[int, ...]:
        if len(self) >= _MAX_WORDS:
            self.clear()
        hashes = tuple(_hash(word) for word in _WORD.findall(piece.lower()))
        self[piece] = hashes
        return hashes

    def of(self, text: str) -> UInt64Array:
        """Hashes of the lower-cased words of a text, without punctuation, in order."""
        return np.fromiter(chain.from_iterable(map(self.__getitem__, text.split())), dtype=np.uint64)


def ngram_hashes(words: UInt64Array, n: int) -> UInt64Array:
    """Hashes of the runs of `n` words; one less than n words shorter than the input, at least empty."""
    count = max(0, len(words) - n + 1)
    state: NDArray[np.uint64] = np.zeros(count, dtype=np.uint64)
    for start in range(n):  # wrapping arithmetic modulo 2**64 is the point
        state *= _MULTIPLIER
        state += words[start : start + count]
    return mix64(state)


def _hash(word: str) -> int:
    return int.from_bytes(hashlib.blake2b(word.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")
