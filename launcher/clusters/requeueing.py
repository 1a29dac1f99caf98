"""When a job on Slurm goes back into the queue as it ends (pure), and how (reads and writes the run folder, starts Slurm's commands)."""

import signal
import subprocess
from dataclasses import dataclass

from data_pipeline.errors import ExitCode, NotFoundError
from launcher.control import read_stop
from launcher.submission import read_submission, wait_again
from trainer.runlog import RunFolder

_SAVED = {ExitCode.INTERRUPTED, -signal.SIGTERM}
"""How a driver ends that was told to."""
_LOST = {*_SAVED, ExitCode.UNREACHABLE, ExitCode.ENVIRONMENT}
"""And one whose Ray has gone."""
MOST_LOST = 3
"""A job whose Ray ends by itself is put back into the queue so many times."""


@dataclass(frozen=True)
class JobEnd:
    """How the driver of a run ended in one start of its job."""

    code: int
    """Of the driver; below zero it is the signal that ended it."""
    by_slurm: bool = False
    """Whether Slurm had told the job to end."""
    lost_ray: bool = False
    """Whether Ray had ended by itself."""
    by_person: bool = False
    """Whether somebody wants the run to end, whatever else happened."""
    restarts: int = 0
    """How often the job was put back before."""

    @property
    def exit_code(self) -> int:
        """The job's."""
        return int(ExitCode.INTERRUPTED) if self.code in _SAVED else self.code if self.code >= 0 else 128 - self.code


def goes_back(end: JobEnd) -> bool:
    """Whether the job is to begin anew: its end was none of the run's doing, and nobody wants it (pure)."""
    if end.by_person:
        return False
    if end.by_slurm:
        return end.code in _SAVED
    return end.lost_ray and end.code in _LOST and end.restarts < MOST_LOST


def is_stopped(run: RunFolder, since: float) -> bool:
    """Whether somebody has stopped the run since an instant: no signal, which is how Slurm asks."""
    request = read_stop(run)
    return request is not None and not request.by_signal and request.time >= since


def waits_again(run: RunFolder, number: int) -> bool:
    """Say that the submission's job is to begin anew; False where it was given up meanwhile.

    It is said before Slurm is asked, which may have put the job back by itself and be about to kill who says so.
    """
    try:
        wait_again(run, read_submission(run, number))
    except NotFoundError:
        return False
    return True


def put_back(job: str) -> None:
    """Put a job that runs back into the queue; one that Slurm cancels, or has put back by itself, is left alone."""
    if _is_running(job) and subprocess.run(["scontrol", "requeue", job], check=False).returncode == 0:
        print(f"job {job} goes back into the queue", flush=True)


def _is_running(job: str) -> bool:
    done = subprocess.run(["squeue", "--noheader", f"--jobs={job}", "--format=%T"], capture_output=True, text=True, check=False)
    return done.stdout.strip() == "RUNNING"
