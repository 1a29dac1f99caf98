"""A rank's watch: what it says, what it obeys, and when it ends its process."""

import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch.distributed as dist

from data_pipeline.storage import Location
from launcher import rank_watch
from launcher.attempts import claim_attempt, stacks_folder
from launcher.health import BEAT_S
from launcher.lease import process_start
from launcher.rank_watch import ENDED, SAVE, STACKS, RankWatch, Whereabouts, in_collective
from tests.support.dead_storage import dead_storage
from trainer.runlog import RunFolder


class Rank:
    """A rank and its watch."""

    def __init__(self, run: RunFolder, rank: int) -> None:
        self.whereabouts, self.stop, self.ends, self.asked = Whereabouts(), threading.Event(), list[int](), 0
        self.asked_before_end = 0
        self.driver_is_there: bool | None = None
        self.watch = RankWatch(run, claim_attempt(run), rank, 2, self.whereabouts, self.stop.set, self.ask, self.end)

    def end(self, code: int) -> None:
        self.ends.append(code)
        self.asked_before_end = self.asked if len(self.ends) == 1 else self.asked_before_end

    def ask(self) -> bool | None:
        self.asked += 1
        return self.driver_is_there


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder(Location.at(tmp_path / "run"))


@pytest.fixture
def make(run: RunFolder) -> Callable[[int], Rank]:
    return lambda rank: Rank(run, rank)


def test_what_a_rank_says_of_itself(make: Callable[[int], Rank]) -> None:
    rank = make(1)
    for step in range(3):
        rank.whereabouts.move(step, "data")
        rank.whereabouts.move(step, "forward")
        time.sleep(0.3 if step == 0 else 0.05)
    rank.whereabouts.move(3, "forward")
    reply = rank.watch.reply()
    beat = reply.beat
    assert (beat.step, beat.phase, beat.moves, beat.place, beat.waits) == (3, "forward", 7, 0, False)
    assert (reply.obeyed, reply.started) == (set(), process_start(os.getpid()))
    assert 0.05 <= beat.longest_s < 0.2, "the first time, which compiles, does not count"


def test_a_rank_that_is_polled_rests_until_a_beat_is_due_or_it_has_ended(make: Callable[[int], Rank]) -> None:
    watch = make(1).watch
    rested = list[float]()

    def rest() -> None:
        started_at = time.monotonic()
        watch.rest()
        rested.append(time.monotonic() - started_at)

    with watch.running():
        rest()
        thread = threading.Thread(target=rest)
        thread.start()
        time.sleep(0.05)
    thread.join()
    rest()
    assert BEAT_S <= rested[0] < 2 * BEAT_S
    assert rested[1] < BEAT_S / 2, "the end is said at once"
    assert rested[2] < BEAT_S / 2


def test_saying_it_again_is_progress() -> None:
    place = Whereabouts()
    place.move(3, "validation")
    first = place.beat().moves
    place.move(3, "validation")
    assert place.beat().moves > first


def test_commands_are_obeyed_once_and_that_is_said(make: Callable[[int], Rank], run: RunFolder) -> None:
    rank = make(1)
    rank.watch.obey(SAVE)
    assert rank.stop.is_set()
    assert rank.watch.reply().obeyed == {SAVE}
    rank.stop.clear()
    rank.watch.obey(STACKS)
    rank.watch.obey(SAVE)
    assert not rank.stop.is_set()
    until(lambda: rank.watch.reply().obeyed == {SAVE, STACKS})
    text = (stacks_folder(run, 1) / "rank-00001.txt").read_bytes().decode()
    assert "thread MainThread" in text
    assert "test_commands_are_obeyed_once" in text
    assert not rank.ends


def test_stacks_are_said_to_be_written_when_they_are(make: Callable[[int], Rank], run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    rank = make(1)
    back, write = threading.Event(), Location.write_bytes
    monkeypatch.setattr(Location, "write_bytes", lambda *arguments: back.wait(20) and write(*arguments))
    for _ in range(3):
        rank.watch.obey(STACKS)
    assert rank.watch.reply().obeyed == set()
    back.set()
    until(lambda: rank.watch.reply().obeyed == {STACKS})
    assert (stacks_folder(run, 1) / "rank-00001.txt").exists()


def until(condition: Callable[[], object], timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture
def _curious(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_watch, "_LOOK_S", 0.02)


@pytest.mark.usefixtures("_curious")
def test_a_superseded_rank_zero_ends(make: Callable[[int], Rank], run: RunFolder) -> None:
    rank = make(0)
    with rank.watch.running():
        time.sleep(0.1)
        assert not rank.ends
        claim_attempt(run)
        until(lambda: rank.watch.reply() and rank.ends)
    assert rank.ends[0] == ENDED


@pytest.mark.usefixtures("_curious")
def test_other_ranks_leave_storage_alone_while_their_driver_polls(
    make: Callable[[int], Rank], run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that is stopped does not, and cannot end them."""
    monkeypatch.setattr(rank_watch, "SUSPECT_S", -0.5)  # and a second between polls
    rank = make(1)
    claim_attempt(run)
    with rank.watch.running():
        for _ in range(20):
            rank.watch.reply()
            time.sleep(0.05)
        assert not rank.ends
        until(lambda: rank.ends)
    assert rank.ends[0] == ENDED


@pytest.mark.usefixtures("_curious")
def test_answers_commands_and_the_end_do_not_wait_for_storage_that_hangs(make: Callable[[int], Rank], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_watch, "_WRITE_S", 0.05)
    monkeypatch.setattr(rank_watch, "ORPHANED_AFTER_S", 1.0)
    rank = make(0)
    with dead_storage(), rank.watch.running():
        time.sleep(0.2)
        rank.watch.obey(STACKS)
        rank.watch.obey(SAVE)
        assert rank.watch.reply().obeyed == {SAVE}
        until(lambda: rank.ends)
    assert set(rank.ends) == {ENDED}


@pytest.mark.usefixtures("_curious")
def test_a_rank_whose_driver_is_gone_ends_within_the_bound(make: Callable[[int], Rank], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_watch, "ORPHANED_AFTER_S", 0.5)
    rank, kept = make(1), list[str]()
    rank.watch.keep_log = lambda: kept.append("log")
    with rank.watch.running():
        for _ in range(10):
            rank.watch.reply()
            time.sleep(0.1)
        assert not rank.asked
        lost_at = time.monotonic()
        until(lambda: rank.ends)
    assert time.monotonic() - lost_at >= 0.3
    assert rank.asked_before_end == 2, "an answer that is late must not end the ranks of a driver that is only stopped"
    assert kept[:1] == ["log"], "nobody else can copy it any more"


@pytest.mark.usefixtures("_curious")
def test_a_driver_that_is_stopped_is_not_gone(make: Callable[[int], Rank], monkeypatch: pytest.MonkeyPatch) -> None:
    """The cluster is asked now and then, not at every look."""
    monkeypatch.setattr(rank_watch, "ORPHANED_AFTER_S", 0.5)
    rank = make(1)
    rank.driver_is_there = True
    with rank.watch.running():
        until(lambda: rank.asked > 1)
        assert not rank.ends
        rank.driver_is_there = False
        until(lambda: rank.ends)
    assert rank.asked < 10


def test_a_head_that_is_late_now_and_then_ends_no_rank(make: Callable[[int], Rank], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_watch, "ORPHANED_AFTER_S", -1.0)  # long over, and asked at every look
    rank = make(1)
    for there in (None, True, None, True, None):
        rank.driver_is_there = there
        rank.watch.look()
    assert (rank.asked, rank.ends) == (5, [])
    rank.watch.look()
    assert rank.ends == [ENDED]


def test_a_thread_inside_a_collective_is_known_by_its_stack(tmp_path: Path) -> None:
    store = dist.FileStore(str(tmp_path / "store"), 2)
    ident, began = list[int](), threading.Event()

    def wait() -> None:
        ident.append(threading.get_ident())
        began.set()
        try:
            dist.init_process_group("gloo", store=store, rank=0, world_size=2, timeout=dist.default_pg_timeout.__class__(seconds=2))
        except Exception:  # noqa: BLE001 - nobody joins it, as meant
            return

    thread = threading.Thread(target=wait)
    thread.start()
    began.wait(10)
    deadline = time.monotonic() + 2
    while not in_collective(sys._current_frames().get(ident[0])):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert not in_collective(sys._current_frames()[threading.get_ident()])
    thread.join()
