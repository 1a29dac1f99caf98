"""Two ranks against twice one rank, by the wall clock: each rank a process with one thread on a core of its own, joined by gloo, ZeRO-1.

Every rank has the same work whatever their number: accumulation micro-batches a step. Torch's DDP, and Ray against torchrun, are not measured yet.
"""

import os
import sys
from typing import Any

from benchmarks.children import Contestant, Runs, measure
from benchmarks.claims import Claim, Goal, make_claim, middle, number
from benchmarks.harness import Options, run_benchmark
from benchmarks.training import SMALL, TINY, Network, Shape, arguments, our_precision

NAME = "train_scaling"
TITLE = "Two ranks against twice one: tokens by second of wall clock"
GOALS = {8: 0.95, 1: 0.85}
"""By accumulation: the least share of twice one rank's rate."""
WORLD_SIZES = (1, 2)


def main(options: Options) -> list[Claim]:
    """One rank and two, with 8 micro-batches a step and with one."""
    network, shape = (TINY, Shape(4, 32, count=8)) if options.short else (SMALL, Shape(16, 128, count=8))
    precision = our_precision()
    contestants = [_contestant(size, network, shape, accumulation, precision, options.seconds) for accumulation in GOALS for size in WORLD_SIZES]
    runs = measure(contestants, options.rounds, options.progress)
    rows = [(name, *(number(middle(found.values(key))) for key in ("tokens_per_s", "wall_share"))) for name, found in runs.items()]
    options.table("By second of wall clock", ("contestant", "tokens/s", "wall / CPU of rank 0"), rows)
    environment = {**options.environment, "precision": precision, "batch": f"{shape.samples} x {shape.length}"}
    return [_claim(network, accumulation, runs, environment, judged=not options.short) for accumulation in GOALS]


def name_of(world_size: int, accumulation: int) -> str:
    """Of a contestant."""
    return f"{world_size} rank{'s' if world_size > 1 else ''}, accumulation {accumulation}"


def _contestant(world_size: int, network: Network, shape: Shape, accumulation: int, precision: str, seconds: float) -> Contestant:
    cores = sorted(os.sched_getaffinity(0))
    given = arguments(network, shape, cores=cores, precision=precision, world_size=world_size, accumulation=accumulation, seconds=seconds)
    return Contestant(name_of(world_size, accumulation), sys.executable, "benchmarks.contestants.ranks:ranks", given, is_ours=True)


def _claim(network: Network, accumulation: int, runs: dict[str, Runs], environment: dict[str, Any], *, judged: bool) -> Claim:
    one, two = (runs[name_of(size, accumulation)].values("tokens_per_s") for size in WORLD_SIZES)
    goal = Goal("ratio", "≥", GOALS[accumulation]) if judged else None
    claim = f"two ranks, {network.name}, accumulation {accumulation}"
    return make_claim(claim, "tokens/s", environment, two, [2 * rate for rate in one], "twice one rank", goal)


if __name__ == "__main__":
    run_benchmark(NAME, TITLE, main)
