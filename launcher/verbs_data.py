"""Verbs about configurations and data: init, schema, prepare, inspect."""

import functools
import json
import shutil
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from data_pipeline.errors import ConflictError, UsageError
from data_pipeline.storage import Location
from launcher.config import example_configs, json_schema, load_cluster_config, load_run_config
from launcher.options import Cluster, ConfigArgument, Json, Set, Storage, command, next_command, print_json, print_table, say
from trainer.config import RunConfig

if TYPE_CHECKING:
    from data_pipeline.prepare import Prepared
    from launcher.answers.runs import Files
    from launcher.corpora import PreparedCorpora


def init(
    folder: Annotated[str, typer.Argument(metavar="DIR", help="Where to copy the example configurations.")] = "cluster_configs",
    force: Annotated[bool, typer.Option("--force", help="Overwrite files that are there.")] = False,
    as_json: Json = False,
) -> None:
    """Copy the example configurations.

    Example: maskwright init my-configs
    """
    source, target = example_configs(), Path(folder)
    files = [path for path in sorted(source.rglob("*")) if path.is_file() and "__pycache__" not in path.parts]
    existing = [path for path in files if (target / path.relative_to(source)).exists()]
    if existing and not force:
        raise ConflictError(f"{target / existing[0].relative_to(source)} exists", "Choose another folder, or overwrite with --force.")
    for path in files:
        copy = target / path.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
    copies = [str(target / path.relative_to(source)) for path in files]
    if as_json:
        answer: Files = {"files": copies}
        print_json(answer)
        return
    say("\n".join(copies))
    runs = sorted((target / "runs").glob("*.yaml"), key=lambda path: path.stem != "demo")
    next_command(command("run", runs[0]) if runs else "maskwright schema")


def schema(
    write: Annotated[
        str | None, typer.Option("--write", metavar="DIR", help="Write run.schema.json and cluster.schema.json for editors instead.")
    ] = None,
    answers: Annotated[bool, typer.Option("--answers", help="Instead those of what each verb answers with --json.")] = False,
    as_json: Json = False,
) -> None:
    """Print the JSON schemas of run YAMLs and cluster YAMLs, or of what verbs answer with --json.

    Example: maskwright schema --write cluster_configs/schema
    """
    if answers:
        from launcher.answers.table import answers_schema

        found = {"answers": answers_schema()}
    else:
        found = json_schema()
    if write is None:
        content = found["answers"] if answers else found
        print_json(content) if as_json else print(json.dumps(content, indent=2))
        return
    files = {Location.at(write) / f"{name}.schema.json": content for name, content in found.items()}
    for file, content in files.items():
        file.write_bytes((json.dumps(content, indent=2) + "\n").encode())
    if as_json:
        answer: Files = {"files": [str(file) for file in files]}
        print_json(answer)
    else:
        say("\n".join(map(str, files)))


def prepare(config: ConfigArgument, overrides: Set = None, storage: Storage = None, cluster: Cluster = None, as_json: Json = False) -> None:
    """Turn text into a corpus of shards; returns at once when it is already there.

    Example: maskwright prepare my.yaml --set corpus.source=articles.jsonl.gz
    """
    run_config = load_run_config(config, overrides or (), storage)
    prepared = _prepare(run_config, load_cluster_config(cluster or "local"), quiet=as_json)
    if as_json:
        print_json({"folder": prepared.folder.url, "created": prepared.created, **_summary(prepared)})
        return
    for part in prepared.parts:
        _show(part)
    if len(prepared.parts) > 1:
        say(f"\n{prepared.folder}")
    given: Any = {"overrides": overrides, "storage": storage}
    next_command(command("inspect", config, "--step", 0, **given), command("run", config, **given, cluster=cluster))


def _summary(prepared: "PreparedCorpora") -> dict[str, Any]:
    """Of a corpus its counts; of a mixture `corpora`, those of each."""
    if len(prepared.parts) == 1:
        return prepared.parts[0].summary
    return {"corpora": [{"folder": part.folder.url, "created": part.created, **part.summary} for part in prepared.parts]}


def _show(prepared: "Prepared") -> None:
    """Where the corpus is, what each step did to its documents and what that cost, what is left, and what it shares with the tasks."""
    from data_pipeline.contamination import reported_tasks
    from launcher.preparation_table import contamination_rows, split_rows, step_rows, too_little_text

    say(f"{prepared.folder} ({'made now' if prepared.created else 'was there already'}, {prepared.summary['seconds']:.1f} s)\n")
    print_table(("step", "dropped", "found", "CPU s"), step_rows(prepared.summary))
    say("")
    print_table(("split", "documents", "sentences", "tokens"), split_rows(prepared.summary))
    if notice := too_little_text(prepared.summary["vocabulary_size"], prepared.summary["vocabulary_asked"]):
        say(f"\n{notice}")
    tasks = reported_tasks(prepared.folder)
    if tasks:
        say("")
        print_table(("task", "documents that share 13 words with its test set", "test texts found", "of"), contamination_rows(tasks))


def _prepare(config: RunConfig, cluster: Any, *, quiet: bool) -> "PreparedCorpora":
    from launcher.clusters.local import this_machine
    from launcher.clusters.opening import open_cluster, workers_of
    from launcher.corpora import prepare_corpora
    from launcher.supervision import never, nothing_left

    machine = this_machine()
    with ExitStack() as stack:
        workers = workers_of(cluster, machine)
        start_ray = functools.cache(lambda: stack.enter_context(open_cluster(cluster, workers, machine, nothing_left, never)).scratch)
        return prepare_corpora(config, start_ray, say=(lambda text: None) if quiet else say)


def inspect(
    config: ConfigArgument,
    step: Annotated[int, typer.Option("--step", min=0, help="First optimizer step, counted from 0: what the console calls step 1 is 0.")],
    steps: Annotated[int, typer.Option("--steps", min=1, help="How many steps.")] = 1,
    world_size: Annotated[int, typer.Option("--world-size", "-W", min=1, help="Assemble the batch from the streams of this many ranks.")] = 1,
    rank: Annotated[int | None, typer.Option("--rank", min=0, help="Only this rank's part.")] = None,
    text: Annotated[
        int | None, typer.Option("--text", min=0, metavar="N", help="Decode the first N samples of each step.", show_default="1, with --json 0")
    ] = None,
    overrides: Set = None,
    storage: Storage = None,
    as_json: Json = False,
) -> None:
    """Show what the model sees at a step, on any number of ranks, before or after training.

    Example: maskwright inspect my.yaml --step 1000 --world-size 8 --json
    """
    from data_pipeline.inspection import inspect_steps, sample_texts
    from data_pipeline.stream import MicroBatchStream
    from launcher.corpora import open_corpora

    run_config = load_run_config(config, overrides or (), storage)
    _check_range(run_config, step, steps, world_size, rank)
    stream = MicroBatchStream(open_corpora(run_config), run_config.objective, run_config.phases, run_config.seed, packing=run_config.batch.packing)
    num_texts = (0 if as_json else 1) if text is None else text
    found = inspect_steps(stream, run_config.phases, step, steps, world_size, rank)
    if as_json:
        for batch in found:
            texts = {"text": [asdict(each) for each in sample_texts(stream, run_config.phases, batch["step"], num_texts)]} if num_texts else {}
            print_json({**batch, **texts})
        return
    batches = list(found)
    print_table(("step", "digest", "samples", "tokens"), ((b["step"], b["digest"], b["num_samples"], b["num_tokens"]) for b in batches))
    for batch in batches:
        for name in batch["skipped_blocks"]:
            say(f"step {batch['step']}: the damaged block {name} is left out (data.on_damage: skip)")
    for each in range(step, step + steps) if num_texts else ():
        for nth, sample in enumerate(sample_texts(stream, run_config.phases, each, num_texts), 1):
            say(f"\nstep {each}, sample {nth} ({sample.sentences}; [seen -> to be predicted]):\n{sample.text}")
    say("")
    next_command(command("run", config, overrides=overrides, storage=storage))


def _check_range(config: RunConfig, step: int, steps: int, world_size: int, rank: int | None) -> None:
    if step + steps > config.schedule.steps:
        raise UsageError(
            f"--step {step} --steps {steps}: the run has steps 0 to {config.schedule.steps - 1}", "Ask for fewer, or --set schedule.steps=N."
        )
    if rank is not None and rank >= world_size:
        raise UsageError(f"--rank {rank}: --world-size {world_size} has ranks 0 to {world_size - 1}", "Raise --world-size or lower --rank.")


VERBS = (init, prepare, inspect, schema)
