"""The sbatch script of a submission: what a job on Slurm is asked for, and what it starts there (pure)."""

import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from data_pipeline.errors import ConfigError
from launcher.cluster_config import SlurmCluster
from launcher.submission import Submission, submission_folder
from trainer.runlog import RunFolder

LOG = "job.log"
SCRIPT = "job.sh"
"""In the submission's folder."""

_MEANINGFUL = "\\:"
"""To Slurm, which then replaces nothing in a path, and to Python, which takes two paths for one."""
_WHAT_IT_DOES = """\
# Ray starts on the allocation, its head here and a node on every other machine (srun), and drives the run. On SIGTERM, which comes before the
# time limit and with `scancel --batch --signal=TERM`, the run saves a checkpoint and the job goes back into the queue, to continue from there.
"""


@dataclass(frozen=True)
class JobScript:
    """A job for sbatch. Everybody who may look at jobs can read it."""

    job: str
    script: str
    folder: str
    """Where it lies, with the packages and what the job prints."""
    package: str
    """Name of the file with our packages."""

    @property
    def artefact(self) -> str:
        """The script."""
        return self.script

    def to_json(self) -> dict[str, Any]:
        """JSON object."""
        return {"job": self.job, "script": self.script}


def job_script(run: RunFolder, submission: Submission, cluster: SlurmCluster, package: str) -> JobScript:
    """The job for a submission, whose packages lie in the file `package` of its folder.

    Configuration and command lie in the run's folder: nothing of them is in the script, and nothing of the environment here.

    Raises:
        ConfigError: the run lies in a store, or in a folder whose name no script can hold.
    """
    if not run.root.is_local:
        raise ConfigError(f"storage {run.root.parent} is no folder", "Jobs on Slurm need a storage that all of its machines see at one path.")
    folder = submission_folder(run, submission.number)
    if not str(folder).isprintable() or set(_MEANINGFUL) & set(str(folder)):
        raise ConfigError(f"storage {str(run.root.parent)!r:.200} has characters in its name that no job can hold", "Give the folder another name.")
    lines = [f"#SBATCH {option}" for option in _options(submission, cluster, f"{folder}/{LOG}")]
    program = [cluster.environment.python, "-P", "-m", "launcher.clusters.allocation", run.root.url, str(submission.number)]
    no_token = "unset SLURM_JWT"  # it soon grows too old
    start = [no_token, f"export PYTHONPATH={shlex.quote(f'{folder}/{package}')}", f"exec {shlex.join(program)}"]
    script = "\n".join(["#!/bin/bash", *lines, _WHAT_IT_DOES + "\n".join([*cluster.setup_commands, *start, ""])])
    return JobScript(submission.job, script, str(folder), package)


def _options(submission: Submission, cluster: SlurmCluster, log: str) -> Iterator[str]:
    yield f"--job-name={submission.job}"
    yield f"--nodes={cluster.nodes}"
    yield "--ntasks-per-node=1"
    wanted = {
        "--cpus-per-task": cluster.cpus_per_task,
        "--gpus-per-node": cluster.gpus_per_node,
        "--partition": cluster.partition,
        "--account": cluster.account,
        "--time": cluster.time_limit,
    }
    yield from (f"{name}={value}" for name, value in wanted.items() if value is not None)
    yield from cluster.options
    yield "--requeue"
    if cluster.min_workers is not None:
        yield "--no-kill"  # a lost machine shrinks the run
    yield f"--signal=B:TERM@{cluster.grace_s}"
    yield "--export=NONE"  # what is secret here stays here
    yield "--propagate=NONE"  # the limits of a login node, as for open files, are too low for Ray
    yield "--chdir=/"
    yield "--open-mode=append"
    yield f"--output={quoted(log)}"


def quoted(path: str) -> str:
    """A path without backslashes as sbatch reads it in a script: in double quotes, `%` twice, because it stands for something."""
    return '"' + path.replace("%", "%%").replace('"', '\\"') + '"'
