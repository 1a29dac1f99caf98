"""What DeepSpeed's ZeRO-1 costs: our engine against a plain torch loop with fp32 master weights, the same network on the same batches.

One rank, so that nothing is sent: what is left is bookkeeping. The plain loop accumulates gradients in fp32, clips, and steps fused AdamW.
"""

from typing import Any

from benchmarks.children import Contestant, Runs, measure, rank_contestant
from benchmarks.claims import Claim, Goal, make_claim, middle, number
from benchmarks.harness import Options, run_benchmark
from benchmarks.training import SMALL, TINY, Network, Shape, arguments, our_precision

NAME = "train_zero"
TITLE = "ZeRO-1 against a plain torch loop: tokens by second"
GOALS = {8: 0.90, 1: 0.80}
"""By accumulation: the least share of the plain loop's rate."""
_FUNCTIONS = {"ours": "benchmarks.contestants.training:ours", "plain loop": "benchmarks.contestants.training_peers:plain_loop"}


def main(options: Options) -> list[Claim]:
    """Both loops with 8 micro-batches a step and with one."""
    network, shape = (TINY, Shape(4, 32, count=8)) if options.short else (SMALL, Shape(16, 128, count=8))
    precision = our_precision()
    contestants = [_contestant(whose, network, shape, accumulation, precision, options) for accumulation in GOALS for whose in _FUNCTIONS]
    runs = measure(contestants, options.rounds, options.progress)
    rows = [(name, *(number(middle(found.values(key))) for key in ("tokens_per_s", "steps_per_s", "wall_share"))) for name, found in runs.items()]
    options.table("By second of CPU time", ("contestant", "tokens/s", "steps/s", "wall / CPU"), rows)
    environment = {**options.environment, "precision": precision, "batch": f"{shape.samples} x {shape.length}"}
    return [_claim(network, accumulation, runs, environment, judged=not options.short) for accumulation in GOALS]


def name_of(whose: str, accumulation: int) -> str:
    """Of a contestant."""
    return f"{whose}, accumulation {accumulation}"


def _contestant(whose: str, network: Network, shape: Shape, accumulation: int, precision: str, options: Options) -> Contestant:
    given = arguments(network, shape, precision=precision, seconds=options.seconds, accumulation=accumulation)
    return rank_contestant(name_of(whose, accumulation), _FUNCTIONS[whose], given)


def _claim(network: Network, accumulation: int, runs: dict[str, Runs], environment: dict[str, Any], *, judged: bool) -> Claim:
    ours, plain = (runs[name_of(whose, accumulation)].values("tokens_per_s") for whose in _FUNCTIONS)
    goal = Goal("ratio", "≥", GOALS[accumulation]) if judged else None
    claim = f"ZeRO-1, {network.name}, {accumulation} micro-batch{'es' if accumulation > 1 else ''} a step"
    return make_claim(claim, "tokens/s", environment, ours, plain, "plain torch loop, fp32 master", goal)


if __name__ == "__main__":
    run_benchmark(NAME, TITLE, main)
