"""Packed rows against padded ones: real tokens by second where samples fill 47 % of a row and where they fill it whole, and the losses of pairs.

The same samples in both layouts, with all of a step: forward, backward, ZeRO-1 and AdamW on one core, CPU time.
"""

import sys
from dataclasses import replace
from typing import Any, Literal

from benchmarks.children import Contestant, Runs, measure, rank_contestant
from benchmarks.claims import Claim, Goal, make_claim, middle, number
from benchmarks.harness import Options, run_benchmark
from benchmarks.training import BASE, SMALL, Network, Shape, arguments, networks, our_precision, seconds_of

NAME = "train_packing"
TITLE = "Packed rows against padded ones: real tokens by second"
LAYOUTS: dict[Literal["none", "rows"], str] = {"none": "padded", "rows": "packed"}
FILLS = {0.47: "rows filled to 47 %", 1.0: "rows already full"}
_GOALS = {(0.47, SMALL.name): 1.5, (0.47, BASE.name): 1.8, (1.0, SMALL.name): 0.97, (1.0, BASE.name): 0.97}
_SAME_LOSS = Goal("ours", "≤", 1e-4)


def main(options: Options) -> list[Claim]:
    """Both layouts of the same samples, for each network and fill; the losses once."""
    shape = Shape(samples=8, length=32) if options.short else Shape(samples=32, length=128)
    precision = our_precision()
    speeds = [_speed(network, shape, fill, layout, precision, options) for network in networks(options) for fill in FILLS for layout in LAYOUTS]
    losses = [_losses(network, shape) for network in networks(options)]
    runs = measure(speeds, options.rounds, options.progress, timeout_s=1800) | measure(losses, 1, options.progress)
    _print(options, runs)
    environment = {**options.environment, "precision": precision, "batch": f"{shape.samples} x {shape.length}"}
    return [claim for network in networks(options) for claim in _claims(network, runs, environment)]


def name_of(network: Network, fill: float, layout: Literal["none", "rows"]) -> str:
    """Of a contestant."""
    return f"{network.name}, {FILLS[fill]}, {LAYOUTS[layout]}"


def _speed(network: Network, shape: Shape, fill: float, layout: Literal["none", "rows"], precision: str, options: Options) -> Contestant:
    given = arguments(network, replace(shape, fill=fill, packing=layout), precision=precision, seconds=seconds_of(network, options))
    return rank_contestant(name_of(network, fill, layout), "benchmarks.contestants.training:ours", given)


def _losses(network: Network, shape: Shape) -> Contestant:
    given = arguments(network, replace(shape, fill=0.47))
    return Contestant(f"losses, {network.name}", sys.executable, "benchmarks.contestants.layouts:pairs", given, is_ours=True)


def _claims(network: Network, runs: dict[str, Runs], environment: dict[str, Any]) -> list[Claim]:
    claims: list[Claim] = []
    for fill, words in FILLS.items():
        padded, packed = (runs[name_of(network, fill, layout)].values("tokens_per_s") for layout in LAYOUTS)
        value = _GOALS.get((fill, network.name))
        goal = None if value is None else Goal("ratio", "≥", value)
        claims.append(make_claim(f"packed {network.name}, {words}", "real tokens/s", environment, packed, padded, "padded", goal))
    found = runs[f"losses, {network.name}"].values("difference")
    return [*claims, make_claim(f"packed {network.name}: difference of a pair's loss", "nats", environment, found, goal=_SAME_LOSS)]


def _print(options: Options, runs: dict[str, Runs]) -> None:
    speeds = {name: found for name, found in runs.items() if not name.startswith("losses")}
    rows = [(name, *(number(middle(found.values(key))) for key in ("tokens_per_s", "places_per_s", "wall_share"))) for name, found in speeds.items()]
    options.table("By second of CPU time", ("contestant", "real tokens/s", "places/s", "wall / CPU"), rows)


if __name__ == "__main__":
    run_benchmark(NAME, TITLE, main)
