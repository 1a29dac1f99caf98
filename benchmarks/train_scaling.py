"""Two ranks, by the wall clock: against twice one rank, against torch's DDP, and a whole run under Ray against the same under torchrun.

Each rank is a process with one thread, joined to the others by gloo, under ZeRO-1. In the first two comparisons it is held to a core of its own
and has the same work whatever the number of ranks: accumulation micro-batches a step. Beside them stand two runs of one rank each, at once, which
exchange nothing: as near to twice one as this machine's cores let anything come. The last takes what `maskwright run` does on this machine,
the whole stream, log and watch included, beside the trainer's own loop in processes that torchrun starts.
"""

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.children import Contestant, Runs, measure, rank_contestant
from benchmarks.claims import Claim, Goal, make_claim, middle, number
from benchmarks.harness import Options, run_benchmark
from benchmarks.machine import installed_version
from benchmarks.training import SMALL, TINY, Network, Shape, arguments, our_precision
from data_pipeline.config import CorpusConfig, TokenizerConfig
from data_pipeline.executor import InProcessExecutor
from data_pipeline.prepare import prepare
from data_pipeline.storage import Location
from tests.support.text import write_texts

NAME = "train_scaling"
TITLE = "Two ranks by the wall clock"
PARTS = ("ranks", "ray")
GOALS = {8: 0.95, 1: 0.85}
"""By accumulation: the least share of twice one rank's rate."""
RAY_GOAL = 0.98
WORLD_SIZES = (1, 2)
LAUNCHERS = {"Ray": "benchmarks.contestants.launching:under_ray", "torchrun": "benchmarks.contestants.launching:under_torchrun"}
_STEPS = 160
"""Some 25 s of a run: in 8 s of it, steps under torchrun differ by 5 % among themselves."""


def main(options: Options) -> list[Claim]:
    """The small network, with 8 micro-batches a step and with one, and a run of it."""
    network, shape = (TINY, Shape(4, 32, count=8)) if options.short else (SMALL, Shape(16, 128, count=8))
    environment = {**options.environment, "precision": our_precision(), "batch": f"{shape.samples} x {shape.length}"}
    claims = _of_ranks(network, shape, environment, options) if "ranks" in options.parts else []
    return claims + (_of_launchers(network, shape, environment, options) if "ray" in options.parts else [])


def name_of(world_size: int, accumulation: int, loop: str = "ours") -> str:
    """Of a contestant."""
    return f"{loop}, {world_size} rank{'s' if world_size > 1 else ''}, accumulation {accumulation}"


def _of_ranks(network: Network, shape: Shape, environment: dict[str, Any], options: Options) -> list[Claim]:
    kinds = [(size, accumulation, "ours") for accumulation in GOALS for size in WORLD_SIZES]
    kinds += [(max(WORLD_SIZES), accumulation, "DDP") for accumulation in GOALS] + [(max(WORLD_SIZES), max(GOALS), "apart")]
    contestants = [_contestant(network, shape, *kind, precision=environment["precision"], seconds=options.seconds) for kind in kinds]
    runs = measure(contestants, options.rounds, options.progress)
    rows = [(name, *(number(middle(found.values(key))) for key in ("tokens_per_s", "wall_share"))) for name, found in runs.items()]
    options.table("By second of wall clock", ("contestant", "tokens/s", "wall / CPU of rank 0"), rows)
    found = [_against_one(network, accumulation, runs, environment, judged=not options.short) for accumulation in GOALS]
    found += [_against_ddp(network, accumulation, runs, environment) for accumulation in GOALS]
    return [*found, _against_apart(network, runs, environment)]


def _contestant(
    network: Network, shape: Shape, world_size: int, accumulation: int, loop: str, *, precision: str, seconds: float
) -> Contestant:  # fmt: skip
    given = {"cores": _cores(), "precision": precision, "world_size": world_size, "accumulation": accumulation, "seconds": seconds}
    given |= {"apart": True} if loop == "apart" else {"loop": loop}
    name = name_of(world_size, accumulation, loop)
    return rank_contestant(name, "benchmarks.contestants.ranks:ranks", arguments(network, shape, **given))


def _against_one(network: Network, accumulation: int, runs: dict[str, Runs], environment: dict[str, Any], *, judged: bool) -> Claim:
    one, two = (runs[name_of(size, accumulation)].values("tokens_per_s") for size in WORLD_SIZES)
    goal = Goal("ratio", "≥", GOALS[accumulation]) if judged else None
    claim = f"two ranks, {network.name}, accumulation {accumulation}"
    return make_claim(claim, "tokens/s", environment, two, [2 * rate for rate in one], "twice one rank", goal)


def _against_ddp(network: Network, accumulation: int, runs: dict[str, Runs], environment: dict[str, Any]) -> Claim:
    ours, ddp = (runs[name_of(max(WORLD_SIZES), accumulation, loop)].values("tokens_per_s") for loop in ("ours", "DDP"))
    claim = f"two ranks under ZeRO-1 against DDP, {network.name}, accumulation {accumulation}"
    return make_claim(claim, "tokens/s", environment, ours, ddp, f"torch {installed_version('torch')} DDP")


def _against_apart(network: Network, runs: dict[str, Runs], environment: dict[str, Any]) -> Claim:
    """What the machine leaves to be reached of twice one rank: its cores slow each other down, and need not be equal."""
    accumulation = max(GOALS)
    ours, apart = (runs[name_of(max(WORLD_SIZES), accumulation, loop)].values("tokens_per_s") for loop in ("ours", "apart"))
    claim = f"two ranks, {network.name}, accumulation {accumulation}, against two runs at once"
    return make_claim(claim, "tokens/s", environment, ours, apart, "two runs of one rank each, at once")


def _of_launchers(network: Network, shape: Shape, environment: dict[str, Any], options: Options) -> list[Claim]:
    with tempfile.TemporaryDirectory(prefix="maskwright-bench-") as folder:
        config = run_config(Path(folder), network, shape, environment["precision"], short=options.short)
        options.progress("corpus")
        given = {"cores": _cores(), "config": config, "corpus": prepare_corpus(config, Path(folder), 200 if options.short else 2000)}
        contestants = [Contestant(name, sys.executable, function, given, is_ours=True) for name, function in LAUNCHERS.items()]
        runs = measure(contestants, options.rounds, options.progress)
    rows = [(name, *(number(middle(found.values(key))) for key in ("steps_per_s", "step_s"))) for name, found in runs.items()]
    options.table("A run of the trainer, by second of wall clock", ("started by", "steps/s", "a step's seconds"), rows)
    ray, torchrun = (runs[name].values("steps_per_s") for name in LAUNCHERS)
    goal = None if options.short else Goal("ratio", "≥", RAY_GOAL)
    return [make_claim(f"a run under Ray, {network.name}, two ranks", "steps/s", environment, ray, torchrun, "torchrun", goal)]


def run_config(folder: Path, network: Network, shape: Shape, precision: str, *, short: bool) -> dict[str, Any]:
    """The run.yaml of both launchers, without its storage; its corpus lies in `folder`; pure."""
    steps = 14 if short else _STEPS
    return {
        "name": "launched",
        "corpus": {"name": "generated", "source": str(folder / "text")},
        "data": {"storage": str(folder)},
        "tokenizer": {"vocab_size": 2048},
        "model": network.section(shape.length, dropout=0.1),
        "batch": {"global_batch_size": 2 * shape.samples, "micro_batch_size": shape.samples, "sequence_length": shape.length},
        "precision": precision,
        "schedule": {"steps": steps, "warmup_steps": 5},
        "checkpoint": {"every_steps": steps},
        "validation": {"every_steps": steps, "micro_batches": 2},
    }


def prepare_corpus(config: dict[str, Any], folder: Path, num_documents: int = 200) -> str:
    """The corpus of such a run.yaml, of generated text; returns its folder."""
    write_texts(folder / "text", num_documents, seed=0)
    corpus, tokenizer = CorpusConfig.model_validate(config["corpus"]), TokenizerConfig.model_validate(config["tokenizer"])
    lengths = (config["batch"]["sequence_length"],)
    return prepare(corpus, tokenizer, lengths, Location.at(folder) / "corpora", InProcessExecutor(), lambda _: None).folder.url


def _cores() -> list[int]:
    return sorted(os.sched_getaffinity(0))


if __name__ == "__main__":
    run_benchmark(NAME, TITLE, main, parts=PARTS)
