"""The verb plan: what a run takes, before anything is started."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from data_pipeline.errors import ExitCode
from launcher.config import load_cluster_config, load_run_config
from launcher.options import Cluster, ConfigArgument, Json, Set, Storage, command, next_command, print_fields, print_json, print_table, say

if TYPE_CHECKING:
    from launcher.plan import Plan
    from launcher.plan_memory import StageMemory

_SHOWN_SIZES = 10


def plan(
    config: ConfigArgument,
    world_size: Annotated[
        int | None, typer.Option("--world-size", "-W", min=1, help="Ranks.", show_default="as the cluster says, or this machine")
    ] = None,
    gpu: Annotated[
        str | None, typer.Option("--gpu", metavar="NAME", help="GPU of a rank, as H100 or A100-SXM4-80GB.", show_default="none: ranks on CPUs")
    ] = None,
    mfu: Annotated[
        float | None, typer.Option("--mfu", min=0.001, max=1.0, help="Share of the GPU's stated rate that useful work reaches, as 0.4.")
    ] = None,
    tokens_per_s: Annotated[float | None, typer.Option("--tokens-per-second", min=0.001, help="Of all ranks together, instead of --mfu.")] = None,
    price_per_hour: Annotated[float | None, typer.Option("--price-per-hour", min=0.0, help="Of one worker.")] = None,
    failures_per_day: Annotated[
        float | None, typer.Option("--failures-per-day", min=0.0, help="Of all machines together; says how far apart checkpoints should be.")
    ] = None,
    overrides: Set = None,
    storage: Storage = None,
    cluster: Cluster = None,
    as_json: Json = False,
    exit_code: Annotated[bool, typer.Option("--exit-code", help="Exit with 3 where a problem found is an error.")] = False,
) -> None:
    """Say what a run takes, and what will go wrong: steps, tokens, memory, hours, cost, checkpoints. Needs no GPU and starts nothing.

    Example: maskwright plan my.yaml --gpu H100 --world-size 8 --mfu 0.4 --price-per-hour 3
    """
    run_config, where = load_run_config(config, overrides or (), storage), load_cluster_config(cluster or "local")

    from launcher.plan import make_plan
    from launcher.plan_facts import gather_facts
    from launcher.plan_time import Stated

    facts = gather_facts(run_config, where, gpu=gpu, world_size=world_size)
    found = make_plan(run_config, facts, Stated(mfu, tokens_per_s, price_per_hour, failures_per_day))
    has_errors = any(problem.severity == "error" for problem in found.problems)
    if as_json:
        print_json(found.to_json())
    else:
        show(found)
        verb = "run" if found.facts.mixture is not None else "prepare"
        if verb == "prepare" or not has_errors:  # each error has its remedy
            next_command(command(verb, config, overrides=overrides, storage=storage, cluster=cluster))
    if exit_code and has_errors:
        raise typer.Exit(int(ExitCode.CONFIG))


def show(found: "Plan") -> None:
    """Tables for people; problems last, where they are read."""
    print_table(("", "", "from"), _basis_rows(found))
    say("")
    print_fields(dict(_extent(found)))
    if found.memory is not None:
        process = "CUDA takes" if found.facts.gpu else "its process takes"
        say(f"\nMemory of a rank at most, in GB; * as configured; needed: with a margin of a tenth, and what {process} before it has a network")
        print_table(_memory_columns(found), _memory_rows(found))
        say(f"Gradients of several micro-batches are summed in fp32 at every stage. Peaks are {found.memory_basis}.")
    say("\nRanks: micro-steps of each in a step, and the share of them that is empty")
    print_table(("ranks", "micro-steps", "empty"), _size_rows(found))
    if found.checkpoints is not None:
        say("\nCheckpoints")
        print_fields(dict(_checkpoint_fields(found)))
    say("" if found.problems else "\nNo problems found.\n")
    for problem in found.problems:
        say(f"{problem.severity}: {problem.cause}\n  {problem.remedy}")
    if found.problems:
        say("")


def _basis_rows(found: "Plan") -> Iterator[tuple[str, str, str]]:
    for name, each in found.basis().items():
        yield name.replace("_", " "), "-" if each["value"] is None else str(each["value"]), each["basis"]


def _extent(found: "Plan") -> Iterator[tuple[str, str]]:
    facts, network = found.facts, found.facts.network
    if network is not None:
        yield "parameters", f"{network.parameters:,}"
    yield "steps", f"{found.config.schedule.steps:,}"
    yield "tokens", f"{'at most ' if found.tokens_are_bound else ''}{found.tokens:,}"
    yield "epochs", ", ".join(f"{each:,.2f}" for each in found.epochs) if found.epochs else f"not known: {facts.corpora_basis}"
    took = found.duration
    most = "at most " if took.is_bound else ""
    yield "hours of pretraining", f"not known: {took.basis}" if took.hours is None else f"{most}{took.hours:,.3g} ({took.basis})"
    if took.step_s is not None:
        yield "seconds a step", f"{most}{took.step_s:.3g}"
    if found.cost is not None:
        yield "cost", f"{most}{found.cost:,.2f}"
    elif found.cost_reason != "no --price-per-hour":
        yield "cost", f"not known: {found.cost_reason}"
    if found.resume_bytes is not None:
        yield "read at a resume", f"at most {found.resume_bytes / 1e6:,.1f} MB a rank"


def _memory_columns(found: "Plan") -> tuple[str, ...]:
    columns = ("ZeRO", "weights", "gradients", "optimizer", "activations", "checkpointed", "buffers", "peak", "in", "needed")
    return (*columns, "fits", "largest micro-batch") if found.facts.gpu else columns


def _memory_rows(found: "Plan") -> Iterator[tuple[str, ...]]:
    for stage in found.memory or ():
        rank = stage.rank
        parts = (rank.weights_bytes, rank.gradients_bytes, rank.optimizer_bytes)
        ways = (stage.activations_bytes_kept, stage.activations_bytes_checkpointed, rank.buffers_bytes)
        name = f"{stage.stage}{' *' if stage.stage == found.config.zero.stage else ''}"
        cells = (name, *map(_gb, (*parts, *ways, rank.peak_bytes)), rank.peak_at, _gb(stage.needed_bytes))
        yield (*cells, "yes" if stage.fits else "NO", _largest(stage)) if found.facts.gpu else cells


def _largest(stage: "StageMemory") -> str:
    from launcher.plan_memory import MOST_SAMPLES

    return f"{stage.largest_micro_batch:,}{' or more' if stage.largest_micro_batch == MOST_SAMPLES else ''}"


def _size_rows(found: "Plan") -> Iterator[tuple[str, str, str]]:
    sizes, chosen = found.world_sizes, found.facts.world_size.value
    step = -(-len(sizes) // _SHOWN_SIZES)
    for place, size in enumerate(sizes):
        if place % step == 0 or place == len(sizes) - 1 or size.world_size == chosen:
            yield f"{size.world_size}{' *' if size.world_size == chosen else ''}", f"{size.micro_steps:,}", f"{size.waste:.1%}"


def _checkpoint_fields(found: "Plan") -> Iterator[tuple[str, str]]:
    planned = found.checkpoints
    assert planned is not None
    yield "each", f"{_gb(planned.checkpoint_bytes)} GB, every {planned.every_steps:,} steps: {planned.number:,}"
    yield "kept at the end", f"{planned.kept:,}: {_gb(planned.kept_bytes)} GB"
    yield "in host memory", f"{_gb(found.snapshot_bytes or 0)} GB of the largest rank, while it is written"
    if planned.best_every_steps is not None:
        yield "best interval", f"{planned.best_every_steps:,} steps ({planned.best_basis})"


def _gb(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:,.2f}"


VERBS = (plan,)
