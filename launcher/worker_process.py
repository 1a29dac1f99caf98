"""What a rank does around the trainer: its context, its watch, its failure record (runs in worker processes)."""

import gc
import importlib
import logging
import os
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from data_pipeline.errors import ConflictError, InterruptedRunError, MaskwrightError
from data_pipeline.storage import Location
from launcher.attempts import last_attempt, record_failure
from launcher.env_from import Sources, take_variables
from launcher.rank_log import is_kept_only_if_failed, log_to
from launcher.rank_watch import RankWatch, Whereabouts
from trainer.redaction import without_hidden
from trainer.runlog import RunFolder

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
    env_from: Sources = ()
    """Secrets that the rank takes where it is; only their names travel."""


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


def run_task(task: WorkerTask, rank: int, world_size: int, is_driver_there: Callable[[], bool | None]) -> None:
    """Run the task's entry on this rank, inside a thread of a worker process.

    An interrupted run returns: it has saved, and raising would end the other ranks in the middle of it. Every other
    error is recorded in the run folder and raised, so that the group ends at once instead of waiting for this rank. Neither has a secret in it.
    """
    run = RunFolder(Location(task.run))
    with suppress(OSError):
        os.chdir(task.home)
    context = WorkerContext(rank, world_size, run, task.attempt)
    watch = RankWatch(run, task.attempt, rank, world_size, context.whereabouts, context.ask_to_stop, is_driver_there)
    with log_to(run.rank_log(task.attempt, rank), only_if_failed=is_kept_only_if_failed(rank, world_size)) as watch.keep_log, watch.running():
        _log.info("attempt %d, rank %d of %d, process %d: %s", task.attempt, rank, world_size, os.getpid(), task.entry)
        try:
            take_variables(task.env_from)
            _limit_threads(task.threads)
            entry = _imported(task, run if rank == 0 else None)
            gc.freeze()  # what is imported is never garbage, and DeepSpeed looks for garbage six times while it starts
            entry(**task.arguments, context=context)
        except BaseException as error:
            with suppress(MaskwrightError, OSError):  # storage may be what failed; the exception itself still reaches the driver
                record_failure(run, task.attempt, rank, error)
            if isinstance(error, InterruptedRunError):
                _log.info("stopped as asked: %s", error.cause)
                return
            _log.exception("rank %d failed", rank)
            text = "".join(traceback.format_exception(error))  # Ray keeps logs of its own, of all that led to an error
            if without_hidden(text) != text:
                raise RuntimeError(without_hidden(str(error))) from None
            raise


def _imported(task: WorkerTask, run: RunFolder | None) -> Callable[..., Any]:
    """The task's entry; with `run` its events tell that the group has come so far."""
    started_at = time.monotonic()
    entry = resolve(task.entry)
    if run is not None and run.config.exists():  # not the folder of a profile
        run.append_event("group_started", attempt=task.attempt, imports_s=round(time.monotonic() - started_at, 3))
    return entry


def _limit_threads(threads: int) -> None:
    import torch

    torch.set_num_threads(threads)
