"""A rank's watch: what it says, what it obeys, and when it ends its process."""

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
from launcher.health import Beat
from launcher.rank_watch import END, ENDED, SAVE, STACKS, RankWatch, Whereabouts, in_collective
from tests.support.dead_storage import dead_storage
from trainer.runlog import RunFolder


class Driver:
    """The other end of a rank's line."""

    def __init__(self) -> None:
        self.commands: tuple[str, ...] | None = ()
        self.beats: list[tuple[Beat, tuple[str, ...]]] = []
        self.told: list[str] = []
        self.joined = 0

    def join(self) -> None:
        self.joined += 1

    def beat(self, beat: Beat, obeyed: tuple[str, ...]) -> tuple[str, ...] | None:
        self.beats.append((beat, obeyed))
        return self.commands

    def tell(self, command: str) -> None:
        self.told.append(command)


class Rank:
    """A rank, its watch and its driver."""

    def __init__(self, run: RunFolder, rank: int) -> None:
        self.driver, self.whereabouts, self.stop, self.ends = Driver(), Whereabouts(), threading.Event(), list[int]()
        self.watch = RankWatch(run, claim_attempt(run), rank, 2, self.whereabouts, self.driver, self.stop.set, self.ends.append)


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
    rank.watch.look()
    (beat, obeyed) = rank.driver.beats[0]
    assert (beat.step, beat.phase, beat.moves, beat.place, beat.waits, obeyed) == (3, "forward", 7, 0, False, ())
    assert 0.05 <= beat.longest_s < 0.2, "the first time, which compiles, does not count"


def test_saying_it_again_is_progress() -> None:
    place = Whereabouts()
    place.move(3, "validation")
    first = place.beat().moves
    place.move(3, "validation")
    assert place.beat().moves > first


def test_commands_are_obeyed_once_and_that_is_said(make: Callable[[int], Rank], run: RunFolder) -> None:
    rank = make(1)
    rank.watch.look()
    assert not rank.stop.is_set()
    rank.driver.commands = (SAVE,)
    rank.watch.look()
    assert rank.stop.is_set()
    rank.stop.clear()
    rank.driver.commands = (SAVE, STACKS)
    rank.watch.look()
    rank.watch.look()
    assert not rank.stop.is_set()
    assert rank.driver.beats[-1][1] == (SAVE, STACKS)
    text = (stacks_folder(run, 1) / "rank-00001.txt").read_bytes().decode()
    assert "thread MainThread" in text
    assert "test_commands_are_obeyed_once" in text
    assert not rank.ends
    rank.driver.commands, rank.watch.keep_log = (END,), lambda: pytest.fail("one of a thousand logs that say the same")
    rank.watch.look()
    assert rank.ends == [ENDED]


def test_stacks_are_said_to_be_written_when_they_are(make: Callable[[int], Rank], run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_watch, "_WRITE_S", 0.05)
    rank = make(1)
    rank.driver.commands = (STACKS,)
    back, write = threading.Event(), Location.write_bytes
    monkeypatch.setattr(Location, "write_bytes", lambda *arguments: back.wait(20) and write(*arguments))
    for _ in range(3):
        rank.watch.look()
    assert rank.driver.beats[-1][1] == ()
    back.set()
    until(lambda: rank.watch.look() or rank.driver.beats[-1][1] == (STACKS,))
    assert (stacks_folder(run, 1) / "rank-00001.txt").exists()


def until(condition: Callable[[], object], timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture
def _curious(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_watch, "_LOOK_FOR_SUCCESSOR_S", 0.02)


@pytest.mark.usefixtures("_curious")
@pytest.mark.parametrize("commands", [(), None])
def test_a_superseded_rank_zero_ends_all_ranks(make: Callable[[int], Rank], run: RunFolder, commands: tuple[str, ...] | None) -> None:
    """Whether the board of its own driver answers or not."""
    rank = make(0)
    rank.driver.commands = commands
    with rank.watch.running():
        until(lambda: rank.driver.beats)
        assert not rank.ends
        claim_attempt(run)
        until(lambda: rank.ends)
    assert (rank.driver.told[0], rank.ends[0]) == (END, ENDED)


@pytest.mark.usefixtures("_curious")
def test_other_ranks_leave_storage_alone(make: Callable[[int], Rank], run: RunFolder) -> None:
    rank = make(1)
    claim_attempt(run)
    with rank.watch.running():
        until(lambda: len(rank.driver.beats) > 1)
    assert not rank.ends


@pytest.mark.usefixtures("_curious")
def test_beats_and_commands_go_on_while_storage_hangs(make: Callable[[int], Rank], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_watch, "_WRITE_S", 0.1)
    rank = make(0)
    with dead_storage(), rank.watch.running():
        until(lambda: len(rank.driver.beats) > 1)
        rank.driver.commands = (STACKS,)
        told = len(rank.driver.beats)
        until(lambda: len(rank.driver.beats) > told + 1)
        rank.driver.commands = (STACKS, END)
        until(lambda: rank.ends)
    assert set(rank.ends) == {ENDED}


def test_a_rank_whose_driver_is_gone_ends_within_the_bound(make: Callable[[int], Rank], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_watch, "ORPHANED_AFTER_S", 0.5)
    rank, kept = make(1), list[str]()
    rank.watch.keep_log = lambda: kept.append("log")
    with rank.watch.running():
        deadline = time.monotonic() + 10
        while not rank.driver.beats:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        rank.driver.commands = None
        lost_at = time.monotonic()
        while not rank.ends:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    assert time.monotonic() - lost_at >= 0.4
    assert rank.driver.joined == 1
    assert kept[:1] == ["log"], "nobody else can copy it any more"


def test_a_driver_that_answers_now_and_then_is_there(make: Callable[[int], Rank], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_watch, "ORPHANED_AFTER_S", 0.2)
    rank = make(1)
    for number in range(12):
        rank.driver.commands = () if number % 3 == 2 else None
        rank.watch.look()
        time.sleep(0.03)
    assert not rank.ends


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
