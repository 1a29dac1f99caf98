"""Normalised words of a text and their n-grams, as 64-bit hashes: what contamination and near-duplicates are measured with (pure)."""

import hashlib
import re
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from data_pipeline.hashing import UInt64Array, mix64
from data_pipeline.word_memory import Runs, WordMemory

_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff]|[^\W_\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff]+")
"""Letters and digits; in scripts that write no spaces, each character. Punctuation is left out."""
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


def word_hashes(texts: Sequence[str]) -> list[UInt64Array]:
    """Hashes of the lower-cased words of each text, without punctuation, in order."""
    hashes, lengths = _MEMORY.of_texts([text.replace("\n", " ") for text in texts])
    return np.split(hashes, np.cumsum(lengths)[:-1]) if len(texts) else []


def ngram_hashes(words: UInt64Array, n: int) -> UInt64Array:
    """Hashes of the runs of `n` words; one less than n words shorter than the input, at least empty."""
    count = max(0, len(words) - n + 1)
    state: NDArray[np.uint64] = np.zeros(count, dtype=np.uint64)
    for start in range(n):  # wrapping arithmetic modulo 2**64 is the point
        state *= _MULTIPLIER
        state += words[start : start + count]
    return mix64(state)


def _hash_words(pieces: list[str]) -> Runs:
    """What stands between spaces may hold several words, or none."""
    found = [_WORD.findall(piece.lower()) for piece in pieces]
    data = b"".join(hashlib.blake2b(word.encode("utf-8", "surrogatepass"), digest_size=8).digest() for words in found for word in words)
    return np.frombuffer(data, dtype="<u8").astype(np.uint64), np.array([len(words) for words in found], dtype=np.int64)


_MEMORY = WordMemory(_hash_words)
"""Shared by the tasks of a process: what it remembers is the same whoever asks."""
