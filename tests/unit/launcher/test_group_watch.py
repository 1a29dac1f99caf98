"""The driver's watch: what it does with a verdict, whom it asks to save, and what it puts up with."""

import threading
import time
from collections.abc import Mapping
from pathlib import Path

import pytest

from data_pipeline.errors import StorageError
from data_pipeline.storage import Location
from launcher.attempts import driver_log, stacks_folder
from launcher.control import read_stop
from launcher.deaths import name_ranks, tell_deaths
from launcher.event_texts import tell
from launcher.group_watch import GroupWatch, Member, SaveReason, describe
from launcher.health import UNHEARD, Beat, Deadlines, Seen, State, Verdict
from launcher.rank_watch import SAVE, STACKS
from tests.support.dead_storage import dead_storage
from trainer.runlog import RunFolder


class Ranks:
    """Two ranks of which the second can fall silent."""

    def __init__(self) -> None:
        self.members: Mapping[int, Member] = {rank: Member(100 + rank, "7", f"node-id-{rank}", f"host{rank}", None) for rank in (0, 1)}
        self.beats, self.silent, self.told, self.ended = 0, set[int](), list[str](), 0
        self.counts = {0: 0, 1: 0}
        self.leaving: Mapping[str, int] = {}
        self.is_ending = False

    def look(self) -> Mapping[int, tuple[int, Beat]] | None:
        if self.is_ending:
            return None
        self.beats += 1
        self.counts |= {rank: self.beats for rank in (0, 1) if rank not in self.silent}
        return {rank: (self.counts[rank], Beat(self.beats, "forward", self.beats, 2, False, 1.0)) for rank in (0, 1)}

    def see(self, ranks: list[int]) -> Mapping[int, tuple[Seen, str]]:
        return dict.fromkeys(ranks, (Seen.STOPPED, "State:\tT (stopped)"))

    def tell(self, command: str) -> None:
        self.told.append(command)

    def obeyed(self, command: str) -> int:
        return self.told.count(command)

    def draining(self) -> Mapping[str, int]:
        return self.leaving

    def end(self) -> None:
        self.ended += 1


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder(Location.at(tmp_path / "run"))


def watch_of(run: RunFolder, said: list[str], reason: SaveReason | None = None) -> GroupWatch:
    deadlines = Deadlines.for_stage(trains=True, data_s=0.0, fresh_steps=(), interval_s=0.5)
    return GroupWatch(run, 1, 2, deadlines, said.append, lambda: reason)


def look_until_verdict(watch: GroupWatch, ranks: Ranks) -> None:
    """Once a second, for as long as a stopped rank may be silent."""
    for _ in range(20):
        if watch.verdict is None:
            watch.look(ranks, 1.0)


def test_a_stopped_rank_is_named_recorded_and_the_group_ended(run: RunFolder) -> None:
    said, ranks = list[str](), Ranks()
    watch = watch_of(run, said)
    watch.look(ranks, 1.0)
    ranks.silent = {1}
    look_until_verdict(watch, ranks)
    assert ranks.ended == 1
    assert ranks.told == [STACKS]
    (event,) = run.read_events()
    assert (event["kind"], event["rank"], event["node"], event["pid"], event["phase"]) == ("rank_unhealthy", 1, "host1", 101, "forward")
    assert (event["state"], event["seconds"] < 15) == ("stopped", True)
    assert (stacks_folder(run, 1) / "rank-00001.txt").read_bytes().decode().endswith("State:\tT (stopped)")
    assert len(said) == 1
    assert "rank 1 on host1 (process 101) has been stopped" in said[0]


def test_a_dead_rank_is_told_in_our_words(run: RunFolder) -> None:
    watch, log = watch_of(run, []), run.rank_log(1, 1)
    assert tell_deaths([1], "", watch) == f"rank 1 died: it was killed, or crashed; see {log}", "before anything was seen of it"
    watch.look(Ranks(), 1.0)
    rays = "The actor died unexpectedly before finishing this task.\n\tclass_name: Rank\nWorker unexpectedly exits with a connection error"
    where = "died on host1 (process 101) in forward of step 1"
    assert tell_deaths([1], rays, watch) == f"rank 1 {where}: it was killed, or crashed; see {log}"
    assert "rank 1, 7 died on host1" in tell_deaths([1, 7], "The actor died because its node has died. Node Id: 7", watch)
    assert "its node is gone; see" in tell_deaths([1, 7], "The actor died because its node has died. Node Id: 7", watch)
    assert "low on memory" in tell_deaths([1], "1 worker(s) were killed due to the node running low on memory. More", watch)
    watch.world_size = 1000  # of which rank 1 leaves a log in storage when it fails, unless its node is lost
    assert tell_deaths([1], rays, watch).endswith(f"see {log}")
    assert tell_deaths([1], "The actor died because its node has died.", watch).endswith(f"see {driver_log(run)}")


def test_many_ranks_are_named_in_a_line() -> None:
    assert name_ranks([3]) == "rank 3"
    assert name_ranks([3, 7]) == "rank 3, 7"
    assert name_ranks(range(1000)) == "rank 0, 1, 2, 3, 4, 5, 6, 7 and 992 more"


def test_the_pace_of_all_ranks_is_that_of_the_slowest(run: RunFolder) -> None:
    ranks, watch = Ranks(), watch_of(run, [])
    for _ in range(8):
        watch.look(ranks, 1.0)
    assert (watch.pace.num_steps, watch.pace.step_s) == (6, 1.0)
    assert watch.pace.start_up_s == 3.0


def test_a_rank_that_never_says_a_word_is_named(run: RunFolder) -> None:
    """Its process is known, and stopped before its first beat."""
    ranks, watch = Ranks(), watch_of(run, [])
    ranks.silent = {0, 1}
    look_until_verdict(watch, ranks)
    assert watch.verdict is not None
    assert (watch.verdict.state, watch.verdict.ranks, ranks.ended) == (State.STOPPED, (0, 1), 1)
    assert watch.pace.first_step is None


def test_a_process_that_is_stopped_before_it_has_a_rank_is_named(run: RunFolder) -> None:
    """Ray gives ranks once all processes answer: one that does not keeps the others from theirs. It is named as what it is, and no rank for it."""
    said, ranks, watch = list[str](), Ranks(), watch_of(run, [])
    watch.say = said.append
    ranks.members = {-1: Member(101, "", "node-id-1", "host1", None), -2: Member(102, "", "node-id-1", "host1", None)}
    ranks.look = lambda: {-1: (0, UNHEARD), -2: (0, UNHEARD)}
    ranks.see = lambda _: {-1: (Seen.ALIVE, "State:\tS"), -2: (Seen.STOPPED, "State:\tT (stopped)")}
    for _ in range(30):
        if watch.verdict is None:
            watch.look(ranks, 1.0)
    assert ranks.ended == 1
    (event,) = run.read_events()
    assert (event["rank"], event["ranks"], event["node"], event["pid"], event["phase"]) == (None, [], "host1", 102, "set-up")
    assert event["state"] == "stopped"
    assert "a rank on host1 (process 102) has been stopped" in said[0]
    assert "a rank on host1 (process 102) stopped in phase set-up" in tell(event)


def test_processes_that_have_got_their_ranks_are_no_longer_watched_as_others(run: RunFolder) -> None:
    ranks, watch = Ranks(), watch_of(run, [])
    ranks.look, look = lambda: {-1: (0, UNHEARD), -2: (0, UNHEARD)}, ranks.look
    for _ in range(12):
        watch.look(ranks, 1.0)
    ranks.look = look
    for _ in range(60):
        watch.look(ranks, 1.0)
    assert (watch.verdict, set(watch.health.pulses)) == (None, {0, 1})


def test_time_that_the_driver_itself_was_held_up_is_not_counted(run: RunFolder) -> None:
    ranks = Ranks()
    watch = watch_of(run, [])
    watch.look(ranks, 1.0)
    ranks.silent = {1}
    watch.look(ranks, 3600.0)
    assert watch.verdict is None


def test_ranks_are_asked_once_to_save(run: RunFolder) -> None:
    ranks = Ranks()
    watch = watch_of(run, [], SaveReason.REQUEST)
    for _ in range(3):
        watch.look(ranks, 1.0)
    assert (ranks.told, watch.save_reason) == ([SAVE], SaveReason.REQUEST)


def test_a_node_that_is_taken_away_makes_all_ranks_save(run: RunFolder) -> None:
    said, ranks = list[str](), Ranks()
    ranks.leaving = {"node-id-1": 1_800_000_000_000}
    watch = watch_of(run, said)
    watch.look(ranks, 1.0)
    assert (ranks.told, watch.save_reason, watch.leaving) == ([SAVE], SaveReason.PREEMPTION, ("host1",))
    (event,) = run.read_events()
    assert (event["kind"], event["nodes"], event["deadline"]) == ("preempted", ["host1"], 1_800_000_000.0)


def test_silence_of_a_group_that_is_being_ended_means_nothing(run: RunFolder) -> None:
    ranks = Ranks()
    watch = watch_of(run, [])
    watch.look(ranks, 1.0)
    ranks.silent, ranks.is_ending = {0, 1}, True
    look_until_verdict(watch, ranks)
    assert (watch.verdict, ranks.ended) == (None, 0)
    assert set(watch.health.pulses) == {0, 1}, "what was known of the ranks is told of their deaths"


def test_storage_that_fails_does_not_keep_a_group_from_being_ended(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    run.root.parent.path.mkdir(parents=True, exist_ok=True)
    run.root.path.write_text("a file where the run folder should be")
    ranks, said = Ranks(), list[str]()
    watch = watch_of(run, said)
    watch.look(ranks, 1.0)
    ranks.silent = {1}
    look_until_verdict(watch, ranks)
    assert ranks.ended == 1
    assert any("could not be recorded" in line for line in said)


@pytest.mark.timeout(60)
def test_storage_that_hangs_does_not_keep_a_group_from_being_ended(run: RunFolder) -> None:
    """Neither the question whether somebody wants the run to stop nor the record of a verdict holds up the watch."""
    ranks, said = Ranks(), list[str]()
    watch = watch_of(run, said)

    def ask_storage() -> SaveReason | None:
        read_stop(run)
        return None

    watch.why_save = ask_storage
    with dead_storage():
        watch.look(ranks, 1.0)
        ranks.silent = {1}
        began = time.monotonic()
        look_until_verdict(watch, ranks)
        assert time.monotonic() - began < 20
        assert ranks.ended == 1
    assert "rank 1 on host1 (process 101) has been stopped" in said[0]
    assert "could not be recorded" in said[1]


def test_a_head_that_hangs_does_not_blind_the_watch(run: RunFolder) -> None:
    ranks, over = Ranks(), threading.Event()
    ranks.draining = lambda: over.wait(60) and {}
    watch = watch_of(run, [])
    watch.look(ranks, 1.0)
    ranks.silent = {1}
    look_until_verdict(watch, ranks)
    over.set()
    assert ranks.ended == 1


def test_storage_that_fails_for_a_moment_ends_nothing(run: RunFolder) -> None:
    def fails() -> SaveReason | None:
        raise StorageError("gone for a moment", "wait")

    ranks, watch = Ranks(), watch_of(run, [])
    watch.why_save = fails
    watch.look(ranks, 1.0)
    assert ranks.ended == 0


def test_a_watch_that_breaks_does_not_leave_the_group_unwatched(run: RunFolder) -> None:
    ranks, watch = Ranks(), watch_of(run, [])
    ranks.look = lambda: 1 / 0

    def wait() -> None:
        with watch.over(ranks):
            deadline = time.monotonic() + 10
            while not ranks.ended:
                assert time.monotonic() < deadline
                time.sleep(0.01)

    with pytest.raises(ZeroDivisionError):
        wait()


def test_many_ranks_fit_a_line() -> None:
    verdict = Verdict((3, *range(10, 100)), State.SILENT, 45.2, 7, "forward")
    assert describe(verdict, {}) == "rank 3 and 90 more have not been heard of for 45 s in forward of step 7"
