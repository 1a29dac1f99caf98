"""Gives a run to a cluster, and finds what became of it there (reads and writes the run folder, asks the cluster)."""

import os
import re
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from data_pipeline.errors import ConflictError, ExitCode, UnreachableError
from data_pipeline.storage import Location
from launcher.cluster_config import Cluster, ElasticCluster
from launcher.clusters.local import this_machine
from launcher.clusters.opening import workers_of
from launcher.clusters.taking import require_taking, taker_of
from launcher.config import dump_yaml
from launcher.job_request import pack_packages, package_name
from launcher.jobs import allowed_changes, with_whole_paths
from launcher.lease import newest_lease, proven_holder, taken
from launcher.run_status import RunStatus, State, may_begin_anew, read_status
from launcher.runs import cluster_file
from launcher.submission import (
    Submission,
    claim,
    driving_submission,
    new_job_name,
    next_number,
    record_posted,
    require_ours,
    revoke,
    submission_folder,
    waiting_submission,
)
from launcher.taken_jobs import Jobs, JobState, Request
from trainer.config import RunConfig
from trainer.runlog import RunFolder

_CODES = {int(code) for code in ExitCode}
LOOK_ANSWER_S = 5.0
"""What a cluster has for an answer to who only looks."""
_ANSWER_S = 60.0
"""And to who submits."""
_HANDOVER_S = 60.0
"""So long after its submission a job may be on its way to the cluster, with its packages."""
_INSIDE = "inside.yaml"
"""In the submission's folder: the cluster as its driver sees it, which is on one of its machines."""
_NO_PYTHON = {126, 127}
"""What a shell says of a command that it cannot start."""


@dataclass(frozen=True)
class Prepared:
    """All that is needed to submit a run, and nothing done yet."""

    run: RunFolder
    config: RunConfig
    cluster: ElasticCluster
    submission: Submission
    request: Request
    package: bytes
    packing_s: float


def prepare_submission(config: RunConfig, cluster: Cluster, *, verb: str, overrides: Sequence[str] = ()) -> Prepared:
    """The submission of a run that is to be driven on a cluster as by `verb`, `run` or `resume`; `overrides` are those of `resume`.

    Raises:
        UsageError: nothing is submitted to this kind of cluster. EnvironmentMismatchError: the packages are too large.
        ConfigError: the configuration cannot continue this run, or the cluster's file says not how to submit.
    """
    config, where, taker = with_whole_paths(config), require_taking(cluster), taker_of(cluster.kind)
    dashboard = taker.dashboard(where)
    workers_of(where.inside(), this_machine(), max(phase.num_micro_batches for phase in config.phases))
    run = RunFolder(Location.at(config.storage) / config.name)
    allowed_changes(run, config, deliberate=verb == "resume" and bool(overrides))
    number = next_number(run)
    folder = submission_folder(run, number)
    what = [str(folder / "run.yaml")] if verb == "run" else [run.root.url, *(word for override in overrides for word in ("--set", override))]
    arguments = [verb, *what, "--cluster", str(folder / _INSIDE)]
    submission = Submission(
        number, new_job_name(run, number), dashboard, arguments, os.getcwd(), newest_lease(run), socket.gethostname(), time.time(), cluster.kind
    )
    started_at = time.monotonic()
    package = pack_packages(Path(__file__).parents[1])
    packing_s = time.monotonic() - started_at
    return Prepared(run, config, where, submission, taker.request(run, submission, where, package_name(package)), package, packing_s)


def submit(prepared: Prepared, say: Callable[[str], None]) -> Jobs[Any]:
    """Hand a prepared submission over to its cluster; returns the jobs of that. `say` is told when that takes a while.

    The run's folder tells of it before the cluster does: whoever looks finds the run, whatever happens here in between.

    Raises:
        UnreachableError: the cluster does not answer, or not to us. ConflictError: somebody drives the run, or it waits already.
    """
    prepared = _named(prepared)
    run, submission = prepared.run, prepared.submission
    jobs = taker_of(submission.kind).connect(run, submission, _ANSWER_S)
    if (lease := proven_holder(run, say)) is not None:
        raise taken(run, lease)
    _require_not_waiting(run, given=submission.dashboard)
    claim(run, submission)
    try:
        _require_not_driven_since(run, submission)
        _write_configs(prepared)
        started_at = time.monotonic()
        jobs.post(prepared.request, prepared.package)
    except BaseException:
        revoke(run, submission)
        raise
    record_posted(run, submission, packing_s=prepared.packing_s, upload_s=time.monotonic() - started_at)
    return jobs


def _named(prepared: Prepared) -> Prepared:
    """For the one cluster that it goes to, whatever this machine takes for its own later."""
    taker = taker_of(prepared.submission.kind)
    cluster = taker.named(prepared.cluster, _ANSWER_S)
    return replace(prepared, cluster=cluster, submission=replace(prepared.submission, dashboard=taker.dashboard(cluster)))


def _write_configs(prepared: Prepared) -> None:
    run, submission = prepared.run, prepared.submission
    folder = submission_folder(run, submission.number)
    (folder / "run.yaml").write_bytes(dump_yaml(prepared.config))
    (folder / _INSIDE).write_bytes(dump_yaml(prepared.cluster.inside()))
    (folder / "cluster.yaml").write_bytes(dump_yaml(prepared.cluster))
    if not run.config.exists():
        run.config.write_bytes(dump_yaml(prepared.config))
        cluster_file(run).write_bytes(dump_yaml(prepared.cluster))


def pending_submission(run: RunFolder) -> Submission | None:
    """The submission whose job may begin, or by its cluster's doing begin anew: nobody has driven the run yet, or who did had to end."""
    if (waiting := waiting_submission(run)) is not None:
        return waiting
    events = run.read_events()
    driving = driving_submission(run, events) if may_begin_anew(events) else None
    return driving if driving is not None and taker_of(driving.kind).begins_anew else None


def _require_not_waiting(run: RunFolder, given: str) -> None:
    waiting = pending_submission(run)
    if waiting is None:
        return
    if waiting.dashboard:
        require_ours(run, waiting, given)
    if _is_alive(run, waiting):
        where = f" of {waiting.dashboard}" if waiting.dashboard else ""
        raise ConflictError(
            f"run {run.root.name} was submitted already, as job {waiting.job}{where}, and is about to start",
            f"Follow it with `maskwright status {run.root.name}`, or end it with `maskwright stop {run.root.name}`.",
        )


def _require_not_driven_since(run: RunFolder, submission: Submission) -> None:
    """After the claim, so that nothing comes in between: a job that waited when its cluster was asked may have begun since."""
    if newest_lease(run) != submission.lease:
        raise ConflictError(f"another command began to drive run {run.root.name} just now", f"Follow it with `maskwright status {run.root.name}`.")


def _is_alive(run: RunFolder, submission: Submission) -> bool:
    """Whether its job may still begin. A cluster that does not answer has no say: two drivers of a run there never are, whatever it does later."""
    try:
        return job_state(taker_of(submission.kind).connect(run, submission, _ANSWER_S), submission).is_alive
    except UnreachableError:
        return False


def jobs_of(run: RunFolder, submission: Submission, answer_s: float = LOOK_ANSWER_S) -> Jobs[Any]:
    """The jobs of the cluster that a submission of a run was for.

    Raises:
        UnreachableError: it does not answer, or its address is the word of another user.
    """
    if submission.dashboard:
        require_ours(run, submission)
    return taker_of(submission.kind).connect(run, submission, answer_s)


def job_state(jobs: Jobs[Any], submission: Submission) -> JobState:
    """What its cluster knows of a submission. One that is being handed over waits, though no cluster knows it yet."""
    state = jobs.look(submission.job)
    is_new = state.state == "unknown" and 0 <= time.time() - submission.time < _HANDOVER_S
    return JobState("waiting") if is_new else state


def asked_status(status: RunStatus, run: RunFolder) -> RunStatus:
    """The status of a run that was submitted and that nobody drives yet, or any more, with what its cluster says of it."""
    submission = pending_submission(run)
    if submission is None:  # it has begun since
        return read_status(run)
    try:
        state = job_state(jobs_of(run, submission), submission)
    except UnreachableError as error:
        if not submission.waits(run):
            return status
        return replace(status, cause=f"whether it still waits is not known: {error.cause}", remedy=error.remedy)
    if state.is_alive:
        return replace(status, state="submitted", exit_code=int(ExitCode.RUNNING), cause=state.message, remedy="")
    if not submission.waits(run):
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
        where = f"the cluster at {submission.dashboard}" if submission.dashboard else "the cluster"
        cause = f"{where} does not know job {submission.job} any more: was it started anew?"
        return End("interrupted", int(ExitCode.INTERRUPTED), cause)
    if job.was_stopped:
        return End("stopped", int(ExitCode.INTERRUPTED), f"job {submission.job} was stopped")
    if job.was_lost:
        return End("interrupted", int(ExitCode.INTERRUPTED), f"job {submission.job} was ended by its cluster: {job.message}")
    if job.exit_code not in {None, *_CODES, *_NO_PYTHON}:
        return End("interrupted", int(ExitCode.INTERRUPTED), f"the command of job {submission.job} was killed (exit code {job.exit_code})")
    code = ExitCode.FAILED if job.exit_code is None else ExitCode.ENVIRONMENT if job.exit_code in _NO_PYTHON else job.exit_code
    state: State = "stopped" if code == ExitCode.INTERRUPTED else "failed" if code else "finished"
    return End(state, int(code), *_told(job.message))


def _told(message: str) -> tuple[str, str]:
    """Cause and remedy in what Ray says of a job: those that our command has printed last, or else what Ray itself says."""
    lines = [line.strip() for line in message.splitlines() if re.search(r"\w", line)]
    told = [number for number, line in enumerate(lines) if line.startswith(("error: ", "interrupted: "))]
    cause, *remedy = lines[told[-1] : told[-1] + 2] if told else [lines[-1][:300] if lines else "the job failed"]
    return cause.removeprefix("error: ").removeprefix("interrupted: "), "".join(remedy) or End.remedy
