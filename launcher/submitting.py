"""Gives a run to a cluster, and finds what became of it there (reads and writes the run folder, asks the cluster)."""

import os
import re
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from data_pipeline.errors import ConfigError, ConflictError, ExitCode, UnreachableError, UsageError
from data_pipeline.storage import Location
from launcher.cluster_config import Cluster, RayCluster
from launcher.clusters.local import this_machine
from launcher.clusters.opening import workers_of
from launcher.clusters.ray_jobs import JobState, RayJobs
from launcher.config import dump_yaml
from launcher.job_request import JobRequest, job_request, pack_packages, package_name
from launcher.jobs import allowed_changes, with_whole_paths
from launcher.lease import newest_lease, proven_holder, taken
from launcher.run_status import RunStatus, State, read_status
from launcher.runs import cluster_file
from launcher.submission import Submission, claim, new_job_name, next_number, require_ours, revoke, submission_folder, waiting_submission
from trainer.config import RunConfig
from trainer.runlog import RunFolder

_CODES = {int(code) for code in ExitCode}
LOOK_ANSWER_S = 5.0
"""What a cluster has for an answer to who only looks."""
_HANDOVER_S = 60.0
"""So long after its submission a job may be on its way to the cluster, with its packages."""
_NO_PYTHON = {126, 127}
"""What a shell says of a command that it cannot start."""


@dataclass(frozen=True)
class Prepared:
    """All that is needed to submit a run, and nothing done yet."""

    run: RunFolder
    config: RunConfig
    cluster: RayCluster
    submission: Submission
    request: JobRequest
    package: bytes


def prepare_submission(config: RunConfig, cluster: Cluster, *, verb: str, overrides: Sequence[str] = ()) -> Prepared:
    """The submission of a run that is to be driven on a cluster as by `verb`, `run` or `resume`; `overrides` are those of `resume`.

    Raises:
        ConfigError: the configuration cannot continue this run, or the cluster's file says not how to submit.
        EnvironmentMismatchError: the packages are too large.
    """
    config = with_whole_paths(config)
    dashboard = _dashboard(cluster)
    assert isinstance(cluster, RayCluster)
    workers_of(cluster, this_machine(), max(phase.num_micro_batches for phase in config.phases))
    run = RunFolder(Location.at(config.storage) / config.name)
    allowed_changes(run, config, deliberate=verb == "resume" and bool(overrides))
    number = next_number(run)
    folder = submission_folder(run, number)
    what = [str(folder / "run.yaml")] if verb == "run" else [run.root.url, *(word for override in overrides for word in ("--set", override))]
    arguments = [verb, *what, "--cluster", str(folder / "cluster.yaml")]
    submission = Submission(
        number, new_job_name(run, number), dashboard, arguments, os.getcwd(), newest_lease(run), socket.gethostname(), time.time()
    )
    package = pack_packages(Path(__file__).parents[1])
    return Prepared(run, config, cluster, submission, job_request(run, submission, cluster, package_name(package)), package)


def submit(prepared: Prepared, say: Callable[[str], None]) -> RayJobs:
    """Hand a prepared submission over to its cluster; returns the jobs of that. `say` is told when that takes a while.

    The run's folder tells of it before the cluster does: whoever looks finds the run, whatever happens here in between.

    Raises:
        UnreachableError: the cluster does not answer, or not to us. ConflictError: somebody drives the run, or it waits already.
    """
    run, submission = prepared.run, prepared.submission
    jobs = RayJobs.connect(submission.dashboard)
    if (lease := proven_holder(run, say)) is not None:
        raise taken(run, lease)
    _require_not_waiting(run, given=submission.dashboard)
    claim(run, submission)
    try:
        _require_not_driven_since(run, submission)
        _write_configs(prepared)
        jobs.post(prepared.request, prepared.package)
    except BaseException:
        revoke(run, submission)
        raise
    return jobs


def _write_configs(prepared: Prepared) -> None:
    run, submission = prepared.run, prepared.submission
    folder = submission_folder(run, submission.number)
    (folder / "run.yaml").write_bytes(dump_yaml(prepared.config))
    (folder / "cluster.yaml").write_bytes(dump_yaml(prepared.cluster))
    if not run.config.exists():
        run.config.write_bytes(dump_yaml(prepared.config))
        cluster_file(run).write_bytes(dump_yaml(prepared.cluster))


def _dashboard(cluster: Cluster) -> str:
    if not isinstance(cluster, RayCluster):
        raise UsageError(f"nothing is submitted to a cluster of kind {cluster.kind}", "Run it here with `maskwright run`, or give another --cluster.")
    if cluster.dashboard is None:
        raise ConfigError("the cluster file has no dashboard: that is where jobs are submitted", "Set dashboard: http://HEAD:8265 in it.")
    return cluster.dashboard.rstrip("/")


def _require_not_waiting(run: RunFolder, given: str) -> None:
    waiting = waiting_submission(run)
    if waiting is None:
        return
    require_ours(run, waiting, given)
    if _is_alive(waiting):
        raise ConflictError(
            f"run {run.root.name} was submitted already, as job {waiting.job} of {waiting.dashboard}, and is about to start",
            f"Follow it with `maskwright status {run.root.name}`, or end it with `maskwright stop {run.root.name}`.",
        )


def _require_not_driven_since(run: RunFolder, submission: Submission) -> None:
    """After the claim, so that nothing comes in between: a job that waited when its cluster was asked may have begun since."""
    if newest_lease(run) != submission.lease:
        raise ConflictError(f"another command began to drive run {run.root.name} just now", f"Follow it with `maskwright status {run.root.name}`.")


def _is_alive(submission: Submission) -> bool:
    """Whether its job may still begin. A cluster that does not answer has no say: two drivers of a run there never are, whatever it does later."""
    try:
        return job_state(RayJobs.connect(submission.dashboard), submission).is_alive
    except UnreachableError:
        return False


def jobs_of(run: RunFolder, submission: Submission, answer_s: float = LOOK_ANSWER_S) -> RayJobs:
    """The jobs of the cluster that a submission of a run was for.

    Raises:
        UnreachableError: it does not answer, or its address is the word of another user.
    """
    require_ours(run, submission)
    return RayJobs.connect(submission.dashboard, answer_s)


def job_state(jobs: RayJobs, submission: Submission) -> JobState:
    """What its cluster knows of a submission. One that is being handed over waits, though no cluster knows it yet."""
    state = jobs.look(submission.job)
    is_new = state.state == "unknown" and 0 <= time.time() - submission.time < _HANDOVER_S
    return JobState("waiting") if is_new else state


def asked_status(status: RunStatus, run: RunFolder) -> RunStatus:
    """The status of a run that was submitted and that nobody drives yet, with what its cluster says of it."""
    submission = waiting_submission(run)
    if submission is None:  # it has begun since
        return read_status(run)
    try:
        state = job_state(jobs_of(run, submission), submission)
    except UnreachableError as error:
        return replace(status, cause=f"whether it still waits is not known: {error.cause}", remedy=error.remedy)
    if state.is_alive:
        return status
    if waiting_submission(run) != submission:
        return read_status(run)
    end = end_of(submission, state)
    return replace(status, state=end.state, exit_code=end.exit_code, cause=end.cause, remedy=end.remedy)


@dataclass(frozen=True)
class End:
    """How a job ended that may have driven its run or not; what drove has left more in the run's folder."""

    state: State
    exit_code: int
    cause: str
    remedy: str = "Submit the run again."


def end_of(submission: Submission, job: JobState) -> End:
    """How a submission's job ended: by its command's exit code where that ended by itself, resumable where it was ended."""
    if job.state == "unknown":
        cause = f"the cluster at {submission.dashboard} does not know job {submission.job} any more: was it started anew?"
        return End("interrupted", int(ExitCode.INTERRUPTED), cause)
    if job.was_stopped:
        return End("stopped", int(ExitCode.INTERRUPTED), f"job {submission.job} was stopped")
    if job.exit_code is None:
        return End("failed", int(ExitCode.FAILED), *_told(job.message))
    if job.exit_code in _NO_PYTHON:
        return End("failed", int(ExitCode.ENVIRONMENT), *_told(job.message))
    if job.exit_code not in _CODES:
        return End("interrupted", int(ExitCode.INTERRUPTED), f"the command of job {submission.job} was killed (exit code {job.exit_code})")
    return End("failed" if job.exit_code else "finished", job.exit_code, *_told(job.message))


def _told(message: str) -> tuple[str, str]:
    """Cause and remedy in what Ray says of a job: those that our command has printed last, or else what Ray itself says."""
    lines = [line.strip() for line in message.splitlines() if re.search(r"\w", line)]
    errors = [number for number, line in enumerate(lines) if line.startswith("error: ")]
    cause, *remedy = lines[errors[-1] : errors[-1] + 2] if errors else [lines[-1][:300] if lines else "the job failed"]
    return cause.removeprefix("error: "), "".join(remedy) or End.remedy
