"""The stages of a run: prepare, pretrain, export, finetune, report; each returns at once when its output is already there."""

from typing import Any

from data_pipeline.errors import ConfigError, NotFoundError
from data_pipeline.storage import Location
from launcher.corpora import is_prepared, prepare_corpora
from launcher.job import Job, Outcome, Stage
from launcher.preparation_table import too_little_text
from launcher.progress import human
from launcher.retries import run_with_retries
from launcher.run_status import committed_steps
from trainer.runlog import RunFolder

PRETRAIN = "trainer.pretrain:pretrain"
FINETUNE = "launcher.finetuning:finetune_tasks"
MODEL_NAME = "final"


def _prepare(job: Job) -> Outcome:
    recorded = recorded_corpus(job.run)
    if recorded is not None and job.resumed and is_prepared(recorded, job.config.data):
        return Outcome(str(recorded), worked=False)
    prepared = prepare_corpora(job.config, job.ray.scratch, job.say)
    for part in prepared.parts:
        if notice := too_little_text(part.summary["vocabulary_size"], part.summary["vocabulary_asked"]):
            job.say(f"  {notice}")
    if recorded is not None and recorded.name != prepared.folder.name and committed_steps(job.run):
        raise ConfigError(
            f"run {job.config.name!r} was trained on corpus {recorded.name}, the sources now give {prepared.folder.name}",
            "Restore the sources, continue on the old corpus with `maskwright resume`, or give the configuration another name.",
        )
    text = f"{prepared.folder}" if prepared.created else f"{prepared.folder} (already there)"
    return Outcome(text, worked=prepared.created or recorded != prepared.folder, details={"corpus": prepared.folder.url})


def recorded_corpus(run: RunFolder) -> Location | None:
    """The corpus that the run was begun on; None before its first preparation."""
    found = [event["corpus"] for event in run.read_events() if event["kind"] == "stage_finished" and event["stage"] == "prepare"]
    return Location(found[-1]) if found else None


def require_corpus(run: RunFolder) -> Location:
    """The corpus that the run was begun on.

    Raises:
        NotFoundError: the run has none yet.
    """
    corpus = recorded_corpus(run)
    if corpus is None:
        raise NotFoundError(f"run {run.root.name} has no corpus yet", f"Continue it with `maskwright resume {run.root.name}`.")
    return corpus


def _pretrain(job: Job) -> Outcome:
    steps = job.config.schedule.steps
    if max(committed_steps(job.run), default=0) >= steps:
        return Outcome(f"{steps} steps, {job.run.checkpoints}", worked=False)
    say_extent(job)
    arguments = {"config": job.config, "corpus": require_corpus(job.run).url, "run": job.run.root.url}
    run_with_retries(job, PRETRAIN, arguments, done=lambda: max(committed_steps(job.run), default=0) >= steps)
    return Outcome(f"{steps} steps, {job.run.checkpoints}", worked=True)


MANY_EPOCHS = 40.0
"""Of BERT's own training (Devlin et al. 2018, appendix A.2)."""


def say_extent(job: Job) -> None:
    """How much there is to train, and how often the model will see each text."""
    from data_pipeline.mixture import Mixture
    from data_pipeline.volume import epochs, tokens

    mixture, phases = Mixture.open(require_corpus(job.run), job.config.data), job.config.phases
    rounds = epochs(mixture, phases)
    text = ", ".join(f"{each:,.1f} epochs of {index.folder.name}" for each, index in zip(rounds, mixture.indexes, strict=True))
    job.say(f"  {job.config.schedule.steps:,} steps, about {human(tokens(mixture, rounds))} tokens, {text}")
    if max(rounds) > MANY_EPOCHS:
        job.say(f"  warning: the model will see each text {max(rounds):,.0f} times; more text, or fewer schedule.steps, may serve better")


def _export(job: Job) -> Outcome:
    model = job.run.models / MODEL_NAME
    steps = job.config.schedule.steps
    if (model / "lineage.json").exists() and _last_finished(job.run, "export").get("exported_step") == steps:
        return Outcome(str(model), worked=False)
    from trainer.export import export

    export(job.run, job.config, require_corpus(job.run), name=MODEL_NAME)
    return Outcome(str(model), worked=True, details={"exported_step": steps})


def _finetune(job: Job) -> Outcome:
    if not job.config.finetune.tasks:
        return Outcome("no tasks in the configuration", worked=False)
    settings = {**job.config.finetune.model_dump(mode="json"), "model": job.model.url}
    if not all(_results(job.run, task).exists() for task in _task_names(job)) or not _is_current(job.run, settings):
        arguments = {"config": job.config.finetune, "model": job.model.url, "output": job.run.finetune.url}
        run_with_retries(job, FINETUNE, arguments, done=lambda: all(_results(job.run, task).exists() for task in _task_names(job)))
        worked = True
    else:
        worked = False
    _show_scores(job)
    return Outcome(str(job.run.finetune), worked=worked, details={"settings": settings})


def _show_scores(job: Job) -> None:
    from launcher.scores import score_table

    validations = [event for event in job.run.read_events() if event["kind"] == "validation"]
    results = [_results(job.run, task).read_json() for task in _task_names(job)]
    job.console.print(score_table(results, validations[-1] if validations else None, job.config.objective.kind), highlight=False)


def _task_names(job: Job) -> list[str]:
    return [task.name for task in job.config.finetune.tasks]


def _results(run: RunFolder, task: str) -> Location:
    return run.finetune / task / "results.json"


def _is_current(run: RunFolder, settings: dict[str, Any]) -> bool:
    """Whether the results belong to these settings and to the newest export."""
    finetuned, exported = _last_finished(run, "finetune"), _last_finished(run, "export")
    return finetuned.get("settings") == settings and finetuned.get("time", 0.0) > exported.get("time", 0.0)


def _report(job: Job) -> Outcome:
    from launcher.report import write_report

    newer = [event for event in job.run.read_events() if event["kind"] == "stage_finished" and event["stage"] != "report"]
    fresh = _last_finished(job.run, "report").get("time", 0.0) > max((event["time"] for event in newer), default=0.0)
    if fresh and job.run.report.exists():
        return Outcome(str(job.run.report), worked=False)
    write_report(job.run)
    return Outcome(str(job.run.report), worked=True)


def _last_finished(run: RunFolder, stage: str) -> dict[str, Any]:
    found = [event for event in run.read_events() if event["kind"] == "stage_finished" and event["stage"] == stage]
    return found[-1] if found else {}


FINETUNE_STAGE, REPORT_STAGE = Stage("finetune", _finetune), Stage("report", _report)
STAGES = (Stage("prepare", _prepare), Stage("pretrain", _pretrain), Stage("export", _export), FINETUNE_STAGE, REPORT_STAGE)
