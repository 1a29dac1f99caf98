"""Order of the data as arithmetic: epochs, lanes, windows and the ranks' shares (pure)."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from data_pipeline.chunks import IntArray
from data_pipeline.config import Phase
from data_pipeline.hashing import UInt64Array, mix64

WINDOW_SAMPLES = 4096
"""Samples a window aims at: enough for negatives of equal length and for micro-batches of equal numbers of tokens, a few MB in memory."""
_GOLDEN = (5**0.5 - 1) / 2
_MIN_BALANCED_BLOCKS = 4
"""Blocks in a window from which on their order is balanced."""
_STRATA = 16
"""Blocks are balanced by their rank in so many strata of tokens per sample, and shuffled within one."""


def rank_micro_batches(num_micro_batches: int, rank: int, world_size: int) -> range:
    """Positions within a step that `rank` computes: contiguous, sizes differ by at most one, together they cover the step."""
    return range(num_micro_batches * rank // world_size, num_micro_batches * (rank + 1) // world_size)


def micro_steps(num_micro_batches: int, world_size: int) -> int:
    """Micro-steps every rank runs per step, surplus ones empty, so that collectives match."""
    return -(-num_micro_batches // world_size)


def micro_batches_of_step(phases: tuple[Phase, ...], step: int) -> range:
    """Run-wide numbers of a step's micro-batches."""
    for phase in phases:
        if phase.first_step <= step < phase.first_step + phase.num_steps:
            first = phase.first_micro_batch + (step - phase.first_step) * phase.num_micro_batches
            return range(first, first + phase.num_micro_batches)
    raise IndexError(f"step {step} is not in 0..{phases[-1].first_step + phases[-1].num_steps - 1}")


@dataclass(frozen=True)
class Epoch:
    """The blocks of an epoch in their keyed order, and how many samples precede the end of each."""

    blocks: NDArray[np.int64]
    sample_ends: NDArray[np.int64]


@dataclass(frozen=True)
class Window:
    """A run of blocks of a lane (partial at the lane's ends), shuffled together."""

    blocks: NDArray[np.int64]
    """Block numbers within the split, in the epoch's order."""
    skip: int
    """Samples at the start of the first block that belong to the lane before."""
    num_samples: int
    """Samples of the window."""
    first: int
    """Offset within the lane's epoch of the window's first sample."""


@dataclass(frozen=True)
class Span:
    """Samples [start, stop) of one epoch of a lane."""

    epoch: int
    start: int
    stop: int


def epoch_order(samples_per_block: NDArray[np.integer], tokens_per_block: NDArray[np.integer], key: int) -> Epoch:
    """The blocks in an order keyed with `key`, in which any run of blocks has nearly the same number of tokens per sample as any other.

    Costs a few sorts of all blocks, once an epoch. Where a window is but a few blocks, which are large then and alike, one sort has to do.
    """
    hashes = mix64(key, np.arange(len(samples_per_block)))
    if blocks_per_window(int(samples_per_block.sum(dtype=np.int64)), len(hashes)) < _MIN_BALANCED_BLOCKS:
        blocks = np.argsort(hashes, kind="stable")
    else:
        tokens_per_sample = tokens_per_block / np.maximum(samples_per_block, 1)
        blocks = balanced_order(tokens_per_sample, hashes, golden_spread(len(hashes)), neighbours=max(1, len(hashes) // _STRATA))
    return Epoch(blocks, np.cumsum(samples_per_block[blocks], dtype=np.int64))


def lane_bounds(num_samples: int, num_lanes: int, lane: int) -> tuple[int, int]:
    """Samples [lo, hi) of an epoch that make up a lane; lengths differ by at most one and are the same in every epoch."""
    return num_samples * lane // num_lanes, num_samples * (lane + 1) // num_lanes


def lane_spans(lane_length: int, start: int, stop: int) -> Iterator[Span]:
    """Cut positions [start, stop) of a lane's infinite sequence, its epochs one after the other, at the epochs' ends."""
    while start < stop:
        epoch, offset = divmod(start, lane_length)
        length = min(lane_length - offset, stop - start)
        yield Span(epoch, offset, offset + length)
        start += length


def blocks_per_window(num_samples: int, num_blocks: int) -> int:
    """Blocks that hold about WINDOW_SAMPLES samples."""
    return max(1, min(num_blocks, WINDOW_SAMPLES * num_blocks // max(num_samples, 1)))


def balanced_order(sizes: NDArray[np.integer] | NDArray[np.floating], keys: UInt64Array, spread: NDArray[np.floating], neighbours: int) -> IntArray:
    """A shuffled order in which neighbours have nearly the same mean size wherever one looks.

    Position p takes what ranks by size as `spread[p]` ranks among `spread`, an evenly spread sequence in [0, 1), turned by a hash. Among
    `neighbours` in size, and those of equal size, hashes decide which comes when.
    """
    ranked = np.lexsort((keys, sizes))
    ranked = ranked[np.lexsort((keys[ranked], np.arange(len(sizes)) // neighbours))]
    turn = int(np.bitwise_xor.reduce(keys)) / 2**64
    order = np.empty(len(sizes), dtype=np.int64)
    order[np.argsort((spread + turn) % 1.0, kind="stable")] = ranked
    return order


def golden_spread(count: int) -> NDArray[np.float64]:
    """Multiples of the golden ratio modulo 1: any consecutive terms are spread evenly (Niederreiter 1992, section 3.1)."""
    return (np.arange(count) * _GOLDEN % 1.0).astype(np.float64)


def binary_spread(first: int, count: int) -> NDArray[np.float64]:
    """Terms first .. first + count - 1 of van der Corput's sequence in base 2: bits reversed behind the point.

    2^k terms from a multiple of 2^k on fall one into each of 2^k equal parts.
    """
    reversed_bits = np.zeros(count, dtype=np.uint32)
    numbers = np.arange(first, first + count).astype(np.uint32)
    for bit in range(32):
        reversed_bits |= ((numbers >> np.uint32(bit)) & np.uint32(1)) << np.uint32(31 - bit)
    return reversed_bits.astype(np.float64) / 2.0**32


def find_window(epoch: Epoch, lane: tuple[int, int], offset: int, num_blocks: int) -> Window:
    """The window that holds the sample at `offset` of the lane [lo, hi): the lane's blocks, cut evenly into windows of about `num_blocks`."""
    lo, hi = lane
    ends = epoch.sample_ends
    lane_first, block = (int(at) for at in np.searchsorted(ends, [lo, lo + offset], side="right"))
    lane_blocks = int(np.searchsorted(ends, hi, side="left")) + 1 - lane_first
    num_windows = max(1, round(lane_blocks / num_blocks))
    nth = ((block - lane_first + 1) * num_windows - 1) // lane_blocks
    first, last = (lane_first + lane_blocks * each // num_windows for each in (nth, nth + 1))
    block_start = int(ends[first - 1]) if first else 0
    start, stop = max(lo, block_start), min(hi, int(ends[last - 1]))
    return Window(epoch.blocks[first:last], start - block_start, stop - start, start - lo)
