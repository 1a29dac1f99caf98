"""The seam to Slurm: gives a job to sbatch, asks squeue and sacct what became of it, ends it (starts their processes)."""

import os
import re
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from data_pipeline.errors import ConfigError, ExitCode, UnreachableError
from launcher.clusters.slurm import LOG, SCRIPT, JobScript
from launcher.taken_jobs import JobState

_WAITING = {"PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "RESV_DEL_HOLD", "SPECIAL_EXIT"}
_OVER = {"COMPLETED", "FAILED", "OUT_OF_MEMORY", "CANCELLED", "TIMEOUT", "DEADLINE", "NODE_FAIL", "BOOT_FAIL", "PREEMPTED", "REVOKED"}
"""Whatever else a Slurm says, now or in a later release, something may still come of the job."""
_OUT_OF_REACH = ("contact slurm controller", "timed out", "connection refused", "munge", "communication", "configuration source", "slurm.conf")
"""In what Slurm's commands complain of: nothing is wrong with the job."""
_NO_OUTPUT = 128 + 53
"""Slurm's own number for a job whose output could not be opened."""
_NOT_SHARED = (
    "error: the machine that was to drive the run could not write the output of its job into the run's folder\n"
    "Use storage that all machines of the cluster and the one that submits share."
)
_OUT_OF_MEMORY = (
    "error: the job took more memory than Slurm gives it\n"
    "Ask for more in the cluster file: options: [--mem=0] is all that a machine has, where the job has it alone (--exclusive)."
)
_TAIL_BYTES = 4096
_THEIRS = ("SBATCH_", "SCANCEL_", "SQUEUE_", "SACCT_", "SLURM_")
"""Variables whose names begin so change what Slurm's commands do, whatever a script says; inside another job they are that job's."""
_NEEDED = {"SLURM_CONF", "SLURM_JWT"}
"""How they find Slurm, and who we are."""
ASKED_EVERY_S = 2.0
"""Everybody's jobs are scheduled by who answers: one process asks it no more often."""
_MOST_SELDOM_S = 30.0
"""And ever more seldom for what waits, which may take days."""
_answers: dict[str, "_Answer"] = {}
_NAME = "cluster-name"
"""In the submission's folder: of the Slurm that has the job. Another one knows nothing of it."""
known_name: list[str] = []
"""Of the Slurm that this machine belongs to, once it has answered."""


@dataclass(frozen=True)
class SlurmJobs:
    """The jobs of this user on the Slurm that this machine belongs to."""

    folder: Path
    """Of the submission."""
    submitted_at: float
    answer_s: float

    @property
    def place(self) -> str:
        """There is one."""
        return "Slurm"

    @classmethod
    def connect(cls, folder: Path, submitted_at: float, answer_s: float) -> "SlurmJobs":
        """Make sure of the Slurm that this machine belongs to; a process asks once.

        Raises:
            UnreachableError: it belongs to none, that does not answer, or it is another one than the submission was for.
        """
        jobs = cls(folder, submitted_at, answer_s)
        here = jobs.name()
        with suppress(FileNotFoundError):
            if (there := (folder / _NAME).read_text()) != here:
                raise UnreachableError(
                    f"the job is on the Slurm cluster {there}, this machine belongs to {here}", "Give the command on a machine of that cluster."
                )
        return jobs

    def name(self) -> str:
        """Of this Slurm.

        Raises:
            UnreachableError: it does not answer.
        """
        if not known_name:
            found = re.search(r"^ClusterName\s*=\s*(\S+)", self.call("scontrol", "show", "config"), re.MULTILINE)
            known_name.append(found[1] if found else "")
        return known_name[0]

    def post(self, request: JobScript, package: bytes) -> None:
        """Hand a job over.

        Raises:
            ConfigError: Slurm refuses it.
        """
        folder = Path(request.folder)
        (folder / request.package).write_bytes(package)
        (folder / _NAME).write_text(self.name())
        script = folder / SCRIPT
        script.write_text(request.script)
        self.call("sbatch", "--parsable", str(script))

    def look(self, job: str) -> JobState:
        """What became of a job; an answer may be `ASKED_EVERY_S` seconds old, of a job that has waited for long `_MOST_SELDOM_S`."""
        last = _answers.get(job)
        if last is not None and time.monotonic() < last.good_until:
            return last.state
        state = self._ask(job)
        if not state.is_alive:
            _answers.pop(job, None)
            return state
        waits_still = last is not None and last.state.state == state.state == "waiting"
        good_s = min(_MOST_SELDOM_S, 2 * last.good_s) if last is not None and waits_still else ASKED_EVERY_S
        _answers[job] = _Answer(state, good_s, time.monotonic() + good_s)
        return state

    def log(self, job: str) -> str:
        """Everything that the job has printed; nothing before it has."""
        del job
        try:
            return (self.folder / LOG).read_text(errors="replace")
        except FileNotFoundError:
            return ""

    def end(self, job: str) -> None:
        """Take a job out of the queue, or end it: Slurm gives its command some seconds to save (its `KillWait`)."""
        _answers.pop(job, None)
        self.call("scancel", f"--name={job}")

    def _ask(self, job: str) -> JobState:
        queue = self.call("squeue", "--noheader", "--states=all", f"--name={job}", "--Format=State:.40,exit_code:.40,Reason:.100")
        if lines := queue.strip().splitlines():
            name, status, *reason = lines[-1].split(maxsplit=2)
            return self._told(name, _exit_code(int(status)), "".join(reason).strip().removesuffix("None"))
        since = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(self.submitted_at - 60))
        wanted = ["--noheader", "--parsable2", "--allocations", "--format=State,ExitCode", f"--starttime={since}", f"--name={job}"]
        try:
            records = self.call("sacct", *wanted).split("\n")
        except (UnreachableError, ConfigError):  # many do without accounts
            return JobState("unknown")
        last = next((record for record in reversed(records) if record), None)
        if last is None:
            return JobState("unknown")
        name, _, code = last.partition("|")
        status, _, number = code.partition(":")
        return self._told(name.split()[0], int(status) or 128 * bool(int(number)) + int(number))

    def _told(self, name: str, exit_code: int, reason: str = "") -> JobState:
        return job_state(name, exit_code, self.log("")[-_TAIL_BYTES:], reason)

    def call(self, program: str, *arguments: str) -> str:
        """What one of Slurm's commands prints; raises as `call_slurm`."""
        return call_slurm(self.answer_s, program, *arguments)


class _Answer(NamedTuple):
    state: JobState
    good_s: float
    good_until: float


def call_slurm(answer_s: float, program: str, *arguments: str) -> str:
    """What one of Slurm's commands prints, which may take so many seconds.

    Raises:
        UnreachableError: there is no Slurm here, or it does not answer. ConfigError: it refuses.
    """
    try:
        done = subprocess.run(
            [program, *arguments],
            env=commands_environment(os.environ),
            capture_output=True,
            text=True,
            errors="replace",
            timeout=answer_s,
            check=False,
            stdin=subprocess.DEVNULL,
        )
    except FileNotFoundError as error:
        raise UnreachableError(
            f"this machine belongs to no Slurm: there is no {program} in PATH",
            "Submit from a login node of the cluster, or with another --cluster.",
        ) from error
    except subprocess.TimeoutExpired as error:
        raise UnreachableError(f"Slurm does not answer: {program} took over {answer_s:g} s", "Try again later (`sinfo`).") from error
    if done.returncode == 0:
        return done.stdout
    raise _complaint(program, done.stderr.splitlines() or done.stdout.splitlines()[:1])


def commands_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """That of Slurm's commands: ours, without what would change a job or an answer (pure)."""
    return {name: value for name, value in environment.items() if not name.startswith(_THEIRS) or name in _NEEDED}


def job_state(name: str, exit_code: int, printed: str, reason: str = "") -> JobState:
    """What Slurm's name for the state of a job means (pure); `printed` is the end of what it has printed, `reason` why it waits.

    A number of the command that was killed by signal n is 128 + n, as in a shell.
    """
    if name not in _OVER:
        waits = name in _WAITING
        return JobState("waiting" if waits else "running", message=f"Slurm lets it wait: {reason}" if waits and reason else "")
    if name == "FAILED" and exit_code == _NO_OUTPUT:
        return JobState("ended", exit_code=int(ExitCode.STORAGE), message=_NOT_SHARED)
    if name in {"COMPLETED", "FAILED"}:
        return JobState("ended", exit_code=exit_code, message=printed)
    if name == "OUT_OF_MEMORY":
        return JobState("ended", message=_OUT_OF_MEMORY)
    if name == "CANCELLED":
        return JobState("ended", was_stopped=True)
    return JobState("ended", was_lost=True, message=name)


def _exit_code(status: int) -> int:
    """Of a process whose status `wait` gave."""
    return status >> 8 if not status & 0x7F else 128 + (status & 0x7F)


def _complaint(program: str, lines: Sequence[str]) -> UnreachableError | ConfigError:
    said = [line.partition(": error: ")[2] or line for line in lines if line.strip()]
    last = (said or ["no reason given"])[-1][:300]
    if program != "sbatch" or any(words in line.lower() for line in lines for words in _OUT_OF_REACH):
        return UnreachableError(f"Slurm does not answer: {program}: {last}", "Look whether this machine belongs to a Slurm that runs (`sinfo`).")
    return ConfigError(
        f"Slurm refuses the job: {last.removeprefix('Batch job submission failed: ')}",
        "Correct the cluster file: `sinfo` shows partitions and their machines, `sacctmgr show assoc` accounts.",
    )
