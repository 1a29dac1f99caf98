"""Runs a stage's worker code, attempt after attempt, as the policy decides (records every attempt and every failure)."""

import time
from collections.abc import Callable
from typing import Any

from data_pipeline.errors import ExitCode, InterruptedRunError
from launcher.aside import through_outages
from launcher.attempts import claim_attempt, driver_log
from launcher.clusters.local import Workers
from launcher.clusters.sizing import TooFewWorkersError
from launcher.control import read_stop
from launcher.elastic import Pace
from launcher.group_watch import GroupWatch, SaveReason
from launcher.health import Deadlines, longest_interval_s
from launcher.job import Job
from launcher.policy import Budgets, Failure, FailureKind, History, Retry, blame_newcomers, decide
from launcher.run_status import committed_steps
from trainer.redaction import redacted
from trainer.runlog import event_line


def run_with_retries(job: Job, entry: str, arguments: dict[str, Any], done: Callable[[], bool]) -> None:
    """Run an entry on the workers until it is done, retrying what the policy retries. Storage that is away between attempts is waited for.

    Raises:
        MaskwrightError: the error that ended it, or RetriesSpentError.
    """
    job.workers = None
    history, newest = History(), _newest_step(job)
    budgets = Budgets(job.ray.config.max_failures, job.ray.config.max_preemptions, job.config.numerics.budget)
    failure: Failure | None = None
    nodes: set[str] = set()
    while True:
        last, nodes_before = failure, nodes
        try:
            failure, nodes = _attempt(job, entry, arguments)
            job.ray.require_open()
            started = True
        except TooFewWorkersError as error:
            failure, started = _too_few(error, last), False
        if failure is None and through_outages(done):
            return
        if failure is None:
            failure = Failure(FailureKind.BUG, f"{entry} returned before it was done", "See `maskwright logs`.", ExitCode.INTERNAL)
        reached = _newest_step(job)
        blamed = blame_newcomers(failure, last, progressed=reached > newest) if started else None
        if blamed is not None:
            failure = blamed
            job.ray.keep_to(nodes_before)
        history = history.after(failure, time.monotonic(), progressed=reached > newest)
        newest = reached
        _record(job, failure)
        decision = decide(failure, history, budgets)
        if not isinstance(decision, Retry):
            raise decision.error
        if through_outages(lambda: read_stop(job.run)) is not None:
            raise InterruptedRunError(f"stopped after {failure.cause}", f"Run `maskwright resume {job.config.name}`.")
        where = f" from step {reached}" if job.stage == "pretrain" else ""
        job.say(f"  attempt {job.attempt} {_ENDED.get(failure.kind, 'failed')}: {failure.cause}; starting again{where}")
        time.sleep(decision.delay_s)


_ENDED = {FailureKind.PREEMPTION: "was preempted", FailureKind.GROWTH: "makes room for more ranks"}


def _newest_step(job: Job) -> int:
    """Of the committed checkpoints; 0 where there is none."""
    return through_outages(lambda: max(committed_steps(job.run), default=0))


def _record(job: Job, failure: Failure) -> None:
    if failure.kind in {FailureKind.INTERRUPTED, FailureKind.GROWTH}:
        return
    _append_event(
        job,
        "worker_failed",
        step=failure.step,
        failure=failure.kind.value,
        rank=failure.rank,
        node=failure.node,
        phase=failure.phase,
        cause=failure.cause,
    )
    if failure.traceback:
        text = redacted(f"attempt {job.attempt}: {failure.cause}\n{failure.traceback}")
        through_outages(lambda: driver_log(job.run).append_line(text))


def _append_event(job: Job, kind: str, **details: Any) -> None:
    """Record an event, again while storage is away, and always as the same line: an append whose answer is lost may have been carried out."""
    line = event_line(kind, attempt=job.attempt, **details)
    through_outages(lambda: job.run.events.append_line(line))


def _attempt(job: Job, entry: str, arguments: dict[str, Any]) -> tuple[Failure | None, set[str]]:
    """How an attempt ended, and Ray's ids of the nodes that its ranks were on."""
    job.say(_what_is_awaited(job.ray.workers))
    asked_at = time.monotonic()
    scratch = job.ray.scratch()
    from launcher.ray_worker import run_attempt
    from launcher.worker_process import WorkerTask

    workers = job.ray.workers_now()
    cluster_s = time.monotonic() - asked_at
    through_outages(job.lease.require_held)  # a newer attempt ends the workers of an older one: never those of a driver that has taken over
    _record_size(job, workers)
    job.attempt = through_outages(lambda: claim_attempt(job.run))
    through_outages(lambda: job.lease.beat(attempt=job.attempt))
    _record_start(job, workers, cluster_s)
    everything = {**arguments, "attempt": job.attempt}
    task = WorkerTask(entry, everything, job.run.root.url, job.attempt, workers.threads_per_worker, job.home, job.ray.config.env_from)
    watch = _watch(job, workers)
    return run_attempt(task, workers, scratch, watch, job.ray.before_end), {member.node for member in watch.members.values()}


def _what_is_awaited(workers: Workers | None) -> str:
    """Half a minute passes before the first step, on a cluster that lacks nodes more."""
    if workers is None:
        return "  waiting for the cluster, then starting workers ..."
    return f"  starting {workers.num_workers} worker{'s' if workers.num_workers > 1 else ''} ..."


def _record_start(job: Job, workers: Workers, cluster_s: float) -> None:
    _append_event(
        job,
        "attempt_started",
        stage=job.stage,
        world_size=workers.num_workers,
        zero_stage=job.config.zero.stage if job.stage == "pretrain" else None,
        threads_per_worker=workers.threads_per_worker,
        device="cuda" if workers.use_gpu else "cpu",
        cluster_s=round(cluster_s, 3),
    )


def _too_few(error: TooFewWorkersError, last: Failure | None) -> Failure:
    """Nodes that do not come are waited for again; after a preemption they are not expected, and all that matters is saved."""
    if last is None or last.kind is not FailureKind.PREEMPTION:
        return Failure(FailureKind.INFRASTRUCTURE, error.cause, error.remedy, ExitCode.FAILED)
    return Failure(FailureKind.INTERRUPTED, f"{last.cause}; {error.cause}", error.remedy, ExitCode.INTERRUPTED)


def _record_size(job: Job, workers: Workers) -> None:
    """Say that the cluster gives this attempt more or fewer ranks than the one before."""
    before = job.workers
    if before is not None and before.num_workers != workers.num_workers:
        _append_event(job, "resized", before=before.num_workers, after=workers.num_workers)
        job.say(f"  {before.num_workers} ranks before, {workers.num_workers} now; the global batch stays the same")
    job.workers = workers


def _watch(job: Job, workers: Workers) -> GroupWatch:
    deadlines = Deadlines.for_stage(
        trains=job.stage == "pretrain",
        data_s=job.config.data.total_timeout_s,
        fresh_steps=(phase.first_step for phase in job.config.phases),
        interval_s=longest_interval_s(workers.num_workers),
    )
    watch = GroupWatch(job.run, job.attempt, workers.num_workers, deadlines, job.say, lambda: _why_save(job, workers, watch.pace))
    return watch


def _why_save(job: Job, workers: Workers, pace: Pace) -> SaveReason | None:
    request = read_stop(job.run)
    if request is not None:
        return SaveReason.REQUEST if request.save else None
    grows = job.stage == "pretrain" and job.ray.larger_workers(workers, pace) is not None
    return SaveReason.GROWTH if grows else None
