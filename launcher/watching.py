"""Looks at a run again and again until it has ended: for `status --watch` and `logs -f` (reads storage, asks the cluster that the run waits for)."""

import math
import time
from collections.abc import Iterator
from dataclasses import replace

from data_pipeline.errors import ExitCode, UnreachableError
from launcher.lease import STALE_AFTER_S, holder, read_lease
from launcher.run_status import RunStatus, may_begin_anew, read_status
from trainer.runlog import RunFolder

SILENCE_S = 60.0
"""How long a cluster that is followed may not answer, and a driver on another machine not be heard of beyond its lease."""


def status_of(run: RunFolder) -> RunStatus:
    """The status of a run; where it waits on a cluster, for the first time or anew, as that has it."""
    found = read_status(run)
    if found.state != "submitted" and not (found.submission and found.state in {"interrupted", "stopped"} and may_begin_anew(run.read_events())):
        return found
    from launcher.submitting import asked_status  # which takes Ray

    return asked_status(found, run)


def statuses(run: RunFolder) -> Iterator[RunStatus]:
    """The status of a run, each time that it is asked.

    Raises:
        UnreachableError: the cluster that it waits for has not answered for long.
    """
    silent_since = math.inf
    while True:
        found, now = status_of(run), time.monotonic()
        is_silent = found.state == "submitted" and found.remedy  # a cause alone is why it waits
        silent_since = min(silent_since, now) if is_silent else math.inf
        if now - silent_since > SILENCE_S:
            raise UnreachableError(found.cause, found.remedy)
        yield _while_in_doubt(found, run)


def _while_in_doubt(found: RunStatus, run: RunFolder) -> RunStatus:
    """A run whose driver has not been heard of for a little too long still runs, as far as anybody knows: its storage may be slow."""
    lease = read_lease(run) if found.state == "interrupted" else None
    if lease is None or lease.is_dead() or time.time() - lease.time > STALE_AFTER_S + SILENCE_S:
        return found
    cause = f"nothing is heard of its driver on {lease.host} just now"
    return replace(found, state="running", exit_code=int(ExitCode.RUNNING), stage=lease.stage, cause=cause, remedy="")


def endings(run: RunFolder) -> Iterator[bool]:
    """Whether a run has ended, each time that it is asked: cheap while somebody drives it.

    Raises:
        UnreachableError: as `statuses`.
    """
    looks = statuses(run)
    while True:
        yield not holder(run) and next(looks).exit_code != ExitCode.RUNNING
