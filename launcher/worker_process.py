"""What a rank does around the trainer: its log, its context, its failure record (runs in worker processes)."""

import importlib
import logging
import os
import sys
import tempfile
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from data_pipeline.errors import ConflictError, InterruptedRunError, MaskwrightError
from data_pipeline.storage import Location
from launcher.attempts import last_attempt, record_failure
from launcher.rank_watch import Line, RankWatch, Whereabouts
from trainer.runlog import RunFolder

MOST_LOGS = 16
"""In a larger group only rank 0 and ranks that fail leave a log in storage."""
_UPLOAD_S = 15.0
_UPLOAD_BYTES_PER_S = 256 << 10
"""A log is copied out as a whole, and the more seldom the longer it is: this much a second, at most."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class WorkerTask:
    """What every rank of an attempt is told: plain values that any process can unpickle."""

    entry: str
    """`module:function`, called with `arguments` and `context`."""
    arguments: dict[str, Any]
    run: str
    """Run folder."""
    attempt: int
    threads: int
    home: str
    """The driver's current folder: relative paths in the configuration mean the same on every rank."""


@dataclass
class WorkerContext:
    """`trainer.context.RunContext` of a rank under the launcher."""

    rank: int
    world_size: int
    run: RunFolder
    attempt: int
    whereabouts: Whereabouts = field(default_factory=Whereabouts)
    _stop: threading.Event = field(default_factory=threading.Event)

    def stop_requested(self) -> bool:
        """See `RunContext.stop_requested`: a flag in memory, set by the watch."""
        return self._stop.is_set()

    def heartbeat(self, step: int, phase: str) -> None:
        """See `RunContext.heartbeat`: a few assignments; the watch passes them on."""
        self.whereabouts.move(step, phase)

    def require_current(self) -> None:
        """See `RunContext.require_current`."""
        newest = last_attempt(self.run)
        if newest > self.attempt:
            raise ConflictError(f"attempt {self.attempt} is superseded by attempt {newest}", "Follow the run with `maskwright status`.")

    def ask_to_stop(self) -> None:
        """Called by the watch."""
        self._stop.set()


def resolve(entry: str) -> Callable[..., Any]:
    """The function named by `module:function`."""
    module, _, name = entry.partition(":")
    return getattr(importlib.import_module(module), name)


def run_task(task: WorkerTask, rank: int, world_size: int, line: Line) -> None:
    """Run the task's entry on this rank, inside a thread of a worker process; `line` leads to the driver.

    An interrupted run returns: it has saved, and raising would end the other ranks in the middle of it. Every other
    error is recorded in the run folder and raised, so that the group ends at once instead of waiting for this rank.
    """
    run = RunFolder(Location(task.run))
    with suppress(OSError):
        os.chdir(task.home)
    context = WorkerContext(rank, world_size, run, task.attempt)
    watch = RankWatch(run, task.attempt, rank, world_size, context.whereabouts, line, context.ask_to_stop)
    with _log_to(run.rank_log(task.attempt, rank), only_if_failed=rank > 0 and world_size > MOST_LOGS), watch.running():
        _log.info("attempt %d, rank %d of %d, process %d: %s", task.attempt, rank, world_size, os.getpid(), task.entry)
        try:
            _limit_threads(task.threads)
            resolve(task.entry)(**task.arguments, context=context)
        except BaseException as error:
            with suppress(MaskwrightError, OSError):  # storage may be what failed; the exception itself still reaches the driver
                record_failure(run, task.attempt, rank, error)
            if isinstance(error, InterruptedRunError):
                _log.info("stopped as asked: %s", error.cause)
                return
            _log.exception("rank %d failed", rank)
            raise


def _limit_threads(threads: int) -> None:
    import torch

    torch.set_num_threads(threads)


@contextmanager
def _log_to(log: Location, *, only_if_failed: bool) -> Generator[None]:
    """Send this process' stdout and stderr, of C++ libraries too, and its logging to the rank's log.

    On object stores, and `only_if_failed`, the log is a file of this machine without a name, which goes with the process. It is copied out
    at the end: `only_if_failed` when the body raises, otherwise in any case, and now and then before.
    """
    is_direct = log.is_local and not only_if_failed
    if is_direct:
        log.path.parent.mkdir(parents=True, exist_ok=True)
    with log.path.open("ab") if is_direct else tempfile.TemporaryFile("ab") as file:
        own = os.dup(file.fileno())
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os.dup2(own, 1)
        os.dup2(own, 2)
    # Line-buffered Python streams of our own: Ray's may be wrapped, and a killed process must not take its last lines along.
    sys.stdout = open(1, "w", buffering=1, closefd=False, encoding="utf-8", errors="replace")  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, closefd=False, encoding="utf-8", errors="replace")  # noqa: SIM115
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", force=True)
    done = threading.Event()
    copier = threading.Thread(target=_copy_out, args=(own, log, done), daemon=True, name="log")
    if not is_direct and not only_if_failed:
        copier.start()
    failed = True
    try:
        yield
        failed = False
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        done.set()
        if copier.ident is not None:
            copier.join()
        elif only_if_failed and failed:
            _copy(own, log)
        os.close(own)


def _copy_out(file: int, log: Location, done: threading.Event) -> None:
    """Copy what an open file holds to the log, again and again while it grows, and at the end."""
    copied, pause_s, finished = 0, _UPLOAD_S, False
    while not finished:
        finished = done.wait(pause_s)
        size = os.fstat(file).st_size
        if size > copied and _copy(file, log):
            copied, pause_s = size, max(_UPLOAD_S, size / _UPLOAD_BYTES_PER_S)


def _copy(file: int, log: Location) -> bool:
    try:
        log.write_bytes(os.pread(file, os.fstat(file).st_size, 0))
    except Exception as error:  # noqa: BLE001 - whatever it is, it must not be the end of the log
        _log.warning("the log could not be copied to %s: %s", log, error)
        return False
    return True
