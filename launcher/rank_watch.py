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
from typing import Protocol

from data_pipeline.errors import MaskwrightError
from launcher.aside import Aside
from launcher.attempts import last_attempt, stacks_folder
from launcher.health import Beat, beat_interval_s
from trainer.manifest import nothing
from trainer.runlog import RunFolder

SAVE, STACKS, END = "save", "stacks", "end"
"""Commands to all ranks: save and end; write down the stacks of all threads; end at once."""

ORPHANED_AFTER_S = 60.0
"""A rank that has not heard of its driver for so long ends: the network was cut, and elsewhere another attempt may have begun."""

ENDED = 75
_LOOK_FOR_SUCCESSOR_S = 2.0
_LOOK_FOR_SUCCESSOR_REMOTE_S = 10.0
_WRITE_S = 2.0
"""How long the watch waits for what it writes into the run folder: beats go on whether storage answers or not."""
_KEEP_LOG_S = 15.0
_COLLECTIVES = os.path.join("torch", "distributed", "distributed_c10d.py")


class Line(Protocol):
    """A rank's line to the driver."""

    def join(self) -> None:
        """Say who this rank is."""
        ...

    def beat(self, beat: Beat, obeyed: tuple[str, ...]) -> tuple[str, ...] | None:
        """Say where this rank is; every command so far, or None when nobody answers."""
        ...

    def tell(self, command: str) -> None:
        """Give a command to all ranks."""
        ...


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
    line: Line
    ask_to_stop: Callable[[], None]
    end: Callable[[int], None] = os._exit
    keep_log: Callable[[], object] = nothing
    """Copies the log to storage; called where nobody else will."""
    _obeyed: tuple[str, ...] = ()
    _unanswered: int = 0
    _heard_at: float = field(default_factory=time.monotonic)
    _stacks: Aside[None] = field(init=False)

    def __post_init__(self) -> None:
        self._stacks = Aside(self._write_stacks)

    @contextmanager
    def running(self) -> Generator[None]:
        """Watch from threads for the length of the block."""
        done = threading.Event()

        def watch() -> None:
            self.line.join()
            while not done.wait(beat_interval_s(self.world_size)):
                self.look()

        def watch_for_successor() -> None:
            while not done.wait(_LOOK_FOR_SUCCESSOR_S if self.run.root.is_local else _LOOK_FOR_SUCCESSOR_REMOTE_S):
                with suppress(MaskwrightError, OSError):
                    self.look_for_successor()

        thread = threading.Thread(target=watch, daemon=True, name="watch")
        thread.start()
        if self.rank == 0:  # apart from the beats, which a dead mount must not hold up; nor a board that does not answer this look
            threading.Thread(target=watch_for_successor, daemon=True, name="successor").start()
        try:
            yield
        finally:
            done.set()
            thread.join(timeout=5.0)

    def look(self) -> None:
        """Say where this rank is, do what it is told, and end the process if its attempt is over."""
        commands = self.line.beat(self.whereabouts.beat(), self._obeyed)
        if commands is None:
            self._unanswered += 1
            if self._unanswered > 2 and time.monotonic() - self._heard_at > ORPHANED_AFTER_S:
                silent_s = time.monotonic() - self._heard_at
                self._end_with("nothing has been heard of the driver for %.0f s", silent_s, last=self.keep_log, within_s=_KEEP_LOG_S)
            return
        self._unanswered, self._heard_at = 0, time.monotonic()
        for command in commands:
            if command not in self._obeyed:
                self._obey(command)

    def _obey(self, command: str) -> None:
        if command == SAVE:
            self.ask_to_stop()
        elif command == STACKS:
            try:
                self._stacks.ask(_WRITE_S)
            except TimeoutError:
                return  # said to be done when it is: the driver waits a little for it
            except (MaskwrightError, OSError):  # the group is ended without them; the log, on the same storage, could hold up this thread
                pass
        elif command == END:
            self._end_with("the driver ends attempt %d", self.attempt)
        self._obeyed = (*self._obeyed, command)

    def _write_stacks(self) -> None:
        (stacks_folder(self.run, self.attempt) / f"rank-{self.rank:05d}.txt").write_bytes(stacks_of_threads().encode())

    def look_for_successor(self) -> None:
        """One rank asks storage, for all: a driver that is stopped or cut off cannot say that another has taken over."""
        if last_attempt(self.run) > self.attempt:
            self.line.tell(END)
            self._end_with("attempt %d is superseded by a newer one", self.attempt)

    def _end_with(self, why: str, *values: object, last: Callable[[], object] = nothing, within_s: float = _WRITE_S) -> None:
        def log() -> None:
            logging.getLogger(__name__).error("this process ends: " + why, *values)
            sys.stderr.flush()
            last()

        with suppress(OSError):  # the log lies in the run folder
            Aside(log).ask(within_s)
        self.end(ENDED)


def _frames() -> dict[int, FrameType]:
    return sys._current_frames()  # pyright: ignore[reportPrivateUsage]  # documented for just this


def stacks_of_threads() -> str:
    """The stacks of all Python threads of this process."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    parts = [f"process {os.getpid()}\n"]
    for ident, frame in _frames().items():
        parts.append(f"\nthread {names.get(ident, ident)}\n{''.join(traceback.format_stack(frame))}")
    return "".join(parts)
