"""Samples of a window: single segments or sentence pairs, whose lengths do not tell the label (pure)."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from data_pipeline.chunks import SPECIAL_TOKENS, Chunks, IntArray
from data_pipeline.hashing import UInt64Array, mix64

CanSwap = Callable[[IntArray, IntArray], NDArray[np.bool_]]

SentenceObjective = Literal["nsp", "sop", "none"]

IS_NEXT, IS_RANDOM, NO_PAIR = 0, 1, -100
IN_ORDER, SWAPPED = 0, 1

_SPLIT, _COIN, _RANK, _EXTRA, _ORDER = 1, 2, 3, 4, 5
"""What a hash of the samples' keys is used for; masking.py has its own."""
_REACH = 16
_MATCHINGS = (((0, 1), (2, 3)), ((0, 2), (1, 3)), ((0, 3), (1, 2)))


@dataclass(frozen=True)
class Samples:
    """Where the segments of each sample lie in a window's tokens. A single segment has b_length 0 and label NO_PAIR."""

    keys: UInt64Array
    """64-bit identity of a sample within the run: seed, split, phase, epoch, block and chunk, hashed."""
    a_start: IntArray
    a_length: IntArray
    b_start: IntArray
    b_length: IntArray
    labels: IntArray

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, rows: slice | NDArray[np.int64]) -> "Samples":
        return Samples(self.keys[rows], self.a_start[rows], self.a_length[rows], self.b_start[rows], self.b_length[rows], self.labels[rows])

    @property
    def lengths(self) -> IntArray:
        """Tokens of each row, special tokens included."""
        return self.a_length + self.b_length + 2 + (self.b_length > 0)


def make_samples(chunks: Chunks, keys: UInt64Array, sequence_length: int, objective: SentenceObjective) -> Samples:
    """One sample per chunk, in the order of the chunks. `nsp`: half of the pairs get the second segment of another document. `sop`: in half
    of them the segments change places."""
    start, stop = chunks.token_start(chunks.first_piece), chunks.token_start(chunks.stop_piece)
    num_pieces = chunks.stop_piece - chunks.first_piece
    is_pair = (num_pieces > 1) & (objective != "none")
    offset = (mix64(keys, _SPLIT) % np.maximum(num_pieces - 1, 1).astype(np.uint64)).astype(np.int64) + 1
    middle = np.where(is_pair, chunks.token_start(chunks.first_piece + offset), stop)
    samples = Samples(keys, start, middle - start, middle, stop - middle, np.where(is_pair, IS_NEXT, NO_PAIR))
    pairs = np.flatnonzero(is_pair)
    if objective == "nsp":
        return _with_swapped_seconds(samples, pairs, chunks.document[pairs], sequence_length - SPECIAL_TOKENS)
    return _with_swapped_segments(samples, pairs)


def _with_swapped_seconds(samples: Samples, pairs: IntArray, document: IntArray, limit: int) -> Samples:
    partner = choose_partners(samples.a_length[pairs], samples.b_length[pairs], document, samples.keys[pairs], limit)
    labels, b_start, b_length = samples.labels.copy(), samples.b_start.copy(), samples.b_length.copy()
    labels[pairs] = np.where(partner == np.arange(len(pairs)), IS_NEXT, IS_RANDOM)
    b_start[pairs], b_length[pairs] = b_start[pairs[partner]], b_length[pairs[partner]]
    return replace(samples, b_start=b_start, b_length=b_length, labels=labels)


def _with_swapped_segments(samples: Samples, pairs: IntArray) -> Samples:
    """Half of the pairs, those with the smaller hashes. Both orders have the same distribution of lengths: a pair is split anywhere."""
    swapped = np.zeros(len(samples), dtype=np.bool_)
    hashes = mix64(samples.keys[pairs], _ORDER)
    half = (len(pairs) + int(np.bitwise_xor.reduce(hashes) & np.uint64(1))) // 2  # of an odd number one more or one less
    swapped[pairs[np.argsort(hashes, kind="stable")[:half]]] = True

    def exchanged(one: IntArray, other: IntArray) -> IntArray:
        return np.where(swapped, other, one)

    return Samples(
        samples.keys,
        exchanged(samples.a_start, samples.b_start),
        exchanged(samples.a_length, samples.b_length),
        exchanged(samples.b_start, samples.a_start),
        exchanged(samples.b_length, samples.a_length),
        np.where(swapped, SWAPPED, samples.labels),
    )


def choose_partners(a_length: IntArray, b_length: IntArray, document: IntArray, keys: UInt64Array, limit: int) -> IntArray:
    """Whose B each pair gets: its own for half of the pairs (to within one, where documents and lengths allow), else another document's.

    The result is a permutation made of swaps, so every B is used once. Pairs are sorted by the length of B and taken in fours; each four
    is split into two couples that could both swap, and a hash decides which one does. The label therefore says nothing about lengths.
    Fours that cannot be split (a row that is full, one document) go into a pool whose couples make up the number.
    """
    partner = np.arange(len(keys))
    if len(keys) < 2:
        return partner
    seed = np.bitwise_xor.reduce(keys)
    slack = limit - a_length - b_length
    # Within a length, rows with the least room lie in the middle and swap among equals: couples of unequal lengths, which change the
    # length of a row, are made of rows with room to spare, where one token more or less tells nothing.
    side = np.where(keys & np.uint64(1), slack, -slack)
    order = np.lexsort((keys, side, b_length))
    rest = len(keys) % 4
    at = int(mix64(seed, _RANK) % np.uint64(len(keys) - rest + 1))  # those left over come from anywhere, not from the longest
    fours = np.delete(order, slice(at, at + rest)).reshape(-1, 4)

    def can_swap(i: IntArray, j: IntArray) -> NDArray[np.bool_]:  # b_length[i] <= b_length[j]
        return (document[i] != document[j]) & (b_length[j] - b_length[i] <= slack[i])

    couples, is_split = _split_fours(fours, can_swap)
    coin = (mix64(np.bitwise_xor.reduce(keys[fours[is_split]], axis=1), _COIN) & np.uint64(1)).astype(np.int64)
    which = np.arange(len(couples))
    chosen, spare = couples[which, coin], couples[which, 1 - coin]
    target = len(keys) // 4 + (rest == 3 or (rest == 2 and bool(mix64(seed, _COIN) & np.uint64(1))))
    missing = target - len(chosen)
    if missing > 0:
        pool = order[np.isin(order, np.concatenate([fours[~is_split].ravel(), order[at : at + rest]]))]
        pooled = _smallest(_couple_up(pool, can_swap), keys, _RANK, missing)
        extra = _smallest(spare, keys, _EXTRA, missing - len(pooled))
        chosen = np.concatenate([chosen, pooled, extra])
    partner[chosen[:, 0]], partner[chosen[:, 1]] = chosen[:, 1], chosen[:, 0]
    return partner


def _split_fours(fours: IntArray, can_swap: CanSwap) -> tuple[IntArray, NDArray[np.bool_]]:
    """(two couples of each four that can be split, which can): the first of three ways in which both couples can swap."""
    couples = np.zeros((len(fours), 2, 2), dtype=np.int64)
    is_split = np.zeros(len(fours), dtype=np.bool_)
    for (a, b), (c, d) in _MATCHINGS:
        works = ~is_split & can_swap(fours[:, a], fours[:, b]) & can_swap(fours[:, c], fours[:, d])
        couples[works] = fours[works][:, [[a, b], [c, d]]]
        is_split |= works
    return couples[is_split], is_split


def _couple_up(pool: IntArray, can_swap: CanSwap) -> IntArray:
    """Couples of a sorted pool, each pair with the first free one within reach that it can swap with."""
    free = np.ones(len(pool), dtype=np.bool_)
    couples: list[tuple[int, int]] = []
    for i in range(len(pool) - 1):
        if not free[i]:
            continue
        near = np.arange(i + 1, min(i + 1 + _REACH, len(pool)))
        works = near[free[near] & can_swap(pool[np.full(len(near), i)], pool[near])]
        if len(works):
            free[i] = free[works[0]] = False
            couples.append((int(pool[i]), int(pool[works[0]])))
    return np.array(couples, dtype=np.int64).reshape(-1, 2)


def _smallest(couples: IntArray, keys: UInt64Array, use: int, count: int) -> IntArray:
    """`count` couples (or all), those with the smallest hash."""
    hashes = mix64(keys[couples[:, 0]] ^ keys[couples[:, 1]], use)
    return couples[np.argsort(hashes, kind="stable")[: max(count, 0)]]
