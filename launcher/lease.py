"""Who drives a run: a numbered lease with a heartbeat, so that a run never has two drivers (reads and writes the run folder)."""

import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from data_pipeline.errors import ConflictError, MaskwrightError, NotFoundError
from launcher.aside import Aside
from trainer.runlog import RunFolder

HEARTBEAT_S = 2.0
STALE_AFTER_S = 30.0
PROFILE_FOLDER = "profile"
"""In a run's folder, with a lease of its own."""
_LOOK_S = 0.5
_BEAT_PATIENCE_S = 10.0
"""A beat that comes later than the next is worth nothing, and must not be written when the lease may be somebody else's."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LeaseState:
    """What lease.json says."""

    number: int
    token: str
    pid: int
    pid_started: str
    host: str
    started_at: float
    time: float
    stage: str = ""
    attempt: int = 0
    machine: str = ""
    """What process numbers mean something in: `this_machine`."""

    def is_here(self) -> bool:
        """Whether the holder is or was a process of this machine."""
        return self.machine == this_machine()

    def is_dead(self) -> bool:
        """Whether the holder is known to be dead: of another machine's processes nobody knows."""
        return self.is_here() and process_start(self.pid) != self.pid_started

    def is_live(self, now: float) -> bool:
        """Whether the holder seems to be at work: it was heard of lately, by the clocks of both machines, and is not known to be dead."""
        return now - self.time <= STALE_AFTER_S and not self.is_dead()


def this_machine() -> str:
    """This machine since its last start, and within it this container: host names may be equal where these are not."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot}/{os.stat('/proc/self/ns/pid').st_ino}"


def process_start(pid: int) -> str:
    """When a living process of this machine started, in clock ticks since boot: tells it from a later one with its number. Else empty."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if state in "ZX" else fields[18]  # a killed process whose parent has not asked for it yet


def process_age_s() -> float:
    """How long this process has been running."""
    now_s, ticks_per_s = time.clock_gettime(time.CLOCK_BOOTTIME), os.sysconf("SC_CLK_TCK")
    return now_s - int(process_start(os.getpid())) / ticks_per_s


def newest_lease(run: RunFolder) -> int:
    """Number of the newest lease that anybody has taken, given up or not; 0 when nobody ever has."""
    return max((int(name) for name in (run.root / "leases").children() if name.isdigit()), default=0)


def read_lease(run: RunFolder) -> LeaseState | None:
    """The lease as last written; None when nobody holds one."""
    try:
        return LeaseState(**run.lease.read_json())
    except (NotFoundError, ValueError, TypeError):
        return None


def holder(run: RunFolder) -> LeaseState | None:
    """The lease of the process that seems to drive the run now; None when nobody does. Answers at once, for those who only look."""
    lease = read_lease(run)
    return lease if lease is not None and lease.is_live(time.time()) else None


def user_of(run: RunFolder) -> LeaseState | None:
    """The lease of the process that drives the run now, or profiles it; None when nobody does."""
    return holder(run) or holder(RunFolder(run.root / PROFILE_FOLDER))


def proven_holder(run: RunFolder, say: Callable[[str], None]) -> LeaseState | None:
    """The lease of the process that drives the run now, for those who want to take its place; None when nobody does.

    Two machines' clocks may differ: a holder elsewhere lives when its lease changes under our eyes, and is dead when it has not for
    STALE_AFTER_S seconds of our own.
    """
    lease = read_lease(run)
    if lease is None or lease.is_here():
        return holder(run)
    say(f"run {run.root.name} was driven by process {lease.pid} on {lease.host}; looking whether it still is (up to {STALE_AFTER_S:.0f} s)")
    deadline = time.monotonic() + STALE_AFTER_S
    while time.monotonic() < deadline:
        time.sleep(_LOOK_S)
        current = read_lease(run)
        if current != lease:
            return current
    return None


@dataclass
class Lease:
    """A held lease: use as a context manager; the heartbeat runs in a thread until the end of the block."""

    run: RunFolder
    state: LeaseState
    lost: threading.Event = field(default_factory=threading.Event)
    _released: threading.Event = field(default_factory=threading.Event)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @classmethod
    def acquire(cls, run: RunFolder, say: Callable[[str], None] = lambda _: None) -> "Lease":
        """Take the lease of a run that nobody drives; `say` is told when that takes a while.

        Each lease has a number that is claimed exactly once, so of two commands that find the same dead holder one wins.

        Raises:
            ConflictError: somebody drives the run.
        """
        # The number first: if somebody takes the run after the look at its holder, that number is gone.
        number = 1 + newest_lease(run)
        current = proven_holder(run, say)
        if current is not None:
            raise taken(run, current)
        token = uuid.uuid4().hex
        if not (run.root / "leases" / f"{number:08d}").claim(token.encode()):
            raise ConflictError(f"run {run.root.name} was taken by another command just now", f"See `maskwright status {run.root.name}`.")
        now = time.time()
        state = LeaseState(number, token, os.getpid(), process_start(os.getpid()), socket.gethostname(), now, now, machine=this_machine())
        lease = cls(run, state)
        lease.beat()
        return lease

    def beat(self, patience_s: float | None = None, **changes: Any) -> None:
        """Say that this process is alive, and what it does now (`stage`, `attempt`). A lease that was released stays so.

        A store is given `patience_s` seconds for each request, or what is usual.
        """
        with self._lock:
            if self._released.is_set():
                return
            self.state = replace(self.state, time=time.time(), **changes)
            if not self._is_superseded(patience_s):
                self.run.lease.write_json(asdict(self.state), patience_s)

    def _is_superseded(self, patience_s: float | None) -> bool:
        """Whether another command has claimed the next number, which it does only when this process seems to be dead."""
        if (self.run.root / "leases" / f"{self.state.number + 1:08d}").exists(patience_s):
            self.lost.set()
        return self.lost.is_set()

    def require_held(self) -> None:
        """Look whether this process still drives the run.

        Raises:
            ConflictError: another command has taken it, or it was given up.
        """
        self.beat()
        if self.lost.is_set() or self._released.is_set():
            raise ConflictError(
                f"run {self.run.root.name} was taken over by another command", "This one ends; follow the other with `maskwright status`."
            )

    def __enter__(self) -> "Lease":
        threading.Thread(target=self._beat_until_released, daemon=True, name="lease").start()
        return self

    def __exit__(self, *_: object) -> None:
        self._released.set()
        with suppress(MaskwrightError, OSError):  # the lease goes stale instead; how the run ended matters more, also on a dead mount
            Aside(self._release).ask(_BEAT_PATIENCE_S)

    def _release(self) -> None:
        with self._lock:
            if not self._is_superseded(_BEAT_PATIENCE_S):  # this process may have been stopped for longer than its lease lived
                self.run.lease.remove()

    def _beat_until_released(self) -> None:
        fails = False
        while not self._released.wait(HEARTBEAT_S) and not self.lost.is_set():
            try:
                self.beat(_BEAT_PATIENCE_S)
                fails = False
            except Exception as error:  # noqa: BLE001 - a run must not end by its heartbeat; while it fails the lease goes stale, and then lives again
                if not fails:
                    _log.warning("the lease of run %s could not be renewed, which is tried again: %s", self.run.root.name, error)
                fails = True


def taken(run: RunFolder, lease: LeaseState) -> ConflictError:
    """What whoever wants to drive a run is told while somebody does."""
    return ConflictError(
        f"run {run.root.name} is already running: process {lease.pid} on {lease.host}, stage {lease.stage or 'start'}",
        f"Follow it with `maskwright status {run.root.name}`, or end it with `maskwright stop {run.root.name}`.",
    )
