"""Contestants: interleaved, each in a process of its own on one core; a peer's failure is a result, ours is an error."""

import os
import sys
from itertools import repeat

import pytest

from benchmarks.children import Contestant, ContestantError, interleaved, measure, timed_rate


def _contestant(name: str, function: str, is_ours: bool = False, **arguments: object) -> Contestant:
    return Contestant(name, sys.executable, function, arguments, is_ours)


def _silent(message: str) -> None:
    del message


def test_every_contestant_runs_once_a_round_and_rounds_are_rotated() -> None:
    contestants = [_contestant(name, "x:y") for name in "abc"]
    order = [(position, contestant.name) for position, contestant in interleaved(contestants, 4)]
    assert ["".join(name for position, name in order if position == nth) for nth in range(4)] == ["abc", "bca", "cab", "abc"]


def test_a_contestant_runs_in_another_process_on_one_core_with_one_thread() -> None:
    here = "tests.unit.benchmarks.contestants:report"
    runs = measure([_contestant("one", here, value=3), _contestant("two", here, value=4)], 2, _silent)
    assert {name: found.values("value") for name, found in runs.items()} == {"one": [3, 3], "two": [4, 4]}
    for found in runs.values():
        for measurement in found.measurements:
            assert measurement["pid"] != os.getpid()
            assert measurement["cores"] == 1
            assert measurement["threads"] == "1"


def test_the_failure_of_a_peer_is_its_result() -> None:
    runs = measure([_contestant("good", "tests.unit.benchmarks.contestants:report", value=1), _contestant("bad", "os:no_such_function")], 2, _silent)
    assert runs["good"].values("value") == [1, 1]
    assert runs["bad"].failure == "bad exited with 1:"
    assert runs["bad"].values("value") == []


def test_a_failure_of_ours_is_an_error_that_shows_its_output() -> None:
    with pytest.raises(ContestantError, match="no_such_function"):
        measure([_contestant("ours", "os:no_such_function", is_ours=True)], 1, _silent)


def test_a_rate_counts_by_cpu_time_what_came_after_the_warm_up() -> None:
    found = timed_rate(repeat({"documents": 2, "bytes": 10}), seconds=0.05, warm_up_s=0.01)
    assert found["bytes_per_s"] == pytest.approx(5 * found["documents_per_s"])
    assert found["documents_per_s"] == pytest.approx(found["counts"]["documents"] / found["cpu_s"])
    assert found["wall_s"] >= 0.05
