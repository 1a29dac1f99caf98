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
from pathlib import Path
from typing import Any

from data_pipeline.errors import ConflictError, InterruptedRunError, MaskwrightError
from data_pipeline.storage import Location
from launcher.attempts import last_attempt, record_failure
from launcher.rank_watch import Line, RankWatch, Whereabouts
from trainer.runlog import RunFolder

UPLOAD_S = 15.0


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
    with _log_to(run.rank_log(task.attempt, rank)), watch.running():
        logging.getLogger(__name__).info("attempt %d, rank %d of %d, process %d: %s", task.attempt, rank, world_size, os.getpid(), task.entry)
        try:
            _limit_threads(task.threads)
            resolve(task.entry)(**task.arguments, context=context)
        except BaseException as error:
            with suppress(MaskwrightError, OSError):  # storage may be what failed; the exception itself still reaches the driver
                record_failure(run, task.attempt, rank, error)
            if isinstance(error, InterruptedRunError):
                logging.getLogger(__name__).info("stopped as asked: %s", error.cause)
                return
            logging.getLogger(__name__).exception("rank %d failed", rank)
            raise


def _limit_threads(threads: int) -> None:
    import torch

    torch.set_num_threads(threads)


@contextmanager
def _log_to(log: Location) -> Generator[None]:
    """Send this process' stdout and stderr, of C++ libraries too, and its logging to the rank's log.

    On object stores the log is a local file that is copied out now and then and at the end.
    """
    path = log.path if log.is_local else Path(tempfile.mkdtemp(prefix="maskwright-")) / "rank.log"
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)
    # Line-buffered Python streams of our own: Ray's may be wrapped, and a killed process must not take its last lines along.
    sys.stdout = open(1, "w", buffering=1, closefd=False, encoding="utf-8", errors="replace")  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, closefd=False, encoding="utf-8", errors="replace")  # noqa: SIM115
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", force=True)
    done = threading.Event()
    copier = threading.Thread(target=_copy_out, args=(path, log, done), daemon=True)
    if not log.is_local:
        copier.start()
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        done.set()
        if not log.is_local:
            copier.join()
            path.unlink(missing_ok=True)  # what is printed after this has nowhere to go
            path.parent.rmdir()


def _copy_out(path: Path, log: Location, done: threading.Event) -> None:
    finished = False
    while not finished:
        finished = done.wait(UPLOAD_S)
        with suppress(MaskwrightError, OSError):
            log.write_bytes(path.read_bytes())
