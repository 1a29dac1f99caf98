"""Who is named when ranks stand still, and who is not: silence, stops, hangs, and what only looks like them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.health import (
    BEATS_PER_S,
    DEADLINES_S,
    FIRST_S,
    SILENCE_S,
    UNHEARD,
    Beat,
    Deadlines,
    Health,
    Seen,
    State,
    Verdict,
    beat_interval_s,
    judge,
)

STEP_PHASES = ("data", "agree", "forward", "backward", "forward", "backward", "optimizer")
"""Of a step with two micro-batches."""
DEADLINES = Deadlines.for_stage(trains=True, data_s=0.0, fresh_steps=(), interval_s=0.5)


@dataclass
class Ranks:
    """Ranks that the test moves, and the driver that follows them once a second."""

    world_size: int
    health: Health = field(default_factory=Health)
    seen: dict[int, Seen] = field(default_factory=dict[int, Seen])
    verdict: Verdict | None = None

    def __post_init__(self) -> None:
        self.beats = {rank: (1, Beat(5, "data", 1, 0, waits=False, longest_s=1.0)) for rank in range(self.world_size)}
        self.health = Health({}, dict.fromkeys(DEADLINES_S, 1.0))

    def pass_time(
        self, seconds: int, moves: Mapping[int, Beat | None] | None = None, *, silent: Sequence[int] = (), deadlines: Deadlines = DEADLINES
    ) -> None:
        """Every rank that is not silent beats each second; `moves` says where each is (None: it makes progress)."""
        for _ in range(seconds):
            for rank, (count, beat) in self.beats.items():
                if rank in silent:
                    continue
                to = (moves or {}).get(rank)
                progressed = replace(beat, step=beat.step + 1, moves=beat.moves + 5)
                self.beats[rank] = (count + 1, to or progressed)
            self.health = self.health.after(self.beats, 1.0)
            self.verdict = self.verdict or judge(self.health, self.seen, self.world_size, deadlines)


def at(step: int, phase: str, place: int = 3, *, waits: bool = False) -> Beat:
    """A rank that stays there."""
    return Beat(step, phase, 1000, place, waits, 1.0)


@given(st.integers(1, 40), st.data())
def test_a_stopped_rank_is_named_soon_and_nobody_else(world_size: int, data: st.DataObject) -> None:
    victim = data.draw(st.integers(0, world_size - 1))
    ranks = Ranks(world_size)
    ranks.pass_time(3)
    ranks.seen = {victim: Seen.STOPPED}
    others = {rank: at(9, "agree", waits=True) for rank in range(world_size) if rank != victim}
    ranks.pass_time(20, others, silent=[victim])
    assert ranks.verdict is not None
    assert (ranks.verdict.ranks, ranks.verdict.state) == ((victim,), State.STOPPED)
    assert ranks.verdict.seconds <= 15


@given(st.integers(2, 12), st.integers(0, len(STEP_PHASES) - 1), st.booleans(), st.data())
def test_the_hung_rank_is_named_not_those_that_wait_for_it(world_size: int, place: int, seen_to_wait: bool, data: st.DataObject) -> None:
    """Those that wait are ahead of it, or at the same place; a wait for a device is not seen, but is ahead."""
    victim, phase = data.draw(st.integers(0, world_size - 1)), STEP_PHASES[place]
    later = st.integers(place if seen_to_wait else place + 1, len(STEP_PHASES))
    places = [data.draw(later) for _ in range(world_size)]
    moves: dict[int, Beat | None] = {rank: at(7, "agree", at_place, waits=seen_to_wait) for rank, at_place in enumerate(places)}
    moves[victim] = at(7, phase, place)
    ranks = Ranks(world_size)
    ranks.pass_time(100, moves)
    assert ranks.verdict is not None
    assert (ranks.verdict.ranks, ranks.verdict.state, ranks.verdict.phase, ranks.verdict.step) == ((victim,), State.HUNG, phase, 7)
    assert ranks.verdict.seconds < 60


@given(st.integers(1, 8), st.lists(st.integers(1, 40), min_size=1, max_size=20), st.data())
def test_a_slow_rank_is_not_hung(world_size: int, pauses: list[int], data: st.DataObject) -> None:
    """Whatever the pace, as long as it moves within the deadline; the others wait for it all the time."""
    slow = data.draw(st.integers(0, world_size - 1))
    ranks = Ranks(world_size)
    for step, pause in enumerate(pauses, 10):
        moves: dict[int, Beat | None] = {rank: Beat(step, "agree", 1000 + step, 1, True, 1.0) for rank in range(world_size)}
        moves[slow] = Beat(step, "forward", 1000 + step, 2, False, 1.0)
        ranks.pass_time(pause, moves)
    assert ranks.verdict is None


def test_a_machine_that_is_overloaded_beats_late_and_is_left_alone() -> None:
    ranks = Ranks(2)
    ranks.seen = {0: Seen.ALIVE, 1: Seen.ALIVE}
    for _ in range(5):
        ranks.pass_time(60, silent=[0, 1])
        ranks.pass_time(2)
    assert ranks.verdict is None


def test_ranks_that_were_stopped_all_together_and_go_on_are_left_alone() -> None:
    """A container that is frozen for a moment: the driver, whose own pauses do not count, looks again when all beat."""
    ranks = Ranks(3)
    ranks.seen = dict.fromkeys(range(3), Seen.STOPPED)
    for _ in range(20):
        ranks.pass_time(5, silent=range(3))
        ranks.pass_time(1)
    assert ranks.verdict is None


@pytest.mark.parametrize("phase", DEADLINES_S)
def test_the_first_time_in_a_phase_may_take_long(phase: str) -> None:
    """Set-up, a compile, the first validation, the first snapshot."""
    ranks = Ranks(2)
    ranks.health = Health()
    first = Beat(3, phase, 7, 0, waits=False, longest_s=0.0)
    ranks.pass_time(int(FIRST_S) - 5, {0: first, 1: first})
    assert ranks.verdict is None
    ranks.pass_time(10, {0: first, 1: first})
    assert ranks.verdict is not None


def test_steps_with_new_shapes_may_compile_again() -> None:
    deadlines = Deadlines.for_stage(trains=True, data_s=0.0, fresh_steps=(9,), interval_s=0.5)
    ranks = Ranks(2)
    ranks.pass_time(400, {0: at(9, "forward"), 1: at(9, "forward")}, deadlines=deadlines)
    assert ranks.verdict is None
    ranks.pass_time(400, {0: at(10, "forward"), 1: at(10, "forward")}, deadlines=deadlines)
    assert ranks.verdict is not None


@pytest.mark.parametrize(("step", "may_take_long"), [(7, False), (8, True), (9, True), (10, False)])
def test_the_data_of_a_step_with_new_shapes_may_be_read_in_the_step_before(step: int, may_take_long: bool) -> None:
    deadlines = Deadlines.for_stage(trains=True, data_s=0.0, fresh_steps=(9,), interval_s=0.5)
    assert (deadlines.of(at(step, "data"), {"data": 0.1}) >= FIRST_S) == may_take_long


def test_a_phase_that_has_always_been_long_may_be_longer() -> None:
    ranks = Ranks(2)
    ranks.health = Health({}, {"validation": 200.0})
    ranks.pass_time(1500, {0: at(9, "validation"), 1: at(9, "validation", waits=True)})
    assert ranks.verdict is None


def test_a_slow_store_is_waited_for() -> None:
    deadlines = Deadlines.for_stage(trains=True, data_s=300.0, fresh_steps=(), interval_s=0.5)
    ranks = Ranks(2)
    ranks.pass_time(340, {0: at(9, "data"), 1: at(9, "agree", waits=True)}, deadlines=deadlines)
    assert ranks.verdict is None
    ranks.pass_time(30, {0: at(9, "data"), 1: at(9, "agree", waits=True)}, deadlines=deadlines)
    assert ranks.verdict is not None
    assert ranks.verdict.rank == 0


def test_other_stages_have_long_deadlines() -> None:
    deadlines = Deadlines.for_stage(trains=False, data_s=0.0, fresh_steps=(), interval_s=0.5)
    ranks = Ranks(2)
    ranks.pass_time(600, {0: at(9, "forward"), 1: at(9, "forward")}, deadlines=deadlines)
    assert ranks.verdict is None


def test_a_lost_node_names_all_its_ranks_once() -> None:
    ranks = Ranks(6)
    ranks.pass_time(60, {rank: at(9, "agree", waits=True) for rank in (0, 1, 2)}, silent=[3, 4, 5])
    assert ranks.verdict is not None
    assert (ranks.verdict.ranks, ranks.verdict.state) == ((3, 4, 5), State.SILENT)
    assert ranks.verdict.seconds == pytest.approx(SILENCE_S[Seen.NOTHING], abs=3)


def test_a_rank_that_never_began_is_named() -> None:
    ranks = Ranks(2)
    del ranks.beats[1]
    ranks.pass_time(int(FIRST_S) + 5, {0: at(0, "set-up")})
    assert ranks.verdict is not None
    assert (ranks.verdict.rank, ranks.verdict.state) == (1, State.SILENT)


def test_ranks_of_which_nobody_has_ever_heard_are_named() -> None:
    """The worker group does not come to life, and the controller waits for it without a limit."""
    ranks = Ranks(2)
    ranks.beats.clear()
    ranks.pass_time(int(FIRST_S) - 5)
    assert ranks.verdict is None
    ranks.pass_time(10)
    assert ranks.verdict is not None
    assert (ranks.verdict.ranks, ranks.verdict.state, ranks.verdict.phase) == ((0, 1), State.SILENT, "set-up")


def test_a_rank_that_never_joins_is_named_though_another_waits_for_it_in_silence() -> None:
    ranks = Ranks(2)
    ranks.beats = {0: (0, UNHEARD)}
    ranks.seen = {0: Seen.ALIVE}
    ranks.pass_time(int(FIRST_S) + 5, silent=[0])
    assert ranks.verdict is not None
    assert ranks.verdict.ranks == (1,)


@pytest.mark.parametrize(("seen", "state"), [(Seen.STOPPED, State.STOPPED), (Seen.GONE, State.SILENT)])
def test_a_process_that_is_stopped_or_gone_before_its_first_beat_is_named_soon(seen: Seen, state: State) -> None:
    ranks = Ranks(3)
    ranks.beats = dict.fromkeys(range(3), (0, UNHEARD))
    ranks.seen = {0: Seen.ALIVE, 1: seen, 2: Seen.NOTHING}
    ranks.pass_time(30, silent=range(3))
    assert ranks.verdict is not None
    assert (ranks.verdict.ranks, ranks.verdict.state, ranks.verdict.phase) == ((1,), state, "set-up")


@pytest.mark.parametrize("seen", [Seen.ALIVE, Seen.NOTHING])
def test_a_slow_set_up_is_no_hang_and_one_without_end_is(seen: Seen) -> None:
    """Libraries are imported from a cold share, and a node that does so is slow to answer whoever looks at it."""
    ranks = Ranks(2)
    ranks.beats[1] = (0, UNHEARD)
    ranks.seen = {1: seen}
    ranks.pass_time(int(FIRST_S) - 5, {0: at(0, "set-up")}, silent=[1])
    assert ranks.verdict is None
    ranks.pass_time(10, {0: at(0, "set-up")}, silent=[1])
    assert ranks.verdict is not None
    assert ranks.verdict.rank == 1


def test_where_everybody_waits_the_last_to_come_is_named() -> None:
    ranks = Ranks(3)
    ranks.pass_time(10, {0: at(9, "backward", waits=True), 1: None, 2: at(9, "backward", waits=True)})
    ranks.pass_time(100, {rank: at(9, "backward", waits=True) for rank in range(3)})
    assert ranks.verdict is not None
    assert ranks.verdict.rank == 1


def test_a_thousand_ranks_do_not_hurry_the_driver() -> None:
    assert beat_interval_s(2) < 1
    assert 1000 / beat_interval_s(1000) <= BEATS_PER_S
