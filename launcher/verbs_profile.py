"""The verb profile: where the time of some steps goes."""

from typing import Annotated, Any

import typer

from launcher.cluster_config import LocalCluster
from launcher.config import load_cluster_config
from launcher.options import Cluster, Json, RunArgument, Storage, command, next_command, print_json, print_table, say
from launcher.runs import find_run, read_cluster, read_config
from trainer.runlog import RunFolder

_STEPS = 5
_SHOWN = 10
_LONGEST_NAME = 40
_MOST_STEPS = 100
"""Every event of the steps is held in memory, and more of them tell no more."""


def profile(
    run: RunArgument,
    steps: Annotated[
        int | None,
        typer.Option("--steps", min=1, max=_MOST_STEPS, metavar="K", help="How many, after one to warm up.", show_default="5, or what the run has"),
    ] = None,
    storage: Storage = None,
    cluster: Cluster = None,
    as_json: Json = False,
) -> None:
    """Take some steps of a run, which must not be at work and stays as it is, under a profiler: the ten largest costs, the phases, a trace.

    Example: maskwright profile demo --steps 10
    """
    from launcher.profiling import profile_run

    folder = find_run(run, storage)
    config = read_config(folder)
    where = load_cluster_config(cluster) if cluster else _this_machine(folder)
    steps = steps or max(1, min(_STEPS, config.schedule.steps - 1))
    if not as_json:
        say(f"profiling {steps} steps of run {folder.root.name}, after one to warm up")
    found = profile_run(folder, config, where, steps, (lambda _: None) if as_json else say)
    if as_json:
        print_json(found)
        return
    show(found)
    next_command(command("report", run, storage=storage))


def _this_machine(run: RunFolder) -> LocalCluster:
    """The local cluster that the run was last run on, or the default one: machines elsewhere are asked for with --cluster only."""
    last = read_cluster(run)
    return last if isinstance(last, LocalCluster) else LocalCluster()


def show(found: dict[str, Any]) -> None:
    """What was profiled, the phases, the largest costs, and where the trace is."""
    weights = "fresh weights" if found["checkpoint_step"] is None else f"the weights of step {found['checkpoint_step']}"
    ranks = "1 rank" if found["world_size"] == 1 else f"{found['world_size']} ranks"
    say(
        f"{found['num_steps']} steps from step {found['first_step']} on with {weights}: {ranks}, ZeRO {found['zero_stage']}, {found['precision']} on "
        f"{found['device']}; {_milliseconds(found['step_s'])} ms a step under the profiler, which slows it down\n"
    )
    print_table(("phase", "ms a step", "share"), ((p["phase"], _milliseconds(p["seconds"]), _percent(p["share"])) for p in found["phases"]))
    what = "kernel, by its time on the GPU" if found["costs_of"] == "gpu" else "cost, by its own CPU time"
    say("")
    print_table((f"{what} (rank 0)", "calls a step", "ms a step", "share"), cost_rows(found["costs"], found["num_steps"]))
    say(f"\n{found['trace']} (open it in Perfetto or chrome://tracing)")


def cost_rows(costs: list[dict[str, Any]], num_steps: int) -> list[tuple[str, str, str, str]]:
    """The largest, then all others together."""
    shown, others = costs[:_SHOWN], costs[_SHOWN:]
    if others:
        shown.append({"name": f"{len(others)} others", **{key: sum(cost[key] for cost in others) for key in ("calls", "seconds", "share")}})
    return [
        (_short(cost["name"]), f"{cost['calls'] / num_steps:,.0f}", _milliseconds(cost["seconds"] / num_steps), _percent(cost["share"]))
        for cost in shown
    ]


def _short(name: str) -> str:
    """Names of kernels are those of C++ templates."""
    return name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME - 1]}…"


def _milliseconds(seconds: float | None) -> str:
    return "in backward" if seconds is None else f"{1000 * seconds:,.2f}"


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.1%}"


VERBS = (profile,)
