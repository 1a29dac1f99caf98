"""Epochs, lanes, windows and ranks as arithmetic."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.config import BatchConfig, PhaseConfig
from data_pipeline.order import (
    blocks_per_window,
    epoch_order,
    find_window,
    lane_bounds,
    lane_spans,
    micro_batches_of_step,
    micro_steps,
    rank_micro_batches,
)

BLOCKS = st.lists(st.integers(1, 30), min_size=1, max_size=40)


@given(st.integers(1, 200), st.integers(1, 64))
def test_ranks_share_a_step(num_micro_batches: int, world_size: int) -> None:
    parts = [rank_micro_batches(num_micro_batches, rank, world_size) for rank in range(world_size)]
    assert [number for part in parts for number in part] == list(range(num_micro_batches))
    sizes = [len(part) for part in parts]
    assert max(sizes) - min(sizes) <= 1
    assert max(sizes) == micro_steps(num_micro_batches, world_size)


@given(BLOCKS, st.integers(1, 8), st.integers(1, 5), st.integers(0, 2**63))
def test_windows_of_all_lanes_use_every_chunk_once(samples: list[int], num_lanes: int, num_blocks: int, key: int) -> None:
    epoch = epoch_order(np.array(samples, dtype=np.uint32), key)
    seen: list[tuple[int, int]] = []
    for lane in range(num_lanes):
        lo, hi = lane_bounds(sum(samples), num_lanes, lane)
        offset = 0
        while offset < hi - lo:
            window = find_window(epoch, (lo, hi), offset, num_blocks)
            assert window.first == offset
            assert 1 <= len(window.blocks) <= num_blocks
            chunks = [(int(block), chunk) for block in window.blocks for chunk in range(samples[block])]
            seen += chunks[window.skip : window.skip + window.num_samples]
            offset += window.num_samples
        assert offset == hi - lo
    assert sorted(seen) == [(block, chunk) for block, count in enumerate(samples) for chunk in range(count)]


@given(BLOCKS, st.integers(1, 6), st.integers(1, 5), st.data())
def test_a_window_is_found_from_any_of_its_samples(samples: list[int], num_lanes: int, num_blocks: int, data: st.DataObject) -> None:
    epoch = epoch_order(np.array(samples), 3)
    lo, hi = lane_bounds(sum(samples), num_lanes, data.draw(st.integers(0, num_lanes - 1)))
    if lo == hi:
        return
    offset = data.draw(st.integers(0, hi - lo - 1))
    window = find_window(epoch, (lo, hi), offset, num_blocks)
    assert window.first <= offset < window.first + window.num_samples
    again = find_window(epoch, (lo, hi), window.first, num_blocks)
    assert (again.blocks == window.blocks).all()
    assert (again.first, again.skip, again.num_samples) == (window.first, window.skip, window.num_samples)


@given(st.integers(0, 10**9), st.integers(1, 5000))
def test_lanes_differ_by_at_most_one(num_samples: int, num_lanes: int) -> None:
    bounds = [lane_bounds(num_samples, num_lanes, lane) for lane in range(num_lanes)]
    assert (bounds[0][0], bounds[-1][1]) == (0, num_samples)
    assert all(left[1] == right[0] for left, right in pairwise(bounds))
    sizes = [hi - lo for lo, hi in bounds]
    assert max(sizes) - min(sizes) <= 1


@given(st.integers(1, 50), st.integers(0, 500), st.integers(0, 200))
def test_spans_cross_epochs(lane_length: int, start: int, count: int) -> None:
    spans = list(lane_spans(lane_length, start, start + count))
    positions = [span.epoch * lane_length + offset for span in spans for offset in range(span.start, span.stop)]
    assert positions == list(range(start, start + count))
    assert all(0 <= span.start < span.stop <= lane_length for span in spans)


def test_epochs_differ_and_repeat() -> None:
    samples = np.full(100, 5)
    first, second, again = epoch_order(samples, 1), epoch_order(samples, 2), epoch_order(samples, 1)
    assert (first.blocks == again.blocks).all()
    assert (first.blocks != second.blocks).any()
    assert sorted(first.blocks) == list(range(100))


def test_windows_hold_about_two_thousand_samples() -> None:
    assert blocks_per_window(num_samples=100 * 1000, num_blocks=1000) == 20
    assert blocks_per_window(num_samples=5000 * 1000, num_blocks=1000) == 1
    assert blocks_per_window(num_samples=30, num_blocks=3) == 3


def test_steps_of_phases() -> None:
    batch = BatchConfig(
        global_batch_size=8, micro_batch_size=2, sequence_length=32, phases=(PhaseConfig(from_step=3, sequence_length=64, global_batch_size=4),)
    )
    phases = batch.phases_until(5)
    steps = [list(micro_batches_of_step(phases, step)) for step in range(5)]
    assert steps == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12, 13], [14, 15]]
    with pytest.raises(IndexError, match=r"step 5 is not in 0\.\.4"):
        micro_batches_of_step(phases, 5)
