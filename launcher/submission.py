"""Submissions of a run: each time that it is given to a cluster as a job, numbered, in the run's folder (reads and writes the run folder)."""

import json
import os
import re
import uuid
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from typing import Any

from data_pipeline.errors import ConflictError, ExitCode, MaskwrightError, NotFoundError, UnreachableError
from data_pipeline.storage import Location
from launcher.cluster_config import DASHBOARD, NAMESPACE
from launcher.lease import newest_lease, process_age_s
from trainer.runlog import RunFolder

SUBMISSION_VARIABLE = "MASKWRIGHT_SUBMISSION"
"""In the environment of a driver that is a job: its id, which the run's events then tell."""
_CHOSEN = "RAY_API_SERVER_ADDRESS"
"""Of Ray: where the user's jobs go."""
_ADDRESSES = {"ray": DASHBOARD, "ray_up": DASHBOARD, "kuberay": NAMESPACE}
"""By kind of cluster; others have none."""


@dataclass(frozen=True)
class Submission:
    """A run given to a cluster as a job; what its submission.json says."""

    number: int
    job: str
    """Its id at the cluster, which is given once."""
    dashboard: str
    """Where it was sent; empty at kinds of clusters that the machine which submits knows by itself."""
    arguments: list[str]
    """The command that the job runs there."""
    home: str
    """The current folder of who submitted: relative paths in the configuration mean the same there, where it exists."""
    lease: int
    """The run's newest lease at that time: once there is another, somebody has begun to drive."""
    host: str
    time: float
    kind: str = "ray"
    """Of the cluster."""

    def __post_init__(self) -> None:
        if not re.fullmatch(_ADDRESSES.get(self.kind, ""), self.dashboard):
            raise ValueError(f"{self.dashboard} is no address of a cluster")

    @property
    def overrides(self) -> list[str]:
        """Those of its command, if that is `resume`."""
        return [value for name, value in pairwise(self.arguments) if name == "--set"]

    def waits(self, run: RunFolder) -> bool:
        """Whether nobody has begun to drive the run since it was submitted."""
        return newest_lease(run) <= self.lease


def submission_folder(run: RunFolder, number: int) -> Location:
    """Folder of a submission: submission.json, the run.yaml and cluster.yaml it was made with, and what its driver is given (inside.yaml)."""
    return run.root / "submissions" / f"{number:04d}"


def new_job_name(run: RunFolder, number: int) -> str:
    """Id of a job, which no other has: not of another storage, nor of an earlier run of this name, whose jobs the cluster may remember."""
    return f"{run.root.name}-{uuid.uuid4().hex[:12]}-{number:04d}"


def next_number(run: RunFolder) -> int:
    """Of the submission that follows those there are."""
    return 1 + max(_numbers(run), default=0)


def claim(run: RunFolder, submission: Submission) -> None:
    """Leave a submission in the run's folder.

    Raises:
        ConflictError: another command has submitted the run since its number was chosen.
    """
    data = json.dumps(asdict(submission), indent=2, sort_keys=True) + "\n"
    if not _file(run, submission.number).claim(data.encode()):
        raise ConflictError(f"run {run.root.name} was submitted by another command just now", "Follow it with `maskwright status`.")


def revoke(run: RunFolder, submission: Submission) -> None:
    """Take a submission back that no cluster has taken: a job that comes of it all the same finds nothing to do, and ends. Its number stays taken."""
    _file(run, submission.number).remove()


def record_posted(run: RunFolder, submission: Submission, *, packing_s: float, upload_s: float) -> None:
    """Say in the run's events that a cluster has just taken a submission, and what that took. What cannot be written is not said: the job goes on."""
    command_s = process_age_s() - packing_s - upload_s
    with suppress(MaskwrightError, OSError):
        run.append_event(
            "submitted",
            attempt=0,
            submission=submission.job,
            command_s=round(command_s, 3),
            packing_s=round(packing_s, 3),
            upload_s=round(upload_s, 3),
        )


def give_up(run: RunFolder, submission: Submission) -> None:
    """Take a submission back that a cluster has taken: the run's events tell that it was stopped, and `resume` submits it again."""
    _given_up(run, submission.number).write_json(asdict(submission))
    revoke(run, submission)
    run.append_event(
        "stopped",
        attempt=0,
        exit_code=int(ExitCode.INTERRUPTED),
        submission=submission.job,
        cause=f"job {submission.job} was stopped before it began",
        remedy="Run `maskwright resume`.",
    )


def wait_again(run: RunFolder, submission: Submission) -> None:
    """Say that a submission's job is to begin anew: until somebody drives the run again, it waits as it did at first."""
    _file(run, submission.number).write_json(asdict(replace(submission, lease=newest_lease(run))))


def require_ours(run: RunFolder, submission: Submission, given: str | None = None) -> None:
    """Our token goes to no address that another user has written into storage, nor is a job of ours made of what they wrote; to `given`, and to the
    address in Ray's environment, a token may go.

    Who may write into a store is not seen: whoever can has its credentials.

    Raises:
        UnreachableError: another user wrote it.
    """
    if not run.root.is_local or (submission.dashboard and submission.dashboard in {given, os.environ.get(_CHOSEN)}):
        return
    for file in (_file(run, submission.number), _given_up(run, submission.number)):
        with suppress(FileNotFoundError), file.path.open("rb") as opened:  # owner and contents of one and the same file
            if os.fstat(opened.fileno()).st_uid == os.getuid() and json.load(opened)["dashboard"] == submission.dashboard:
                return
    if not re.fullmatch(DASHBOARD, submission.dashboard):
        raise UnreachableError(f"another user submitted run {run.root.name}", "Submit it with files of your own: `maskwright submit`.")
    raise UnreachableError(
        f"another user submitted run {run.root.name}, to {submission.dashboard}: no token of yours is sent there by their word",
        f"If that is your cluster: {_CHOSEN}={submission.dashboard} in the environment.",
    )


def read_submission(run: RunFolder, number: int) -> Submission:
    """A submission by its number.

    Raises:
        NotFoundError: there is none.
    """
    return _read(_file(run, number))


def newest_submission(run: RunFolder) -> Submission | None:
    """The last that was made, and not revoked; None when there is none."""
    return next(_submissions(run), None)


def waiting_submission(run: RunFolder) -> Submission | None:
    """The newest submission while nobody has begun to drive the run since; None otherwise. What became of its job, the cluster knows."""
    submission = newest_submission(run)
    return submission if submission is not None and submission.waits(run) else None


def driving_submission(run: RunFolder, events: Iterable[dict[str, Any]]) -> Submission | None:
    """The submission that waits to drive the run, or whose job was the last to, by its `events`; None where another command was.

    It need not be the newest: a job that found the run taken has ended, and drove nothing. One that was given up counts.
    """
    if (waiting := waiting_submission(run)) is not None:
        return waiting
    told = [event for event in events if event["kind"] == "command_started" or (event["kind"] == "stopped" and "submission" in event)]
    job = told[-1].get("submission") if told else None
    return next((submission for submission in _submissions(run, given_up=True) if submission.job == job), None) if job else None


def _submissions(run: RunFolder, *, given_up: bool = False) -> Iterator[Submission]:
    """Those that were made and not revoked, the newest first; also those that were given up, where asked for."""
    for number in sorted(_numbers(run), reverse=True):
        for file in (_file(run, number), *([_given_up(run, number)] if given_up else [])):
            with suppress(NotFoundError):
                yield _read(file)


def _read(file: Location) -> Submission:
    try:
        return Submission(**file.read_json())
    except (ValueError, TypeError) as error:
        raise NotFoundError(f"{file} describes no submission", "Submit the run again.") from error


def _numbers(run: RunFolder) -> list[int]:
    return [int(name) for name in (run.root / "submissions").children() if name.isdigit()]


def _file(run: RunFolder, number: int) -> Location:
    return submission_folder(run, number) / "submission.json"


def _given_up(run: RunFolder, number: int) -> Location:
    return submission_folder(run, number) / "given-up.json"
