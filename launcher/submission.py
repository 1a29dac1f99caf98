"""Submissions of a run: each time that it is given to a cluster as a job, numbered, in the run's folder (reads and writes the run folder)."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

from data_pipeline.errors import ConflictError, NotFoundError
from data_pipeline.storage import Location
from launcher.lease import newest_lease
from trainer.runlog import RunFolder

SUBMISSION_VARIABLE = "MASKWRIGHT_SUBMISSION"
"""In the environment of a driver that is a job: its id, which the run's events then tell."""


@dataclass(frozen=True)
class Submission:
    """A run given to a cluster as a job; what its submission.json says."""

    number: int
    job: str
    """Its id at the cluster: from the run's name, its place and `number`, so that it is given once."""
    dashboard: str
    arguments: list[str]
    """The command that the job runs there."""
    home: str
    """The current folder of who submitted: relative paths in the configuration mean the same there, where it exists."""
    lease: int
    """The run's newest lease at that time: once there is another, somebody has begun to drive."""
    host: str
    time: float

    def waits(self, run: RunFolder) -> bool:
        """Whether nobody has begun to drive the run since it was submitted."""
        return newest_lease(run) <= self.lease


def submission_folder(run: RunFolder, number: int) -> Location:
    """Folder of a submission: submission.json, and the run.yaml and cluster.yaml it was made with."""
    return run.root / "submissions" / f"{number:04d}"


def job_name(run: RunFolder, number: int) -> str:
    """Id of a job: no two runs, whatever their storage, have the same."""
    return f"{run.root.name}-{hashlib.sha256(run.root.url.encode()).hexdigest()[:8]}-{number:04d}"


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


def read_submission(run: RunFolder, number: int) -> Submission:
    """A submission by its number.

    Raises:
        NotFoundError: there is none.
    """
    try:
        return Submission(**_file(run, number).read_json())
    except (ValueError, TypeError) as error:
        raise NotFoundError(f"{_file(run, number)} describes no submission", "Submit the run again.") from error


def newest_submission(run: RunFolder) -> Submission | None:
    """The last that was made, and not revoked; None when there is none."""
    return next(_submissions(run), None)


def waiting_submission(run: RunFolder) -> Submission | None:
    """The newest submission while nobody has begun to drive the run since; None otherwise. What became of its job, the cluster knows."""
    submission = newest_submission(run)
    return submission if submission is not None and submission.waits(run) else None


def driving_submission(run: RunFolder, events: Iterable[dict[str, Any]]) -> Submission | None:
    """The submission that waits to drive the run, or whose job was the last to, by its `events`; None where another command was.

    It need not be the newest: a job that found the run taken has ended, and drove nothing.
    """
    if (waiting := waiting_submission(run)) is not None:
        return waiting
    begun = [event for event in events if event["kind"] == "command_started"]
    job = begun[-1].get("submission") if begun else None
    return next((submission for submission in _submissions(run) if submission.job == job), None) if job else None


def _submissions(run: RunFolder) -> Iterator[Submission]:
    """Those that were made and not revoked, the newest first."""
    for number in sorted(_numbers(run), reverse=True):
        with suppress(NotFoundError):
            yield read_submission(run, number)


def _numbers(run: RunFolder) -> list[int]:
    return [int(name) for name in (run.root / "submissions").children() if name.isdigit()]


def _file(run: RunFolder, number: int) -> Location:
    return submission_folder(run, number) / "submission.json"
