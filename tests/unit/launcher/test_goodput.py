"""Goodput and the surviving history, on runs whose every second is known."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.goodput import Goodput, goodput
from launcher.history import Attempt, History, attempts_of


class Told:
    """Writes the events and records of a run; times are seconds after its start."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []
        self.records: list[dict[str, Any]] = []

    def event(self, time: float, kind: str, attempt: int, step: int | None = None, **details: Any) -> None:
        self.events.append({"time": time, "kind": kind, "attempt": attempt, "step": step, **details})

    def start(self, time: float, attempt: int, world_size: int = 2, **details: Any) -> None:
        self.event(time, "attempt_started", attempt, stage="pretrain", world_size=world_size, zero_stage=1, device="cpu", **details)

    def step(self, time: float, attempt: int, step: int, length: float = 1.0, *, wait: float = 0.0, stall: float = 0.0) -> None:
        values = {"time": time, "step_s": length, "data_wait_s": wait, "checkpoint_stall_s": stall}
        self.records.append({"step": step, "attempt": attempt, **values})

    def read(self) -> tuple[list[Attempt], Goodput, History]:
        history = History.of(self.records, self.events)
        attempts = attempts_of(self.events, history)
        return attempts, goodput(attempts, history, self.events), history


def spent(found: Goodput) -> dict[str, float]:
    return {cause: round(seconds, 6) for cause, seconds in found.seconds.items() if seconds}


def test_a_run_with_a_loss_a_stop_and_growth_accounts_for_every_second() -> None:
    told = Told()
    told.start(0.0, 1)
    told.step(11.0, 1, 0)  # 10 s of start-up
    told.step(13.0, 1, 1, 2.0, wait=0.5)
    told.event(14.0, "validation", 1, 2)  # took 1 s
    told.step(17.5, 1, 2, stall=2.0)  # validation 1, stall 2, 0.5 unaccounted
    told.step(18.5, 1, 3)
    told.event(20.5, "worker_failed", 1, failure="infrastructure", cause="killed")  # 2 s to notice
    told.start(23.5, 2)  # 3 s down
    told.event(27.0, "resumed", 2, 2)
    told.step(28.5, 2, 2)  # 4 s start-up
    told.step(29.5, 2, 3)
    told.event(30.0, "checkpoint_committed", 2, 4)
    told.event(30.5, "stopped", 2, 4, cause="requested")
    told.event(31.0, "stopped", 0, cause="asked by a person")
    told.event(1000.0, "command_started", 0)
    told.start(1001.0, 3)
    told.event(1002.0, "resumed", 3, 4)
    told.step(1003.0, 3, 4)
    told.event(1003.5, "stopped", 3, 5, cause="requested")
    told.event(1003.75, "resized", 3, before=2, after=3)
    told.start(1004.0, 4, world_size=3)
    told.event(1004.5, "resumed", 4, 5)
    told.step(1006.0, 4, 5)
    told.event(1006.25, "validation", 4, 6)
    told.event(1006.5, "checkpoint_committed", 4, 6)
    told.event(1007.0, "stage_finished", 4, stage="pretrain", elapsed_s=5.0)
    told.event(1008.0, "preempted", 4)  # while it fine-tuned
    attempts, found, history = told.read()

    assert spent(found) == {
        "useful": 1.0 + 1.5 + 2.0 + 1.0 + 1.0,  # steps 0, 1 | 2, 3 | 4 | 5
        "start_up": 10.0 + 4.0 + 1.0,
        "repeated": 2.0,
        "down": 2.0 + 3.0,
        "checkpoint": 2.0 + 0.5 + 0.25,
        "data_wait": 0.5,
        "validation": 1.25,
        "growth": 0.5 + 0.5 + 1.0,
        "shut_down": 0.5 + 0.5,
        "other": 0.5,
    }
    assert found.paused_s == 1001.0 - 30.5
    assert found.wall_s == pytest.approx(1007.0 - found.paused_s)
    assert found.to_json()["goodput"] == round(found.seconds["useful"] / found.wall_s, 4)

    assert [(each.number, each.ended, each.world_size, each.first_step, each.last_step, each.resumed_at) for each in attempts] == [
        (1, "failed", 2, 0, 3, None),
        (2, "stopped", 2, 2, 3, 2),
        (3, "resized", 2, 4, 4, 4),
        (4, "finished", 3, 5, 5, 5),
    ]
    assert attempts[0].cause == "killed"
    kept = history.surviving()
    assert list(zip(kept.step.tolist(), kept.attempt.tolist(), strict=True)) == [(0, 1), (1, 1), (2, 2), (3, 2), (4, 3), (5, 4)]


@pytest.mark.parametrize(
    ("failure", "ended"), [("infrastructure", "failed"), ("preemption", "preempted"), ("numeric", "rewound"), ("known", "failed")]
)
def test_an_attempt_ends_as_the_launcher_says_and_fewer_ranks_after_a_loss_are_no_growth(failure: str, ended: str) -> None:
    told = Told()
    told.start(0.0, 1)
    told.event(3.0, "preempted", 1, nodes=["a"])  # the announcement, not the end
    told.step(4.0, 1, 0, 4.0)
    if failure == "preemption":
        told.event(5.0, "stopped", 1, 1, cause="requested")
    told.event(5.0, "worker_failed", 1, failure=failure, cause="why")
    told.event(5.0, "resized", 1, before=2, after=1)
    told.start(6.0, 2, world_size=1)
    told.event(6.0, "resumed", 2, 1)
    told.step(8.0, 2, 1)
    (first, _), found, _ = told.read()
    assert (first.ended, first.ended_at, first.cause, first.grew) == (ended, 5.0, "why", False)
    lost = {"shut_down": 1.0, "down": 1.0} if failure == "preemption" else {"down": 2.0}
    assert spent(found) == {"useful": 5.0, "start_up": 1.0, **lost}


def test_starting_ray_and_waiting_for_nodes_is_start_up() -> None:
    told = Told()
    told.start(0.0, 1, cluster_s=30.0)
    told.step(5.0, 1, 0)
    told.event(6.0, "worker_failed", 1, failure="infrastructure", cause="killed")
    told.start(20.0, 2, cluster_s=12.0)
    told.step(25.0, 2, 0)
    attempts, found, _ = told.read()
    assert [(each.asked_at, each.started_at) for each in attempts] == [(-30.0, 0.0), (8.0, 20.0)]
    assert spent(found) == {"start_up": 34.0 + 16.0, "repeated": 1.0, "down": 1.0 + 2.0, "useful": 1.0}


def test_a_run_that_is_at_work_ends_with_its_last_step() -> None:
    told = Told()
    told.start(0.0, 1)
    assert told.read()[1].wall_s == 0.0
    told.step(5.0, 1, 0)
    (attempt,), found, _ = told.read()
    assert (attempt.ended, attempt.ended_at) == ("running", None)
    assert spent(found) == {"start_up": 4.0, "useful": 1.0}


def test_an_attempt_that_took_no_step_is_start_up_and_clocks_that_go_backwards_lose_no_time() -> None:
    told = Told()
    told.start(0.0, 1)
    told.event(6.0, "worker_failed", 1, cause="no memory")
    told.start(5.0, 2)
    told.step(10.0, 2, 0)
    told.step(9.0, 2, 1)
    told.step(12.0, 2, 2, 5.0)
    _, found, _ = told.read()
    assert spent(found) == {"start_up": 6.0 + 3.0, "useful": 1.0 + 2.0}
    assert found.wall_s == 12.0


def test_the_end_of_a_lost_driver_is_when_it_was_last_seen() -> None:
    told = Told()
    told.start(0.0, 1)
    told.step(2.0, 1, 0)
    told.event(500.0, "worker_failed", 1, cause="the command that ran it was killed", seen_at=2.0)
    (attempt,), _, _ = told.read()
    assert attempt.ended_at == 2.0


def test_a_rewind_drops_what_it_went_behind_and_a_fresh_start_everything() -> None:
    told = Told()
    for attempt, first in ((1, 0), (2, 4), (3, 1)):
        told.start(attempt, attempt)
        if first:
            told.event(attempt, "resumed", attempt, first)
        for step in range(first, first + 5):
            told.step(attempt, attempt, step, 0.0)
    kept = told.read()[2].surviving()
    assert list(zip(kept.step.tolist(), kept.attempt.tolist(), strict=True)) == [(0, 1), *((step, 3) for step in range(1, 6))]
    told.start(4.0, 4)
    told.step(4.0, 4, 0)
    kept = told.read()[2].surviving()
    assert list(zip(kept.step.tolist(), kept.attempt.tolist(), strict=True)) == [(0, 4)]


TIMES = st.floats(0.0, 50.0)
STEPS = st.lists(st.tuples(TIMES, TIMES, TIMES, TIMES), max_size=5)
ENDS = st.sampled_from(["worker_failed", "stopped", "failed", "resized", "stage_finished", "checkpoint_committed", "validation"])


@given(st.lists(st.tuples(TIMES, STEPS, st.lists(st.tuples(TIMES, ENDS), max_size=4), st.integers(0, 3)), min_size=1, max_size=5))
def test_whatever_is_recorded_the_parts_add_up(attempts: list[Any]) -> None:
    """Clocks that jump, waits longer than their steps, ends before the last step: every second is somewhere, and none is negative."""
    told, now = Told(), 0.0
    for number, (pause, steps, ends, resumed_at) in enumerate(attempts, 1):
        now += pause
        told.start(now, number)
        if number > 1:
            told.event(now, "resumed", number, resumed_at)
        for step, (after, length, wait, stall) in enumerate(steps, resumed_at):
            told.step(now + after, number, step, length, wait=wait, stall=stall)
        for after, kind in ends:
            told.event(now + after, kind, number, 1, stage="pretrain", before=1, after=2)
    _, found, _ = told.read()
    assert min(found.seconds.values()) >= 0.0
    assert found.paused_s >= 0.0
    ends_at = [record["time"] for record in told.records] + [event["time"] for event in told.events]
    assert found.wall_s + found.paused_s <= max(ends_at) - told.events[0]["time"] + 1e-6
