"""The size of a worker group: legal, large enough to pay, no larger; and the same for the same nodes."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.elastic import Node, Pace, Work, after_steps, choose_size, count_places, pays, rounds, threads_per_worker

works = st.lists(st.builds(Work, st.integers(1, 1000), st.integers(1, 64)), min_size=1, max_size=4)


def one(num_micro_batches: int, num_steps: int = 10) -> list[Work]:
    return [Work(num_steps, num_micro_batches)]


@pytest.mark.parametrize(
    ("places", "micro_batches", "size"),
    [
        (1, 8, 1),
        (2, 8, 2),
        (3, 8, 3),  # 3 rounds instead of 4
        (4, 8, 4),
        (5, 8, 4),  # a fifth rank would not make a round fewer
        (7, 8, 4),
        (8, 8, 8),
        (100, 8, 8),
        (1000, 1024, 512),
        (5, 4, 4),
    ],
)
def test_the_fewest_ranks_with_the_fewest_rounds(places: int, micro_batches: int, size: int) -> None:
    assert choose_size(places, 1, None, one(micro_batches)) == size


def test_bounds() -> None:
    assert choose_size(1, 2, 4, one(8)) is None
    assert choose_size(2, 2, 4, one(8)) == 2
    assert choose_size(9, 2, 4, one(8)) == 4
    assert choose_size(9, 5, 5, one(8)) == 5  # a fixed number stays what was asked for
    assert choose_size(3, 1, None, []) == 1


@given(st.integers(1, 100), st.integers(1, 8), st.integers(0, 100), works)
def test_the_size_is_legal_and_no_other_is_better(places: int, minimum: int, more: int, work: list[Work]) -> None:
    maximum = minimum + more
    size = choose_size(places, minimum, maximum, work)
    if places < minimum:
        assert size is None
        return
    assert size is not None
    assert minimum <= size <= min(places, maximum)
    assert size <= max(minimum, *(part.num_micro_batches for part in work))
    for other in range(minimum, min(places, maximum) + 1):
        assert rounds(work, size) <= rounds(work, other)
        assert rounds(work, size) < rounds(work, other) or size <= other


@given(st.integers(1, 64), st.integers(1, 64), works)
def test_more_places_never_make_a_run_longer_and_growth_ends(places: int, more: int, work: list[Work]) -> None:
    small, large = choose_size(places, 1, None, work), choose_size(places + more, 1, None, work)
    assert small is not None
    assert large is not None
    assert rounds(work, large) <= rounds(work, small)
    pace = Pace(age_s=1e9, first_step=0, step=1, start_up_s=0.0)
    assert pays(small, large, work, pace) == (rounds(work, large) < rounds(work, small))
    assert not pays(large, large, work, pace)


@given(st.integers(1, 64), st.integers(1, 64), works, st.floats(0.001, 1000.0), st.floats(0.1, 1000.0))
def test_growth_pays_when_it_saves_more_than_a_start_up(small: int, more: int, work: list[Work], step_s: float, start_up_s: float) -> None:
    num_steps = 10 + math.ceil(start_up_s / step_s)
    pace = Pace(age_s=start_up_s + num_steps * step_s, first_step=5, step=6 + num_steps, start_up_s=start_up_s, paced_from=6)
    round_s = step_s / rounds([Work(1, work[0].num_micro_batches)], small)
    saved_s = round_s * (rounds(work, small) - rounds(work, small + more))
    if abs(saved_s - start_up_s) > 1e-6 * start_up_s:
        assert pays(small, small + more, work, pace) == (saved_s > start_up_s)
    assert not pays(small, small + more, work, Pace())
    assert not pays(small, small + more, [], pace)


def test_the_pace_of_an_attempt() -> None:
    pace = Pace()
    for step in (None, None, 40, 40, 41, 43, 43, None, 45):
        pace = pace.after(step, 2.0)
    assert (pace.first_step, pace.num_steps, pace.start_up_s) == (40, 5, 10.0)
    assert pace.worked_s == 8.0
    assert pace.step_s == 2.0
    assert Pace().after(3, 1.0).step_s is None


@given(works, st.integers(0, 5000))
def test_what_remains_after_some_steps(work: list[Work], num_steps: int) -> None:
    left = after_steps(work, num_steps)
    total = sum(part.num_steps for part in work)
    assert sum(part.num_steps for part in left) == max(0, total - num_steps)
    assert [part.num_micro_batches for part in left] == [part.num_micro_batches for part in work][len(work) - len(left) :]
    assert all(part.num_steps for part in left)


@given(st.integers(1, 256), st.integers(1, 256))
def test_the_rounds_of_one_step_are_those_of_the_data(num_micro_batches: int, num_workers: int) -> None:
    from data_pipeline.order import micro_steps

    assert rounds(one(num_micro_batches, num_steps=1), num_workers) == micro_steps(num_micro_batches, num_workers)


def test_phases_count_by_their_steps() -> None:
    """Neither a warm-up of the batch size nor a short last phase holds the run at the few ranks that it can use itself."""
    assert choose_size(16, 1, None, [Work(500, 4), Work(90_000, 16)]) == 16
    assert choose_size(16, 1, None, [Work(90_000, 16), Work(500, 4)]) == 16


def test_places() -> None:
    nodes = [Node("10.0.0.1", 8, 0, 8, 0), Node("10.0.0.2", 16, 4, 4, 2)]
    assert count_places(nodes, 1, use_gpu=False, free=False) == 24
    assert count_places(nodes, 3, use_gpu=False, free=False) == 2 + 5  # a rank lies on one node
    assert count_places(nodes, 3, use_gpu=False, free=True) == 2 + 1
    assert count_places(nodes, 2, use_gpu=True, free=False) == 4
    assert count_places(nodes, 2, use_gpu=True, free=True) == 2
    assert count_places([], 1, use_gpu=False, free=True) == 0


def test_threads() -> None:
    nodes = [Node("a", 8, 0, 8, 0), Node("b", 16, 4, 16, 4), Node("head", 0, 0, 0, 0)]
    assert threads_per_worker(nodes, None, use_gpu=False) == 8
    assert threads_per_worker(nodes, 4, use_gpu=False) == 4
    assert threads_per_worker(nodes, 3, use_gpu=False) == 4
    assert threads_per_worker(nodes, None, use_gpu=True) == 4
    assert threads_per_worker([], 4, use_gpu=False) == 1


@given(st.lists(st.integers(1, 64), min_size=1, max_size=8), st.integers(1, 8))
def test_automatic_threads_leave_a_place_for_every_rank(cpus: list[int], per_node: int) -> None:
    """Unless the smallest node has fewer CPUs than ranks, which no number of threads cures."""
    nodes = [Node(str(number), count, 0, count, 0) for number, count in enumerate(cpus)]
    wanted = per_node * len(nodes)
    threads = threads_per_worker(nodes, wanted, use_gpu=False)
    assert count_places(nodes, threads, use_gpu=False, free=False) >= min(wanted, sum(min(count, per_node) for count in cpus))
    assert threads <= min(cpus)
