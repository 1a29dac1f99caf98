"""A rank's watch: says where the rank is, obeys the driver, and ends the process when its attempt is over (threads of the worker process)."""

import logging
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from types import FrameType

from data_pipeline.errors import MaskwrightError
from launcher.aside import Aside
from launcher.attempts import last_attempt, stacks_folder
from launcher.health import BEAT_S, SUSPECT_S, Beat, longest_interval_s
from launcher.lease import process_start
from trainer.manifest import nothing
from trainer.runlog import RunFolder

SAVE, STACKS = "save", "stacks"
"""Commands to all ranks: save and end; write down the stacks of all threads."""

ORPHANED_AFTER_S = 60.0
"""A rank that has not heard of its driver for so long asks the cluster, and ends if it is gone or nobody answers twice in a row: the network was cut,
and elsewhere another attempt may have begun."""

ENDED = 75
_LOOK_S, _LOOK_REMOTE_S = 2.0, 10.0
"""Between two looks at the run's attempts, in a folder and in a store."""
_WRITE_S = 2.0
"""How long the watch waits for storage."""
_KEEP_LOG_S = 15.0
_log = logging.getLogger(__name__)
_COLLECTIVES = os.path.join("torch", "distributed", "distributed_c10d.py")


@dataclass(frozen=True)
class Reply:
    """What a rank says when it is polled."""

    beat: Beat
    obeyed: frozenset[str]
    """The commands that it has carried out."""
    started: str
    """When its process started (`process_start`)."""


@dataclass
class Whereabouts:
    """Where a rank is: written by the thread that trains, several times a step, and read by the watch."""

    thread: int = field(default_factory=threading.get_ident)
    _now: tuple[int, str, float, int, int] = field(default_factory=lambda: (0, "set-up", time.monotonic(), 0, 0))
    _stays: dict[str, int] = field(default_factory=dict[str, int])
    _longest_s: dict[str, float] = field(default_factory=dict[str, float])

    def move(self, step: int, phase: str) -> None:
        """The rank is at `phase` of `step`; said again, it still makes progress there."""
        now = time.monotonic()
        before, last, since, moves, place = self._now
        stays = self._stays[last] = self._stays.get(last, 0) + 1
        if stays > 1:  # the first time is no measure for the next
            self._longest_s[last] = max(self._longest_s.get(last, 0.0), now - since)
        self._now = (step, phase, now, moves + 1, place + 1 if step == before else 0)

    def beat(self) -> Beat:
        """Where it is now."""
        step, phase, _, moves, place = self._now
        return Beat(step, phase, moves, place, in_collective(_frames().get(self.thread)), self._longest_s.get(phase, 0.0))


def in_collective(frame: FrameType | None) -> bool:
    """Whether a thread is inside a call of torch.distributed."""
    while frame is not None:
        if frame.f_code.co_filename.endswith(_COLLECTIVES):
            return True
        frame = frame.f_back
    return False


@dataclass
class RankWatch:
    """The watch of one rank."""

    run: RunFolder
    attempt: int
    rank: int
    world_size: int
    whereabouts: Whereabouts
    ask_to_stop: Callable[[], None]
    is_driver_there: Callable[[], bool | None]
    """Asked where nothing was heard of the driver for long: one that is stopped is there. None where nobody can tell."""
    end: Callable[[int], None] = os._exit
    keep_log: Callable[[], object] = nothing
    """Copies the log to storage; called where nobody else will."""
    _started: str = field(default_factory=lambda: process_start(os.getpid()))
    _told: set[str] = field(default_factory=set[str])
    _obeyed: set[str] = field(default_factory=set[str])
    _heard_at: float = field(default_factory=time.monotonic)
    _ask_at: float = 0.0
    _unanswered: int = 0
    _done: threading.Event = field(default_factory=threading.Event)
    _successor: Aside[None] = field(init=False)

    def __post_init__(self) -> None:
        self._successor = Aside(self._look_for_successor)

    @contextmanager
    def running(self) -> Generator[None]:
        """Reply for this process, and watch from a thread, for the length of the block."""
        global _watch  # noqa: PLW0603 - a process is one rank, and Ray's call finds it here

        def watch() -> None:
            while not self._done.wait(_LOOK_S if self.run.root.is_local else _LOOK_REMOTE_S):
                try:
                    self.look()
                except Exception as error:  # noqa: BLE001 - the next look is soon; without any, a rank that is cut off would never end
                    self._complain(error)

        thread = threading.Thread(target=watch, daemon=True, name="watch")
        self._heard_at = time.monotonic()
        thread.start()
        _watch = self
        try:
            yield
        finally:
            _watch = None
            self._done.set()
            thread.join(timeout=5.0)

    def rest(self) -> None:
        """Wait, for a driver that asks, until a beat is due or the attempt is over."""
        self._done.wait(BEAT_S)

    def reply(self) -> Reply:
        """Where this rank is, for a driver that asks, which is a sign of life."""
        self._heard_at, self._unanswered = time.monotonic(), 0
        return Reply(self.whereabouts.beat(), frozenset(self._obeyed), self._started)

    def obey(self, command: str) -> None:
        """Carry out a command, once. Does not wait for storage: what is written counts as obeyed when it is there, or cannot be."""
        if command in self._told:
            return
        self._told.add(command)
        if command == STACKS:
            threading.Thread(target=self._write_stacks, daemon=True, name="stacks").start()
        else:
            self.ask_to_stop()
            self._obeyed.add(command)

    def look(self) -> None:
        """End the process if its attempt is over: another has begun, or the driver is gone.

        One rank looks for a successor, for all; the others, too, where the driver that would end them says nothing.
        """
        if self.rank == 0 or self._silent_s > SUSPECT_S + longest_interval_s(self.world_size):
            with suppress(MaskwrightError, OSError):
                self._successor.ask(_WRITE_S)
        if self._silent_s > ORPHANED_AFTER_S and time.monotonic() > self._ask_at:
            self._ask_for_driver()

    @property
    def _silent_s(self) -> float:
        return time.monotonic() - self._heard_at

    def _ask_for_driver(self) -> None:
        there = self.is_driver_there()
        if there:
            self._unanswered, self._ask_at = 0, time.monotonic() + ORPHANED_AFTER_S
            return
        self._unanswered += 1
        if self._silent_s > ORPHANED_AFTER_S and (there is False or self._unanswered > 1):
            self._end_with("nothing has been heard of the driver for %.0f s", self._silent_s, last=self.keep_log, within_s=_KEEP_LOG_S)

    def _look_for_successor(self) -> None:
        if last_attempt(self.run) > self.attempt:
            self._end_with("attempt %d is superseded by a newer one", self.attempt)

    def _write_stacks(self) -> None:
        with suppress(MaskwrightError, OSError):  # the group is ended without them; the log, on the same storage, could hold up this thread
            (stacks_folder(self.run, self.attempt) / f"rank-{self.rank:05d}.txt").write_bytes(stacks_of_threads().encode())
        self._obeyed.add(STACKS)

    def _complain(self, error: Exception) -> None:
        with suppress(OSError):  # the log lies in the run folder
            Aside(lambda: _log.error("the watch of this rank failed", exc_info=error)).ask(_WRITE_S)

    def _end_with(self, why: str, *values: object, last: Callable[[], object] = nothing, within_s: float = _WRITE_S) -> None:
        def log() -> None:
            _log.error("this process ends: " + why, *values)
            sys.stderr.flush()
            last()

        with suppress(OSError):  # the log lies in the run folder
            Aside(log).ask(within_s)
        self.end(ENDED)


_watch: RankWatch | None = None


def watch_of_process() -> RankWatch | None:
    """The watch that runs in this process."""
    return _watch


def _frames() -> dict[int, FrameType]:
    return sys._current_frames()  # pyright: ignore[reportPrivateUsage]  # documented for just this


def stacks_of_threads() -> str:
    """The stacks of all Python threads of this process."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    parts = [f"process {os.getpid()}\n"]
    for ident, frame in _frames().items():
        parts.append(f"\nthread {names.get(ident, ident)}\n{''.join(traceback.format_stack(frame))}")
    return "".join(parts)
