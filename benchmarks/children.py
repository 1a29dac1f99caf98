"""Contestants as child processes on one core each: interleaved rounds, the parent's side and the child's."""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainer.heap import HEAP_ENVIRONMENT

ROOT = Path(__file__).resolve().parent.parent
_ONE_THREAD = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS")
_TAIL = 2000

Measurement = dict[str, Any]


class ContestantError(RuntimeError):
    """A contestant did not finish; the message ends with what it printed last."""


@dataclass(frozen=True)
class Contestant:
    """Something that is measured: a function `module:function` called with keyword arguments in a process of its own."""

    name: str
    python: str
    """Interpreter of its environment."""
    function: str
    arguments: dict[str, Any]
    is_ours: bool = False
    environment: Mapping[str, str] = field(default_factory=dict[str, str])
    """What its process has beside ours."""


def rank_contestant(name: str, function: str, arguments: dict[str, Any]) -> Contestant:
    """One whose process has its memory as ranks on CPUs have it."""
    return Contestant(name, sys.executable, function, arguments, is_ours=True, environment=HEAP_ENVIRONMENT)


@dataclass(frozen=True)
class Runs:
    """What a contestant measured, round by round, or why it did not."""

    measurements: tuple[Measurement, ...] = ()
    failure: str | None = None

    def values(self, key: str) -> list[float]:
        """One number of each measurement; none of a contestant that failed."""
        return [] if self.failure else [float(measurement[key]) for measurement in self.measurements]


def measure(contestants: Sequence[Contestant], rounds: int, progress: Callable[[str], None], timeout_s: float = 900) -> dict[str, Runs]:
    """Run every contestant once a round, each round starting with another one, so that a slow minute of the machine hits all of them.

    A peer that fails is not run again; its failure is its result. Raises ContestantError when one of ours fails.
    """
    found = {contestant.name: Runs() for contestant in contestants}
    for position, contestant in interleaved(contestants, rounds):
        so_far = found[contestant.name]
        if so_far.failure is not None:
            continue
        progress(f"round {position + 1} of {rounds}: {contestant.name}")
        try:
            found[contestant.name] = Runs((*so_far.measurements, run_child(contestant, timeout_s)))
        except ContestantError as error:
            if contestant.is_ours:
                raise
            progress(str(error))
            found[contestant.name] = Runs(failure=str(error).partition("\n")[0])
    return found


def interleaved(contestants: Sequence[Contestant], rounds: int) -> Iterator[tuple[int, Contestant]]:
    """(round, contestant): all contestants a round, each round rotated by one; pure."""
    for position in range(rounds):
        start = position % len(contestants)
        for contestant in [*contestants[start:], *contestants[:start]]:
            yield position, contestant


def run_child(contestant: Contestant, timeout_s: float = 900) -> Measurement:
    """Run a contestant on the last core this process may use. Raises ContestantError."""
    core = max(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory(prefix="maskwright-bench-") as folder:
        answer = Path(folder) / "answer.json"
        job = {"function": contestant.function, "arguments": contestant.arguments, "answer": str(answer), "core": core}
        try:
            done = subprocess.run(
                [contestant.python, "-m", "benchmarks.children", json.dumps(job)],
                cwd=folder, env={**_environment(), **contestant.environment}, capture_output=True, text=True, timeout=timeout_s, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired as error:
            raise ContestantError(f"{contestant.name} did not finish in {timeout_s:.0f} s") from error
        if not answer.exists():
            raise ContestantError(f"{contestant.name} exited with {done.returncode}:\n{(done.stdout + done.stderr)[-_TAIL:]}")
        return json.loads(answer.read_text())


def _environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONHOME"}
    single = dict.fromkeys(_ONE_THREAD, "1")
    return {**kept, **single, "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}


def timed_rate(steps: Iterator[dict[str, int]], seconds: float, warm_up_s: float = 0.5) -> Measurement:
    """Child's side: take steps for `seconds` and return what they counted, by second of CPU time of all threads and by wall clock.

    A step is a dict of counts. Steps of the first `warm_up_s` are not counted. CPU time is what a core costs, whatever else the machine
    does; the wall clock also shows waiting.
    """
    totals: dict[str, int] = {}
    begun = time.perf_counter()
    while time.perf_counter() - begun < warm_up_s:
        next(steps)
    cpu_start, wall_start = time.process_time(), time.perf_counter()
    while (wall := time.perf_counter() - wall_start) < seconds:
        for name, count in next(steps).items():
            totals[name] = totals.get(name, 0) + count
    cpu = time.process_time() - cpu_start
    return {
        "cpu_s": cpu,
        "wall_s": wall,
        "wall_share": wall / cpu,
        **{f"{name}_per_s": count / cpu for name, count in totals.items()},
        "counts": totals,
    }


def _child(job: dict[str, Any]) -> None:
    os.sched_setaffinity(0, {job["core"]})
    module, _, name = job["function"].partition(":")
    function = getattr(__import__(module, fromlist=[name]), name)
    result = function(**job["arguments"])
    Path(job["answer"]).write_text(json.dumps(result))


if __name__ == "__main__":
    _child(json.loads(sys.argv[1]))
