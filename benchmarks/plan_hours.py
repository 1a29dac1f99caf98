"""What `maskwright plan` says of a run's hours from a shorter one before it, against the same run's pretraining by the clock.

Each case runs twice through the command, on generated text: a few steps, whose records the plan reads, and then the run that was planned for. What is
compared lasts from the start of the workers to the end of pretraining.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from benchmarks.children import ROOT
from benchmarks.claims import Claim, Goal, make_claim, number
from benchmarks.harness import Options, run_benchmark

NAME = "plan_hours"
TITLE = "Hours of a run: planned from a shorter one, against the clock"
GOAL = Goal("ours", "≤", 15.0)
"""Per cent that a plan may be off."""
_DOCUMENTS = 2000
_TIMEOUT_S = 1200
"""Of a command, which takes two minutes of an idle machine at most."""
_END_S = 60
"""For one whose time is over to end what it has started."""
_USUAL: dict[str, Any] = {
    "precision": "fp32",
    "corpus": {"name": "bench", "source": "text.jsonl"},
    "tokenizer": {"vocab_size": 2000},
    "model": {"num_layers": 4, "hidden_size": 256, "num_heads": 4, "max_positions": 128},
    "batch": {"global_batch_size": 32, "micro_batch_size": 16, "sequence_length": 128},
    "optimizer": {"lr": 1e-4},
    "validation": {"every_steps": 30, "micro_batches": 4},
    "checkpoint": {"every_steps": 15},
}


@dataclass(frozen=True)
class Case:
    """A run, and how it differs from the one that was there before."""

    name: str
    steps_before: int
    steps: int
    changes: tuple[str, ...] = ()
    """`--set` of the planned run."""
    world_size_before: int = 1
    world_size: int = 1
    settings: dict[str, Any] = field(default_factory=dict[str, Any])
    """Of both runs."""


CASES = (
    Case("four times as long", 30, 120),
    Case("four times the batch", 30, 30, ("batch.global_batch_size=128",)),
    Case("twice the ranks, eight times as long", 30, 240, world_size=2),
)
SHORT = (Case("twice as long", 10, 20, settings={"model": {"num_layers": 1, "hidden_size": 32, "num_heads": 2, "max_positions": 128}}),)


def main(options: Options) -> list[Claim]:
    """Each case in a storage of its own; the text is prepared once in each."""
    claims: list[Claim] = []
    rows: list[tuple[str, ...]] = []
    for case in SHORT if options.short else CASES:
        options.progress(case.name)
        with tempfile.TemporaryDirectory(prefix="maskwright-bench-") as folder:
            planned, measured = _measure(case, Path(folder))
        off = 100 * abs(planned / measured - 1)
        rows.append((case.name, *(number(each) for each in (planned, measured, off))))
        environment = {**options.environment, "planned_s": planned, "measured_s": measured}
        claims.append(make_claim(f"plan's hours, {case.name}", "% off", environment, [off], goal=None if options.short else GOAL))
    options.table("Seconds of pretraining", ("run", "planned", "measured", "% off"), rows)
    return claims


def _measure(case: Case, folder: Path) -> tuple[float, float]:
    """(planned, measured) seconds of the second run."""
    _write(case, folder)
    before = [f"schedule.steps={case.steps_before}", "schedule.warmup_steps=0"]
    after = [f"schedule.steps={case.steps}", "schedule.warmup_steps=0", *case.changes]
    _command(folder, "run", case.world_size_before, ["name=before", *before])
    planned = json.loads(_command(folder, "plan", case.world_size, ["name=planned", *after], "--json"))
    _command(folder, "run", case.world_size, ["name=planned", *after])
    return planned["hours"] * 3600, pretraining_s(folder / "storage" / "planned")


def pretraining_s(run: Path) -> float:
    """From the start of a run's workers to the end of its pretraining."""
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    started = next(event["time"] for event in events if event["kind"] == "attempt_started" and event["stage"] == "pretrain")
    ended = next(event["time"] for event in events if event["kind"] == "stage_finished" and event["stage"] == "pretrain")
    return ended - started


def _write(case: Case, folder: Path) -> None:
    from tests.support.tiny_run import write_text

    write_text(folder, documents=_DOCUMENTS)
    (folder / "run.yaml").write_text(yaml.safe_dump({"name": "before", "storage": "storage", **_USUAL, **case.settings}))
    for size in {case.world_size_before, case.world_size}:
        cluster = {"kind": "local", "num_workers": size, "threads_per_worker": 1, "use_gpu": False}
        (folder / f"cluster-{size}.yaml").write_text(yaml.safe_dump(cluster))


def _command(folder: Path, verb: str, world_size: int, overrides: Sequence[str], *options: str) -> str:
    """What a `maskwright` command prints. Raises CalledProcessError, or TimeoutExpired; then it has been ended as a person would."""
    chosen = [word for override in overrides for word in ("--set", override)]
    words = [sys.executable, "-m", "launcher.cli", verb, "run.yaml", "--cluster", f"cluster-{world_size}.yaml", *chosen, *options]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(words, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        said, _ = process.communicate(timeout=_TIMEOUT_S)
    except BaseException:  # its time is over, or somebody ends the benchmark: a cluster would go on by itself
        process.terminate()
        process.wait(_END_S)
        raise
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, words, said)
    return said


if __name__ == "__main__":
    run_benchmark(NAME, TITLE, main)
