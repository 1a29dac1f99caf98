"""When a job on Slurm goes back into the queue as it ends (pure), and how (reads and writes the run folder, starts Slurm's commands)."""

import shutil
import signal
import socket
import time
from contextlib import suppress
from dataclasses import asdict, dataclass

from data_pipeline.errors import EnvironmentMismatchError, ExitCode, MaskwrightError, NotFoundError
from launcher.clusters.slurm_jobs import call_slurm
from launcher.control import read_stop
from launcher.policy import MAX_FAILURES_WITHOUT_PROGRESS
from launcher.run_status import committed_steps
from launcher.submission import read_submission, submission_folder, wait_again
from trainer.runlog import RunFolder

_SAVED = {ExitCode.INTERRUPTED, -signal.SIGTERM}
"""How a driver ends that was told to."""
_LOST = {*_SAVED, ExitCode.UNREACHABLE, ExitCode.ENVIRONMENT}
"""And one whose Ray has gone, as it may with the job."""
PAUSE_S = 5.0
"""Between two tries to put a job back."""
_ANSWER_S = 20.0
_PROGRAMS = ("squeue", "scontrol", "srun")
_STARTS = "starts.json"
"""In the submission's folder."""


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
    is_restart: bool = False
    """Whether the job began before: then who drives the run may be what is left of it on a machine that Slurm has lost."""
    idle_starts: int = 0
    """Starts of the job in a row, this one among them, after which the run was where it was before."""

    @property
    def is_spent(self) -> bool:
        """Whether the run could go on where it ended, but has not come further in too many starts."""
        return not self.by_person and _can_go_on(self) and self.idle_starts > MAX_FAILURES_WITHOUT_PROGRESS

    @property
    def exit_code(self) -> int:
        """The job's."""
        if self.is_spent:
            return int(ExitCode.RETRIES_SPENT)
        return int(ExitCode.INTERRUPTED) if self.code in _SAVED else self.code if self.code >= 0 else 128 - self.code


def goes_back(end: JobEnd) -> bool:
    """Whether the job is to begin anew: its end was none of the run's doing, and nobody wants it (pure)."""
    return _can_go_on(end) and not end.by_person and not end.is_spent


def _can_go_on(end: JobEnd) -> bool:
    had_to_end = end.by_slurm or end.lost_ray
    return (had_to_end and end.code in _LOST) or (end.is_restart and end.code == ExitCode.CONFLICT)


@dataclass(frozen=True)
class Start:
    """One start of a submission's job."""

    idle_starts: int
    """Starts in a row, this one among them, that would be idle if nothing came of it."""
    progress: list[int]
    """How far the run was."""


def count_start(run: RunFolder, number: int) -> Start:
    """Note in the submission's folder that its job begins: also of a start that is lost with its machine is then known what came of it."""
    file, progress = submission_folder(run, number) / _STARTS, _progress(run)
    try:
        last = Start(**file.read_json())
    except (NotFoundError, ValueError, TypeError):
        last = Start(0, progress)
    start = Start(1 + last.idle_starts if last.progress == progress else 1, progress)
    file.write_json(asdict(start))
    return start


def idle_starts(run: RunFolder, start: Start) -> int:
    """How many starts have been idle in a row, as this one ends."""
    return start.idle_starts if _progress(run) == start.progress else 0


def _progress(run: RunFolder) -> list[int]:
    """What a start can add to: steps that are saved, stages that are finished, tasks that are fine-tuned."""
    stages = sum(event["kind"] == "stage_finished" for event in run.read_events())
    tasks = sum((run.finetune / task / "results.json").exists() for task in run.finetune.children())
    return [max(committed_steps(run), default=0), stages, tasks]


def record_spent(run: RunFolder) -> None:
    """Say in the run's events, and in what the job prints, that it does not begin anew."""
    cause = f"nothing was saved in {MAX_FAILURES_WITHOUT_PROGRESS + 1} starts of the job in a row"
    remedy = "Save more often (checkpoint.every_steps), or ask for more time (time_limit), then `maskwright resume`."
    print(f"error: {cause}\n{remedy}", flush=True)
    with suppress(MaskwrightError, OSError):
        run.append_event("failed", attempt=0, exit_code=int(ExitCode.RETRIES_SPENT), cause=cause, remedy=remedy)


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


def put_back(job: str, allowed_s: float) -> None:
    """Put a job that runs back into the queue; one that Slurm cancels, or has put back by itself, is left alone.

    A Slurm that does not answer, such as one that is just started anew, is asked again for so many seconds. The submission waits either way.
    """
    deadline = time.monotonic() + allowed_s
    while True:
        try:
            if call_slurm(_ANSWER_S, "squeue", "--noheader", f"--jobs={job}", "--format=%T").strip() == "RUNNING":
                call_slurm(_ANSWER_S, "scontrol", "requeue", job)
                print(f"job {job} goes back into the queue", flush=True)
        except MaskwrightError as error:
            print(f"job {job} is not back in the queue yet: {error.cause}", flush=True)
        else:
            return
        if time.monotonic() >= deadline:
            print(f"error: job {job} could not be put back into the queue\nRun `maskwright resume`.", flush=True)
            return
        time.sleep(PAUSE_S)


def require_programs() -> None:
    """See, before anything is trained, that the machine has what the end of the job takes.

    Raises:
        EnvironmentMismatchError: it has not.
    """
    if lacks := [program for program in _PROGRAMS if shutil.which(program) is None]:
        raise EnvironmentMismatchError(
            f"{socket.gethostname()} has no {', '.join(lacks)} in PATH, with which a job goes back into the queue",
            "Put Slurm's programs into the PATH that a login there has.",
        )
