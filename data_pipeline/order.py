"""Order of the data as arithmetic: epochs, lanes, windows and the ranks' shares (pure)."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from data_pipeline.config import Phase
from data_pipeline.hashing import mix64

WINDOW_SAMPLES = 2048
"""Samples a window aims at: enough neighbours of equal length for next-sentence negatives, a few MB in memory."""


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
    """A run of whole blocks of a lane (partial at the lane's ends), shuffled together."""

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


def epoch_order(samples_per_block: NDArray[np.integer], key: int) -> Epoch:
    """The blocks sorted by a hash keyed with `key`. Costs a sort of all blocks, once an epoch."""
    hashes = mix64(key, np.arange(len(samples_per_block)))
    blocks = np.argsort(hashes, kind="stable")
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


def find_window(epoch: Epoch, lane: tuple[int, int], offset: int, num_blocks: int) -> Window:
    """The window of `num_blocks` blocks that holds the sample at `offset` of the lane [lo, hi)."""
    lo, hi = lane
    ends = epoch.sample_ends
    lane_first = int(np.searchsorted(ends, lo, side="right"))
    block = int(np.searchsorted(ends, lo + offset, side="right"))
    first = lane_first + (block - lane_first) // num_blocks * num_blocks
    last = min(first + num_blocks, int(np.searchsorted(ends, hi, side="left")) + 1)
    block_start = int(ends[first - 1]) if first else 0
    start, stop = max(lo, block_start), min(hi, int(ends[last - 1]))
    return Window(epoch.blocks[first:last], start - block_start, stop - start, start - lo)
