"""Epochs, lanes, windows and ranks as arithmetic."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.config import BatchConfig, PhaseConfig
from data_pipeline.errors import ConfigError
from data_pipeline.hashing import mix64
from data_pipeline.mixture import HORIZON, Shares
from data_pipeline.order import (
    Epoch,
    balanced_order,
    binary_spread,
    blocks_per_window,
    epoch_order,
    find_window,
    golden_spread,
    lane_bounds,
    lane_spans,
    micro_batches_of_step,
    micro_steps,
    rank_micro_batches,
)

BLOCKS = st.lists(st.integers(1, 30), min_size=1, max_size=40)


def _epoch(samples_per_block: list[int], key: int) -> Epoch:
    samples = np.array(samples_per_block, dtype=np.uint32)
    return epoch_order(samples, samples * 20 + 7, key)


@given(st.integers(1, 200), st.integers(1, 64))
def test_ranks_share_a_step(num_micro_batches: int, world_size: int) -> None:
    parts = [rank_micro_batches(num_micro_batches, rank, world_size) for rank in range(world_size)]
    assert [number for part in parts for number in part] == list(range(num_micro_batches))
    sizes = [len(part) for part in parts]
    assert max(sizes) - min(sizes) <= 1
    assert max(sizes) == micro_steps(num_micro_batches, world_size)


@given(BLOCKS, st.integers(1, 8), st.integers(1, 5), st.integers(0, 2**63))
def test_windows_of_all_lanes_use_every_chunk_once(samples: list[int], num_lanes: int, num_blocks: int, key: int) -> None:
    epoch = _epoch(samples, key)
    seen: list[tuple[int, int]] = []
    for lane in range(num_lanes):
        lo, hi = lane_bounds(sum(samples), num_lanes, lane)
        offset = 0
        while offset < hi - lo:
            window = find_window(epoch, (lo, hi), offset, num_blocks)
            assert window.first == offset
            assert 1 <= len(window.blocks) < 2 * num_blocks
            chunks = [(int(block), chunk) for block in window.blocks for chunk in range(samples[block])]
            seen += chunks[window.skip : window.skip + window.num_samples]
            offset += window.num_samples
        assert offset == hi - lo
    assert sorted(seen) == [(block, chunk) for block, count in enumerate(samples) for chunk in range(count)]


@given(BLOCKS, st.integers(1, 6), st.integers(1, 5), st.data())
def test_a_window_is_found_from_any_of_its_samples(samples: list[int], num_lanes: int, num_blocks: int, data: st.DataObject) -> None:
    epoch = _epoch(samples, 3)
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
    first, second, again = (_epoch([5] * 100, key) for key in (1, 2, 1))
    assert (first.blocks == again.blocks).all()
    assert (first.blocks != second.blocks).any()
    assert sorted(first.blocks) == list(range(100))


def test_windows_hold_about_four_thousand_samples() -> None:
    assert blocks_per_window(num_samples=100 * 1000, num_blocks=1000) == 40
    assert blocks_per_window(num_samples=5000 * 1000, num_blocks=1000) == 1
    assert blocks_per_window(num_samples=30, num_blocks=3) == 3


@pytest.mark.parametrize("num_samples", [64, 4096, 5000])
def test_runs_of_a_balanced_order_have_equal_means(num_samples: int) -> None:
    sizes = np.random.default_rng(0).integers(10, 513, num_samples)
    keys = mix64(7, np.arange(num_samples))
    for spread in (binary_spread(0, num_samples), binary_spread(640, num_samples), golden_spread(num_samples)):
        order = balanced_order(sizes, keys, spread, neighbours=8)
        assert sorted(order) == list(range(num_samples))
        means = sizes[order][: num_samples // 64 * 64].reshape(-1, 64).mean(axis=1)
        random = sizes[np.argsort(keys)][: num_samples // 64 * 64].reshape(-1, 64).mean(axis=1)
        assert means.std() <= 0.3 * random.std() + 1e-9


def test_a_balanced_order_is_shuffled() -> None:
    sizes = np.repeat([1.0, 2.0], 500)
    one, two = (balanced_order(sizes, mix64(key, np.arange(1000)), binary_spread(0, 1000), neighbours=8) for key in (1, 2))
    assert (one == two).mean() < 0.05
    assert np.abs(np.diff(one)).mean() > 200


@pytest.mark.parametrize(("samples_per_block", "balanced"), [(100, True), (3000, False)])
def test_blocks_of_an_epoch_are_balanced_where_windows_hold_several(samples_per_block: int, balanced: bool) -> None:
    random = np.random.default_rng(1)
    samples, tokens = np.full(4000, samples_per_block), random.integers(20, 500, 4000) * samples_per_block
    blocks = epoch_order(samples, tokens, 3).blocks
    assert sorted(blocks) == list(range(4000))
    of_runs, of_chance = (np.std([tokens[order[at : at + 40]].mean() for at in range(0, 4000, 40)]) for order in (blocks, random.permutation(4000)))
    assert bool(of_runs < 0.3 * of_chance) is balanced


def test_binary_spread_reverses_bits() -> None:
    assert binary_spread(0, 8).tolist() == [0, 0.5, 0.25, 0.75, 0.125, 0.625, 0.375, 0.875]
    assert binary_spread(5, 2).tolist() == [0.625, 0.375]


_SHARES = st.lists(st.floats(0.05, 10), min_size=1, max_size=5)


@given(_SHARES, st.integers(0, 10**7), st.integers(0, 3000), st.integers(0, 10**5))
def test_shares_of_a_mixture_cover_a_lane(weights: list[float], start: int, count: int, turn: int) -> None:
    """Positions of the corpora add up, follow on from each other, and are never far from their share, wherever the lane's pattern begins."""
    shares = Shares.of(weights)
    ranges = [shares.positions(corpus, start, start + count, turn) for corpus in range(len(weights))]
    assert sum(last - first for first, last in ranges) == count
    assert all(shares.positions(corpus, 0, start, turn) == (0, first) for corpus, (first, _) in enumerate(ranges))
    for counts, (_, last) in zip(shares.counts, ranges, strict=True):
        assert abs(last - (start + count) * counts / HORIZON) < 2 * len(weights)
    assert [shares.positions(corpus, start, start + HORIZON, turn) for corpus in range(len(weights))] == [
        (first, first + count) for (first, _), count in zip(ranges, shares.counts, strict=True)
    ]


def test_shares_are_exact_over_the_horizon() -> None:
    assert Shares.of([7, 2, 1]).counts == (700, 200, 100)
    assert Shares.of([1, 1, 1]).counts == (334, 333, 333)
    assert [Shares.of([7, 2, 1]).positions(corpus, 1000 * 5, 1000 * 9, turn=0) for corpus in range(3)] == [(3500, 6300), (1000, 1800), (500, 900)]
    with pytest.raises(ConfigError, match="less than 1 in 1000"):
        Shares.of([1, 0.0001])


@pytest.mark.parametrize("num_micro_batches", [1, 6, 32])
def test_a_thousand_world_sizes_and_offsets_without_io(num_micro_batches: int) -> None:
    """Whatever the ranks, a step consumes the same micro-batches and these the same samples, in the same order, once each."""
    epoch = _epoch([7 + block % 5 for block in range(200)], 11)
    num_samples, micro = int(epoch.sample_ends[-1]), 3
    phases = BatchConfig(global_batch_size=micro * num_micro_batches, micro_batch_size=micro, sequence_length=32).phases_until(10_000)

    def samples_of(number: int) -> list[tuple[int, int]]:
        depth, lane = divmod(number, num_micro_batches)
        lo, hi = lane_bounds(num_samples, num_micro_batches, lane)
        found: list[tuple[int, int]] = []
        for span in lane_spans(hi - lo, depth * micro, (depth + 1) * micro):
            for offset in range(span.start, span.stop):
                window = find_window(epoch, (lo, hi), offset, 4)
                assert 0 <= offset - window.first < window.num_samples
                found.append((span.epoch, lo + offset))
        return found

    combinations = 0
    for first_step in (0, 1, 7, 100, 1234, 9_990):
        whole = [[samples_of(number) for number in micro_batches_of_step(phases, step)] for step in range(first_step, first_step + 3)]
        for world_size in range(1, 65):
            for nth, expected in enumerate(whole):
                step = micro_batches_of_step(phases, first_step + nth)
                parts = [rank_micro_batches(num_micro_batches, rank, world_size) for rank in range(world_size)]
                assert [samples_of(step[place]) for part in parts for place in part] == expected
            combinations += 1
    assert combinations * 3 > 1000
    seen = [place for number in range(num_micro_batches * (num_samples // (micro * num_micro_batches))) for _, place in samples_of(number)]
    assert len(set(seen)) == len(seen)


def test_a_batch_size_warm_up_continues_the_epoch_another_length_does_not() -> None:
    later = (
        PhaseConfig(from_step=3, global_batch_size=8),
        PhaseConfig(from_step=5, global_batch_size=12),
        PhaseConfig(from_step=6, global_batch_size=6, sequence_length=64),
    )
    phases = BatchConfig(global_batch_size=4, micro_batch_size=2, sequence_length=32, phases=later).phases_until(8)
    assert [phase.num_micro_batches for phase in phases] == [2, 4, 6, 3]
    assert [(phase.series, phase.series_first_micro_batch, phase.num_lanes) for phase in phases] == [(0, 0, 6), (0, 0, 6), (0, 0, 6), (1, 20, 3)]
    numbers = [number for step in range(8) for number in micro_batches_of_step(phases, step)]
    assert numbers == list(range(26))


@given(st.integers(1, 40))
def test_a_longer_schedule_changes_no_micro_batch(num_steps: int) -> None:
    """A run may be given more steps: what it has read so far must not depend on phases that lay behind its end."""
    later = (
        PhaseConfig(from_step=5, global_batch_size=8),
        PhaseConfig(from_step=9, global_batch_size=12),
        PhaseConfig(from_step=15, sequence_length=64),
        PhaseConfig(from_step=30, sequence_length=64, global_batch_size=16),
    )
    batch = BatchConfig(global_batch_size=4, micro_batch_size=2, sequence_length=32, phases=later)
    whole, cut = batch.phases_until(40), batch.phases_until(num_steps)
    assert [phase.model_copy(update={"num_steps": 0}) for phase in cut] == [phase.model_copy(update={"num_steps": 0}) for phase in whole[: len(cut)]]
    assert sum(phase.num_steps for phase in cut) == num_steps


def test_steps_of_phases() -> None:
    batch = BatchConfig(
        global_batch_size=8, micro_batch_size=2, sequence_length=32, phases=(PhaseConfig(from_step=3, sequence_length=64, global_batch_size=4),)
    )
    phases = batch.phases_until(5)
    steps = [list(micro_batches_of_step(phases, step)) for step in range(5)]
    assert steps == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12, 13], [14, 15]]
    with pytest.raises(IndexError, match=r"step 5 is not in 0\.\.4"):
        micro_batches_of_step(phases, 5)
