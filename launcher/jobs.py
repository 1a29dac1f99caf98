"""Drives a run from its configuration to its report: takes the lease, runs the stages, records how it ended."""

import os
import time
import traceback
from collections.abc import Callable
from typing import Any

from rich.console import Console

from data_pipeline.errors import ExitCode, InterruptedRunError, MaskwrightError
from data_pipeline.storage import Location
from launcher.aside import Aside
from launcher.attempts import driver_log
from launcher.cluster_config import Cluster
from launcher.clusters.local import this_machine
from launcher.clusters.opening import workers_of
from launcher.config import dump_yaml
from launcher.continuation import Change, changes, resolve_diff
from launcher.control import clear_stop, read_stop
from launcher.elastic import Work
from launcher.env_from import take_variables
from launcher.job import Job, Stage
from launcher.lease import Lease, process_age_s
from launcher.options import completed
from launcher.progress import Notices, RecordsTail, TrainingProgress, TrialProgress, clock
from launcher.ray_metrics import RayMetrics
from launcher.run_metrics import Vitals
from launcher.run_status import committed_steps, has_trained, record_lost_driver
from launcher.runs import cluster_file, read_config, reference
from launcher.stages import MODEL_NAME, REPORT_STAGE, STAGES
from launcher.submission import SUBMISSION_VARIABLE
from launcher.supervision import RayOnDemand, Supervisor
from trainer.config import RunConfig
from trainer.redaction import redacted, without_hidden
from trainer.runlog import RunFolder

_RECORD_S = 15.0
"""How long the end of a command waits for what it says about it."""


def run_job(
    config: RunConfig,
    cluster: Cluster,
    console: Console,
    *,
    verb: str,
    deliberate: bool = False,
    stages: tuple[Stage, ...] = STAGES,
    model: Location | None = None,
) -> RunFolder:
    """Drive a run through its stages, from wherever it stands.

    `deliberate` admits changes of learning rate and schedule (`resume --set`); `model` is what is fine-tuned instead of the run's own.

    Raises:
        ConfigError: the configuration cannot continue this run. ConflictError: somebody drives it. MaskwrightError: as the run ended.
    """
    config = with_whole_paths(config)
    run = RunFolder(Location.at(config.storage) / config.name)
    _require_buildable(config, run)
    machine = this_machine()
    take_variables(cluster.env_from)
    workers = workers_of(cluster, machine, max(phase.num_micro_batches for phase in config.phases))
    with Lease.acquire(run, lambda text: console.print(text, highlight=False, markup=False, soft_wrap=True)) as lease:
        as_recorded = verb == "resume" and (has_trained(run) or not deliberate)
        _write_configs(run, config, cluster, deliberate=deliberate)
        clear_stop(run, lease.state.token)
        record_lost_driver(run)
        progress = TrainingProgress(console, config.schedule.steps, config.objective, paced_over=_between(config))
        model = model or run.models / MODEL_NAME
        ray = RayOnDemand(cluster, workers, machine, work=lambda: work_left(config, run), stopped=lambda: read_stop(run) is not None)
        job = Job(config, run, lease, ray, console, progress, model, resumed=as_recorded)
        run.append_event(
            "command_started",
            attempt=0,
            verb=verb,
            pid=os.getpid(),
            host=lease.state.host,
            submission=os.environ.get(SUBMISSION_VARIABLE),
            process_s=round(process_age_s(), 3),
        )
        show = _display(job, is_published=cluster.publishes_metrics)
        supervisor = Supervisor(run, lease, job.ray, job.say, show, saves_on_stop=lambda: job.stage in {"pretrain", "finetune"})
        try:
            supervisor.supervise(lambda: _run_stages(job, stages))
        except BaseException as error:
            if isinstance(error, MaskwrightError):
                error.remedy = completed(error.remedy, run=reference(run))
            record_end(job, error)
            raise
        finally:
            progress.close()
    return run


def _display(job: Job, *, is_published: bool) -> Callable[[], None]:
    """What shows a run while it is driven: each call reads what is new of its records, once for all who show it."""
    run, config = job.run, job.config
    events, steps = RecordsTail(run.events).skip_old(), RecordsTail(run.metrics).skip_old()
    notices = Notices(job.console, run)
    trials = TrialProgress(job.console, run.finetune, tuple(task.name for task in config.finetune.tasks), 2 * config.finetune.num_seeds)
    vitals = Vitals.of(run.read_events(), config.schedule.steps) if is_published else Vitals()
    metrics = RayMetrics(run.root.name, vitals, lambda: job.ray.is_open, job.say)

    def show() -> None:
        new_events, new_steps = events.read(), steps.read()
        job.progress.update(new_steps)
        notices.update(new_events)
        if job.stage == "finetune":
            trials.update()
        if is_published:
            metrics.update(new_events, new_steps)

    return show


def _between(config: RunConfig) -> int:
    """Steps within which whatever comes between steps has come."""
    return max(TrainingProgress.paced_over, config.validation.every_steps, config.checkpoint.every_steps)


def _require_buildable(config: RunConfig, run: RunFolder) -> None:
    """Refuse, before anything is written, a network that cannot be built. One that has trained was."""
    is_usual = config.model.architecture == "bert" and not config.model.transformers and not config.tokenizer.path
    if is_usual or has_trained(run):
        return
    from trainer.model import require_buildable  # seconds of imports, which the usual run does not need here

    require_buildable(config)


def work_left(config: RunConfig, run: RunFolder) -> list[Work]:
    """What remains of pretraining, by batch shape; all of it when it is done, for the stages that follow."""
    reached = max(committed_steps(run), default=0)
    ends = [(phase, phase.first_step + phase.num_steps) for phase in config.phases]
    left = [Work(end - max(reached, phase.first_step), phase.num_micro_batches) for phase, end in ends if end > reached]
    return left or [Work(phase.num_steps, phase.num_micro_batches) for phase in config.phases]


def with_whole_paths(config: RunConfig) -> RunConfig:
    """The same for whoever continues the run from another folder."""
    data = config.data if config.data.storage is None else config.data.model_copy(update={"storage": Location.at(config.data.storage).url})
    return config.model_copy(update={"storage": Location.at(config.storage).url, "data": data})


def _write_configs(run: RunFolder, config: RunConfig, cluster: Cluster, *, deliberate: bool) -> None:
    for change in allowed_changes(run, config, deliberate=deliberate):
        run.append_event("config_changed", attempt=0, path=change.path, before=change.before, after=change.after)
    run.config.write_bytes(dump_yaml(config))
    cluster_file(run).write_bytes(dump_yaml(cluster))


def allowed_changes(run: RunFolder, after: RunConfig, *, deliberate: bool) -> list[Change]:
    """What `after` changes of a run, if there is one.

    Raises:
        ConfigError: it would make another model out of the same run.
    """
    if not run.config.exists():
        return []
    before = read_config(run)
    if not has_trained(run):
        return changes(before, after)
    return resolve_diff(before, after, deliberate=deliberate, steps_done=max(committed_steps(run), default=0))


def record_end(job: Job, error: BaseException) -> None:
    """Say in the run folder how the command ended; what ended it is raised either way. Who has lost the run does not speak for it."""
    known = isinstance(error, MaskwrightError)
    code = error.exit_code if known else ExitCode.INTERNAL
    kind = "stopped" if isinstance(error, InterruptedRunError) or code == ExitCode.INTERRUPTED else "failed"
    cause = without_hidden(error.cause if known else f"{type(error).__name__}: {error}")
    remedy = error.remedy if known else f"This is a bug; the traceback is in {driver_log(job.run)}."

    def record() -> None:
        job.lease.beat()
        if not job.lease.lost.is_set():
            asked = read_stop(job.run) if kind == "stopped" else None
            by: dict[str, Any] = {"by": asked.by} if asked is not None else {}
            job.run.append_event(kind, attempt=job.attempt, stage=job.stage, exit_code=int(code), cause=cause, remedy=remedy, **by)
        driver_log(job.run).append_line(redacted("".join(traceback.format_exception(error))))

    try:
        Aside(record).ask(_RECORD_S)  # storage that hangs may be why the command ends
    except (MaskwrightError, OSError):
        job.say(f"could not record the end of the run in {job.run.root}")


def _run_stages(job: Job, stages: tuple[Stage, ...]) -> None:
    job.say(f"run {job.config.name}  {job.run.root}")
    for stage in stages:
        if stage is REPORT_STAGE:
            record_finish(job)  # before the report, which tells how the run ended
        job.stage = stage.name
        job.lease.beat(stage=stage.name)
        started_at = time.monotonic()
        outcome = stage.work(job)
        elapsed_s = time.monotonic() - started_at
        if outcome.worked:
            job.run.append_event("stage_finished", attempt=job.attempt, stage=stage.name, elapsed_s=round(elapsed_s, 3), **outcome.details)
        job.say(f"{stage.name:<9} {clock(elapsed_s) if outcome.worked else 'skipped':>8}  {outcome.text}")
    if REPORT_STAGE not in stages:
        record_finish(job)


def record_finish(job: Job) -> None:
    """Say that the run is finished; one of which an early export was fine-tuned is not, it still has steps to take."""
    steps, reached = job.config.schedule.steps, max(committed_steps(job.run), default=None)
    if reached is None or reached >= steps:
        job.run.append_event("finished", attempt=job.attempt, step=steps)
        return
    cause = f"the stages that were asked for are done; pretraining is at step {reached} of {steps}"
    remedy = f"Run `maskwright resume {job.config.name}`."
    job.run.append_event("stopped", attempt=job.attempt, step=reached, exit_code=int(ExitCode.INTERRUPTED), cause=cause, remedy=remedy)
