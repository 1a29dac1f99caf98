"""Stateless 64-bit hashing of integer arrays: the only source of randomness in the data order (pure)."""

import numpy as np
from numpy.typing import ArrayLike, NDArray

UInt64Array = NDArray[np.uint64]

_START = np.uint64(0x243F6A8885A308D3)
_STEP = np.uint64(0x9E3779B97F4A7C15)
_MULTIPLIER_1 = np.uint64(0xBF58476D1CE4E5B9)
_MULTIPLIER_2 = np.uint64(0x94D049BB133111EB)
_STRETCH = 8192
"""Numbers that two buffers of fit the second-level cache of any processor."""
_SHIFT_1, _SHIFT_2, _SHIFT_3 = np.uint64(30), np.uint64(27), np.uint64(31)


def mix64(*words: ArrayLike) -> UInt64Array:
    """Hash broadcast integer arrays, word by word, into 64 bits (the finaliser of SplitMix64, Steele et al. 2014).

    Unlike a generator's stream, its values can never change with a NumPy version. The order of the words matters.
    """
    state = np.asarray(_START)
    with np.errstate(over="ignore"):  # wrapping multiplication is the point
        for word in words:
            state = _finalise(np.asarray(state ^ (_as_uint64(word) + _STEP), order="C"))
    return state


def threshold64(probability: float) -> np.uint64:
    """The number t for which `mix64(...) < t` holds with `probability` (below 1)."""
    return np.uint64(int(probability * 2**64))


def _as_uint64(word: ArrayLike) -> UInt64Array:
    if isinstance(word, int):
        return np.asarray(np.uint64(word & 0xFFFFFFFFFFFFFFFF))
    return np.asarray(word).astype(np.uint64, copy=False)


def _finalise(state: UInt64Array) -> UInt64Array:
    """In place: `state` is a fresh array in C order. By stretches that stay in the cache: passes over memory are what this would cost."""
    flat = state.reshape(-1)
    shifted = np.empty(min(len(flat), _STRETCH), dtype=np.uint64)
    for start in range(0, len(flat), _STRETCH):
        part = flat[start : start + _STRETCH]
        moved = shifted[: len(part)]
        part ^= np.right_shift(part, _SHIFT_1, out=moved)
        part *= _MULTIPLIER_1
        part ^= np.right_shift(part, _SHIFT_2, out=moved)
        part *= _MULTIPLIER_2
        part ^= np.right_shift(part, _SHIFT_3, out=moved)
    return state
