"""Verbs about models: export, finetune, evaluate, report."""

import re
import shlex
from typing import TYPE_CHECKING, Annotated, Any

import typer

from data_pipeline.errors import ConflictError, NotFoundError, UsageError
from data_pipeline.storage import Location
from launcher import completing
from launcher.cluster_config import LocalCluster
from launcher.config import load_cluster_config, override_run_config
from launcher.lease import holder
from launcher.options import (
    Cluster,
    Json,
    RunArgument,
    Set,
    Storage,
    command,
    console,
    human_output,
    next_command,
    print_json,
    print_table,
    say,
)
from launcher.run_status import read_status
from launcher.runs import Model, find_run, find_run_or_model, read_cluster, read_config, resolve_storage
from trainer.config import RunConfig
from trainer.finetune_config import TaskConfig
from trainer.runlog import RunFolder

if TYPE_CHECKING:
    from launcher.answers.runs import Exported, Filling

RunOrModel = Annotated[
    str, typer.Argument(metavar="RUN|MODEL", help="Run id, run folder or URL; or the folder of an exported model.", autocompletion=completing.runs)
]


_A_TASK = "finetune.tasks=[{name: mytask, path: DIR}]"


def export(
    run: RunArgument,
    step: Annotated[int | None, typer.Option("--step", min=0, help="Of which checkpoint.", show_default="the newest")] = None,
    name: Annotated[str | None, typer.Option("--name", help="Folder below models/.", show_default="final, or step-N with --step")] = None,
    storage: Storage = None,
    as_json: Json = False,
) -> None:
    """Write a Hugging Face model folder from a checkpoint, and check that it gives the same logits.

    Example: maskwright export demo --step 500
    """
    from launcher.stages import MODEL_NAME, require_corpus
    from trainer.export import export as export_model

    if name is not None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise UsageError(f"--name {name!r} is not the name of a folder", "Use letters, digits, dots, - and _.")
    folder = find_run(run, storage)
    lease = holder(folder)
    if lease is not None and lease.stage == "export":
        raise ConflictError(f"run {folder.root.name} is exporting just now", f"See `maskwright status {run}`, and try again when it is done.")
    target = name or (MODEL_NAME if step is None else f"step-{step:08d}")
    model = export_model(folder, read_config(folder), require_corpus(folder), step=step, name=target)
    if as_json:
        answer: Exported = {"model": model.url, "step": (model / "lineage.json").read_json()["step"]}
        print_json(answer)
        return
    say(str(model))
    next_command(command("finetune", model, overrides=[_A_TASK]))


def finetune(model: RunOrModel, overrides: Set = None, storage: Storage = None, cluster: Cluster = None, as_json: Json = False) -> None:
    """Fine-tune a run's model, or any model folder, on labelled tasks: pretrained, from scratch, and TF-IDF beside them.

    Example: maskwright finetune demo --set 'finetune.tasks=[{name: sst2, path: data/sst2}]'
    """
    from launcher.jobs import run_job
    from launcher.stages import FINETUNE_STAGE, MODEL_NAME, REPORT_STAGE
    from trainer.tasks import require_tasks

    target = find_run_or_model(model, storage)
    if isinstance(target, Model):
        config, folder, where = _config_for(target, overrides, storage), target.folder, LocalCluster()
        stages = (FINETUNE_STAGE,)
    else:
        config, folder, where = override_run_config(read_config(target), overrides or ()), target.models / MODEL_NAME, read_cluster(target)
        stages = (FINETUNE_STAGE, REPORT_STAGE)
    if not config.finetune.tasks:
        raise UsageError("there is no task to fine-tune on", "Add one: --set 'finetune.tasks=[{name: sst2, path: data/sst2}]'")
    if not (folder / "config.json").exists():
        raise NotFoundError(f"there is no model in {folder}", f"Run `maskwright export {model}` first.")
    require_tasks(config.finetune.tasks)  # before a finished run is told to have failed
    where = load_cluster_config(cluster) if cluster else where or LocalCluster()
    with human_output(as_json=as_json):
        run = run_job(config, where, console(), verb="finetune", stages=stages, model=folder)
        next_command(command("evaluate", run.root))
    if as_json:
        print_json(read_status(run).to_json())


def run_name_for(model: Location) -> str:
    """The id of the run that fine-tunes a model folder: from `<run>/models/<name>`, in characters that an id may have."""
    words = re.sub(r"[^A-Za-z0-9._-]+", "-", f"{model.parent.parent.name}-{model.name}").strip("._-")
    return f"{words or 'model'}-finetune"


def _config_for(model: Model, overrides: list[str] | None, storage: str | None) -> RunConfig:
    """A run of its own for a model that has none: only its fine-tune section matters."""
    base = RunConfig.model_validate(
        {"name": run_name_for(model.folder), "storage": resolve_storage(storage).url, "model": {"init_from": model.folder.url}}
    )
    return override_run_config(base, overrides or ())


def evaluate(
    model: RunOrModel,
    text: Annotated[str | None, typer.Option("--text", metavar="TEXT", help="Fill in the [MASK]s of a text instead.")] = None,
    overrides: Set = None,
    storage: Storage = None,
    as_json: Json = False,
) -> None:
    """Score fine-tuned classifiers on their tasks' test rows, or fill in masks.

    Example: maskwright evaluate demo --text "Returns a new [MASK] with the same shape."
    """
    target = find_run_or_model(model, storage)
    if text is not None:
        _fill_mask(target, text, as_json=as_json)
        return
    scores = [_evaluate(folder, task) for folder, task in _classifiers(target, overrides, storage)]
    if as_json:
        print_json(scores)
        return
    print_table(
        ("task", "rows", "accuracy", "macro F1"), ((s["task"], s["num_rows"], f"{s['accuracy']:.4f}", f"{s['macro_f1']:.4f}") for s in scores)
    )
    next_command(command("report" if isinstance(target, RunFolder) else "finetune", model, storage=storage))


def _classifiers(target: RunFolder | Model, overrides: list[str] | None, storage: str | None) -> list[tuple[Location, TaskConfig]]:
    if isinstance(target, Model):
        tasks = _config_for(target, overrides, storage).finetune.tasks
        found = [(target.folder, task) for task in tasks]
    else:
        tasks = override_run_config(read_config(target), overrides or ()).finetune.tasks
        found = [(target.finetune / task.name / "model", task) for task in tasks]
    if not found:
        raise UsageError("there is no task to evaluate on", "Add one: --set 'finetune.tasks=[{name: sst2, path: data/sst2}]'")
    return found


def _evaluate(folder: Location, task: TaskConfig) -> dict[str, Any]:
    import tempfile

    from trainer.context import LocalContext
    from trainer.evaluate import evaluate_model

    if not (folder / "config.json").exists():
        raise NotFoundError(f"there is no classifier in {folder}", "Run `maskwright finetune` first.")
    with tempfile.TemporaryDirectory() as work_folder:
        return evaluate_model(folder.url, task, work_folder, LocalContext())


def _fill_mask(target: RunFolder | Model, text: str, *, as_json: bool) -> None:
    from launcher.stages import MODEL_NAME
    from trainer.evaluate import fill_mask

    folder = target.folder if isinstance(target, Model) else target.models / MODEL_NAME
    if not (folder / "config.json").exists():
        raise NotFoundError(f"there is no model in {folder}", "Run `maskwright export` first.")
    places = fill_mask(folder.url, text)
    if as_json:
        answer: list[list[Filling]] = [[{"token": token, "probability": probability} for token, probability in place] for place in places]
        print_json(answer)
        return
    for number, place in enumerate(places, 1):
        say(f"[MASK] {number}: " + "  ".join(f"{token} {probability:.3f}" for token, probability in place))
    next_command(command("finetune", folder, overrides=[_A_TASK]))


def report(
    run: Annotated[
        str,
        typer.Argument(
            metavar="RUN|CORPUS", help="Run id, or folder or URL of a run; name, folder or URL of a corpus.", autocompletion=completing.runs
        ),
    ],
    output: Annotated[
        str | None, typer.Option("--output", metavar="FILE", help="Where to write the page.", show_default="report.html in its folder")
    ] = None,
    all_steps: Annotated[bool, typer.Option("--all-steps", help="Compute the batch of every step anew, however long that takes.")] = False,
    storage: Storage = None,
    as_json: Json = False,
) -> None:
    """Write one HTML page: of a run its curves, attempts, goodput, proof of the data and scores; of a corpus its counts, lengths and fill of rows.

    Example: maskwright report demo
    """
    from launcher.corpus_report import find_corpus, find_mixture

    corpus = find_corpus(run, resolve_storage(storage))
    if corpus is not None:
        _report_corpus(corpus, output, as_json=as_json)
        return
    mixture = find_mixture(run, resolve_storage(storage))
    if mixture is not None:
        _report_mixture(mixture, output, as_json=as_json)
        return
    from launcher.report import write_report

    folder = find_run(run, storage)
    page = Location.at(output) if output else folder.report
    found = write_report(folder, page, all_steps=all_steps)
    if as_json:
        print_json({"report": page.url, **found.to_json()})
        return
    for text in found.summary():
        say(text)
    say(str(page))
    next_command(shlex.join(["open", str(page)]))


def _report_mixture(folder: Location, output: str | None, *, as_json: bool) -> None:
    """A page for each of its corpora, in their folders."""
    from data_pipeline.mixture import MIXTURE

    if output is not None:
        raise UsageError(f"--output: {folder.name} is a mixture, which has a page for each of its corpora", "Give one of its corpora.")
    parts: list[dict[str, Any]] = (folder / MIXTURE).read_json()["corpora"]
    whole = sum(part["weight"] for part in parts)
    if not as_json:
        print_table(("corpus of the mixture", "weight", "share"), ((p["corpus"], f"{p['weight']:g}", f"{p['weight'] / whole:.1%}") for p in parts))
        say("")
    for part in parts:
        _report_corpus(folder.parent / part["corpus"], None, as_json=as_json)


def _report_corpus(folder: Location, output: str | None, *, as_json: bool) -> None:
    from launcher.corpus_report import REPORT, CorpusReport

    found = CorpusReport.of(folder)
    is_web = folder.url.startswith(("http://", "https://"))  # nothing can be written there
    page = found.write(Location.at(output or (f"{folder.name}.html" if is_web else (folder / REPORT).url)))
    if as_json:
        print_json({"report": page.url, **found.to_json()})
        return
    for text in found.verdicts():
        say(text)
    for table in found.tables():
        say(f"\n{table.title}")
        print_table(table.columns, table.rows)
        if table.note:
            say(table.note)
    say(f"\n{page}")
    next_command(shlex.join(["open", str(page)]), command("verify", folder))


VERBS = (export, finetune, evaluate, report)
