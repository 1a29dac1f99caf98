"""The verb stop: asks who drives a run to save and end, and ends who does not answer."""

import os
import signal
import time
from dataclasses import replace
from typing import Annotated

import typer

from data_pipeline.errors import ConflictError, ExitCode, UnreachableError
from launcher.control import request_stop
from launcher.lease import STALE_AFTER_S, LeaseState, holder, process_start
from launcher.options import Json, RunArgument, Storage, command, next_command, print_json, say
from launcher.run_status import RunStatus, read_status
from launcher.runs import find_run
from launcher.submission import Submission, driving_submission, give_up, newest_submission
from trainer.runlog import RunFolder

KILL_AFTER_S = 15.0
"""A driver that has not ended so long after its grace is killed."""
_LOOK_S = 0.25
_ANSWER_S = 60.0


def stop(
    run: RunArgument,
    grace: Annotated[float, typer.Option("--grace", min=0.0, help="Seconds to save a checkpoint in; then everything ends.")] = 60.0,
    now: Annotated[bool, typer.Option("--now", help="End without saving.")] = False,
    storage: Storage = None,
    as_json: Json = False,
) -> None:
    """Save a checkpoint and end a run; `resume` continues it.

    Example: maskwright stop demo --grace 120
    """
    folder = find_run(run, storage)
    lease = holder(folder)
    if lease is not None:
        _stop_driver(folder, lease, grace, save=not now)
    elif (waiting := _pending(folder)) is None or not _end_waiting(folder, waiting, now=now):
        raise ConflictError(f"run {folder.root.name} is not running", f"See `maskwright status {run}`.")
    status = _status_after(folder, lease)
    if as_json:
        print_json(status.to_json())
        return
    saved = "nothing saved yet" if status.last_checkpoint is None else f"newest checkpoint: step {status.last_checkpoint}"
    say(f"run {folder.root.name} {status.state}; {saved}")
    if lease is not None and _holds(folder, lease):
        say(f"its driver was ended on {lease.host}: for {STALE_AFTER_S:.0f} s it still seems to run, which `resume` waits for")
    next_command(command("resume", run, storage=storage))


def _status_after(run: RunFolder, lease: LeaseState | None) -> RunStatus:
    """Where a run is whose driver, or waiting job (no lease), was ended. Who was ended elsewhere still seems to hold it, and does not."""
    status, ended = read_status(run), {"exit_code": int(ExitCode.INTERRUPTED), "stage": "", "seconds_left": None, "pid": None, "host": ""}
    if lease is None:
        return replace(status, state="stopped", **ended)
    return replace(status, state="interrupted", **ended) if _holds(run, lease) else status


def _pending(run: RunFolder) -> Submission | None:
    from launcher.submitting import pending_submission

    return pending_submission(run) if newest_submission(run) is not None else None


def _stop_driver(run: RunFolder, lease: LeaseState, grace_s: float, *, save: bool) -> None:
    request_stop(run, grace_s=grace_s, save=save, by="maskwright stop", lease=lease.token)
    deadline = time.monotonic() + (grace_s if save else 0.0) + KILL_AFTER_S
    while _holds(run, lease) and time.monotonic() < deadline:
        time.sleep(_LOOK_S)
    if _holds(run, lease):
        _kill(run, lease)


def _holds(run: RunFolder, lease: LeaseState) -> bool:
    current = holder(run)
    return current is not None and current.token == lease.token


def _kill(run: RunFolder, lease: LeaseState) -> None:
    """End a driver that does not answer. Its Ray processes go with it."""
    submission = driving_submission(run, run.read_events())
    if not lease.is_here() and (submission is None or not _end_job(run, submission)):
        raise ConflictError(
            f"the run's process {lease.pid} on {lease.host} does not answer", "End it there; the run is free when its heartbeat is 30 s old."
        )
    if lease.is_here() and process_start(lease.pid) == lease.pid_started:
        os.kill(lease.pid, signal.SIGKILL)
        while process_start(lease.pid) == lease.pid_started:
            time.sleep(0.05)


def _end_waiting(run: RunFolder, waiting: Submission, *, now: bool) -> bool:
    """End a job that has not begun. With `now` it is given up whatever its cluster says: one that comes of it all the same finds nothing to do."""
    try:
        ended = _end_job(run, waiting)
    except UnreachableError as error:
        if not now:
            raise UnreachableError(error.cause, "Where that cluster is gone for good: `maskwright stop --now` gives the submission up.") from error
        ended = False
    if (ended or now) and waiting.waits(run):
        give_up(run, waiting)
    return ended or now


def _end_job(run: RunFolder, submission: Submission) -> bool:
    """End a job through its cluster, which kills what does not end by itself; False where there was none any more."""
    from launcher.job_request import STOP_WAIT_S
    from launcher.submitting import jobs_of

    jobs = jobs_of(run, submission, _ANSWER_S)
    was_alive = jobs.look(submission.job).is_alive
    if was_alive:
        jobs.end(submission.job)
    deadline = time.monotonic() + STOP_WAIT_S + KILL_AFTER_S
    while jobs.look(submission.job).is_alive:
        if time.monotonic() > deadline:
            raise ConflictError(f"job {submission.job} does not end", f"Look at the cluster: {jobs.place}")
        time.sleep(_LOOK_S)
    return was_alive


VERBS = (stop,)
