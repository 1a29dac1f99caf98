"""Training steps on one core: ours against the Hugging Face Trainer, as `run_mlm` sets it up, on the same batches.

Both train the same network with both BERT objectives, dropout 0.1 and AdamW; batches are ready in memory, padded, of full rows. Tokens by
second of CPU time. Each is started as its users start it: ours as a rank of a run, with the memory of one (`trainer.heap`), the Trainer by itself;
and the Trainer once more with our memory, which shows what that alone is worth.
"""

import sys
from dataclasses import dataclass
from typing import Any

from benchmarks.children import Contestant, Runs, measure, rank_contestant
from benchmarks.claims import Claim, Goal, make_claim, middle, number
from benchmarks.harness import Options, run_benchmark
from benchmarks.machine import installed_version
from benchmarks.training import BASE, NO_BF16, SMALL, Network, Shape, arguments, emulates_bf16, networks, our_precision, seconds_of
from trainer.heap import HEAP_ENVIRONMENT

NAME = "train_speed"
TITLE = "Training on one core: tokens by second"
_GOALS = {("fp32", SMALL.name): 4.7, ("fp32", BASE.name): 3.5, ("bf16", SMALL.name): 3.3, ("bf16", BASE.name): 1.6}
_MODES = {"fp32": "its defaults", "bf16": "its bf16 mode"}


@dataclass(frozen=True)
class Pair:
    """A row: ours in one precision against a mode of the Trainer."""

    network: Network
    ours: str
    mode: str
    has_our_memory: bool = False
    """The Trainer's process."""

    @property
    def goal(self) -> Goal | None:
        """Stated for the precision that we choose, and for the Trainer as its users start it."""
        value = None if self.has_our_memory else _GOALS.get((self.mode, self.network.name))
        return None if value is None else Goal("ratio", "≥", value)


def main(options: Options) -> list[Claim]:
    """All networks, each in the precision of `auto` and in fp32, against both modes of the Trainer."""
    shape = Shape(samples=4, length=32) if options.short else Shape(samples=32, length=128)
    chosen, without_bf16 = our_precision(), emulates_bf16()
    contestants = [
        contestant
        for network in networks(options)
        for contestant in (
            *(_ours(network, shape, precision, options) for precision in dict.fromkeys((chosen, "fp32"))),
            *(
                _peer(network, shape, mode, options, has_our_memory=has_our_memory)
                for mode in _MODES
                for has_our_memory in (False, True)
                if not (mode == "bf16" and without_bf16)
            ),
        )
    ]
    runs = measure(contestants, options.rounds, options.progress, timeout_s=1800)
    rows = [(name, *(number(middle(found.values(key))) for key in ("tokens_per_s", "steps_per_s", "wall_share"))) for name, found in runs.items()]
    options.table("Steps by second of CPU time", ("contestant", "tokens/s", "steps/s", "wall / CPU"), rows)
    environment = {**options.environment, "precision": chosen, "batch": f"{shape.samples} x {shape.length}"}
    return [_claim(pair, pair.ours == chosen, runs, environment) for network in networks(options) for pair in pairs(network, chosen)]


def pairs(network: Network, chosen: str) -> list[Pair]:
    """Ours as chosen against both modes; where it is not fp32, ours in fp32 against fp32 as well; pure."""
    own = [Pair(network, chosen, mode, has_our_memory) for has_our_memory in (False, True) for mode in _MODES]
    return own if chosen == "fp32" else [*own, Pair(network, "fp32", "fp32")]


def _claim(pair: Pair, is_chosen: bool, runs: dict[str, Runs], environment: dict[str, Any]) -> Claim:
    peer = runs.get(peer_name(pair.network, pair.mode, has_our_memory=pair.has_our_memory), Runs(failure=NO_BF16))
    mode = _MODES[pair.mode] + (" with our memory" if pair.has_our_memory else "")
    label = peer.failure or f"transformers {installed_version('transformers')} Trainer, {mode}"
    ours = runs[our_name(pair.network, pair.ours)].values("tokens_per_s")
    goal = pair.goal if is_chosen else None
    claim = f"training {pair.network.name} in {pair.ours} against the HF Trainer, {mode}"
    return make_claim(claim, "tokens/s", environment, ours, peer.values("tokens_per_s"), label, goal)


def our_name(network: Network, precision: str) -> str:
    """Of a contestant of ours."""
    return f"ours, {network.name}, {precision}"


def peer_name(network: Network, mode: str, *, has_our_memory: bool) -> str:
    """Of the Trainer in one of its modes."""
    return f"HF Trainer, {network.name}, {mode}" + (", our memory" if has_our_memory else "")


def _ours(network: Network, shape: Shape, precision: str, options: Options) -> Contestant:
    given = arguments(network, shape, precision=precision, seconds=seconds_of(network, options))
    return rank_contestant(our_name(network, precision), "benchmarks.contestants.training:ours", given)


def _peer(network: Network, shape: Shape, mode: str, options: Options, *, has_our_memory: bool) -> Contestant:
    given = arguments(network, shape, precision=mode, seconds=seconds_of(network, options))
    name, environment = peer_name(network, mode, has_our_memory=has_our_memory), HEAP_ENVIRONMENT if has_our_memory else {}
    return Contestant(name, sys.executable, "benchmarks.contestants.training_peers:hugging_face", given, environment=environment)


if __name__ == "__main__":
    run_benchmark(NAME, TITLE, main)
