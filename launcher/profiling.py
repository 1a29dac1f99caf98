"""Profiles a run on its cluster: one attempt of a worker group that leaves its traces in the run's `profile` folder (starts Ray)."""

import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from data_pipeline.errors import ConflictError, InterruptedRunError, UsageError
from launcher.attempts import claim_attempt
from launcher.cluster_config import Cluster
from launcher.clusters.local import this_machine
from launcher.clusters.opening import workers_of
from launcher.control import clear_stop, read_stop
from launcher.env_from import take_variables
from launcher.group_watch import GroupWatch
from launcher.health import Deadlines, longest_interval_s
from launcher.jobs import work_left
from launcher.lease import PROFILE_FOLDER, Lease, holder
from launcher.policy import Failure, FailureKind
from launcher.stages import require_corpus
from launcher.supervision import RayOnDemand, Supervisor
from trainer.config import RunConfig
from trainer.runlog import RunFolder

PROFILE = "trainer.profiling:profile_steps"
RESULT = "profile.json"
_OWN_REMEDY = {FailureKind.KNOWN, FailureKind.DATA}


def profile_run(run: RunFolder, config: RunConfig, cluster: Cluster, steps: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Profile `steps` steps of a run that nobody drives; returns what `trainer.profiling.profile_steps` has found.

    The run is not claimed: a command that starts or resumes it meanwhile finds it free, and then shares the machine. The profile folder has the
    form of a run folder, with a lease, attempts and logs of its own.

    Raises:
        ConflictError: the run is at work, or is being profiled. UsageError: it has not so many steps. NotFoundError: it has no corpus yet.
        MaskwrightError: as the attempt ended.
    """
    require_free(run)
    if config.schedule.steps < 2:
        raise UsageError(f"run {run.root.name} has a single step, which only warms up", "Profile a run of two steps or more.")
    if steps >= config.schedule.steps:
        raise UsageError(
            f"--steps {steps}: run {run.root.name} has {config.schedule.steps} steps, the first of which warms up",
            f"Give at most {config.schedule.steps - 1}.",
        )
    arguments = {"config": config, "corpus": require_corpus(run).url, "run": run.root.url, "output": (run.root / PROFILE_FOLDER).url, "steps": steps}
    profile, machine = RunFolder(run.root / PROFILE_FOLDER), this_machine()
    take_variables(cluster.env_from)
    workers = workers_of(cluster, machine, max(phase.num_micro_batches for phase in config.phases))
    with _claimed(run, profile, say) as lease:
        clear_stop(profile, lease.state.token)
        ray = RayOnDemand(cluster, workers, machine, work=lambda: work_left(config, run), stopped=lambda: read_stop(profile) is not None)
        supervisor = Supervisor(profile, lease, ray, say, tick=lambda: None, saves_on_stop=lambda: False)
        try:
            supervisor.supervise(lambda: _attempt(profile, config, ray, arguments, say))
        except InterruptedRunError as error:
            error.cause, error.remedy = "profiling was interrupted", f"Run `maskwright profile {run.root.name}` again."
            raise
    return (profile.root / RESULT).read_json()


def require_free(run: RunFolder) -> None:
    """Refuse a run that is at work: its ranks have the machine, and would be slowed down and measured along.

    Raises:
        ConflictError: it is.
    """
    if (lease := holder(run)) is not None:
        raise ConflictError(
            f"run {run.root.name} is running (process {lease.pid} on {lease.host}), and profiling it would disturb both",
            f"Wait for its end, or `maskwright stop {run.root.name}`, profile, and `maskwright resume {run.root.name}`.",
        )


def _claimed(run: RunFolder, profile: RunFolder, say: Callable[[str], None]) -> Lease:
    try:
        return Lease.acquire(profile, say)
    except ConflictError as error:
        raise ConflictError(f"run {run.root.name} is being profiled by another command", "Wait for its end, and try again.") from error


def _attempt(profile: RunFolder, config: RunConfig, ray: RayOnDemand, arguments: dict[str, Any], say: Callable[[str], None]) -> None:
    """One attempt, watched over as those of a run are, and not tried again."""
    scratch = ray.scratch()
    from launcher.ray_worker import run_attempt
    from launcher.worker_process import WorkerTask

    workers = ray.workers_now()
    attempt = claim_attempt(profile)
    deadlines = Deadlines.for_stage(
        trains=True,
        data_s=config.data.total_timeout_s,
        fresh_steps=(phase.first_step for phase in config.phases),
        interval_s=longest_interval_s(workers.num_workers),
    )
    watch = GroupWatch(profile, attempt, workers.num_workers, deadlines, say, lambda: None)
    everything = {**arguments, "attempt": attempt}
    task = WorkerTask(PROFILE, everything, profile.root.url, attempt, workers.threads_per_worker, os.getcwd(), ray.config.env_from)
    failure = run_attempt(task, workers, scratch, watch, ray.before_end)
    ray.require_open()
    if failure is not None:
        raise with_own_remedy(failure, profile, attempt).to_error()


def with_own_remedy(failure: Failure, profile: RunFolder, attempt: int) -> Failure:
    """The failure of a profile: what is said of a run's, to see its logs or to resume it, helps nobody here."""
    if failure.kind in _OWN_REMEDY:
        return failure
    return replace(failure, remedy=f"See {profile.rank_log(attempt, failure.rank or 0)}, and run it again.")
