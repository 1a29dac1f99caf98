"""Child's side of `train_scaling`: steps of several ranks, each a process on a core of its own, by the wall clock."""

import faulthandler
import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from benchmarks.children import Measurement
from benchmarks.contestants.training import OurTraining, counts_of, process_group
from benchmarks.contestants.training_batches import micro_batches
from benchmarks.contestants.training_peers import PlainLoop
from benchmarks.training import Network, Shape

LOOPS: dict[str, Callable[..., OurTraining | PlainLoop]] = {"ours": OurTraining.build, "DDP": PlainLoop}
_LEAST_STEPS = 3
_START_S = 300.0
"""What a rank may take for everything but its steps."""
_LATE_S = 30.0
"""For a rank whose time is over to say where it stands."""


def ranks(
    cores: list[int],
    world_size: int,
    network: dict[str, Any],
    shape: dict[str, Any],
    precision: str,
    accumulation: int,
    seconds: float,
    dropout: float = 0.1,
    loop: str = "ours",
    apart: bool = False,
) -> Measurement:
    """Tokens a second of all ranks together, each on one of `cores`; each takes `accumulation` micro-batches a step of `loop`.

    `apart`: every rank is a run of its own, at the same time as the others; that is what the machine's cores leave each other.
    """
    if len(cores) < world_size:
        raise RuntimeError(f"{world_size} ranks need as many cores; there are {len(cores)}")
    job = {"network": network, "shape": shape, "precision": precision, "accumulation": accumulation, "dropout": dropout, "seconds": seconds}
    found = on_ranks(_rank, cores, world_size, {**job, "loop": loop, "apart": apart}, _START_S + 4 * seconds)
    return {**found[0], "tokens_per_s": sum(measured["tokens_per_s"] for measured in found)}


def on_ranks(rank: Callable[..., None], cores: list[int], world_size: int, job: dict[str, Any], limit_s: float) -> list[Measurement]:
    """Run `rank(folder, rank, world_size, core, job)` in so many processes at once; what each has left in `folder` as `measured-<rank>`.

    Raises RuntimeError where one fails, or is not done in time.
    """
    with tempfile.TemporaryDirectory(prefix="maskwright-bench-") as folder:
        context = multiprocessing.get_context("spawn")
        arguments = [(rank, limit_s, folder, number, world_size, cores[-1 - number % len(cores)], job) for number in range(world_size)]
        processes = [context.Process(target=_within, args=each, daemon=True) for each in arguments]
        for process in processes:
            process.start()
        _wait(processes, time.monotonic() + limit_s + _LATE_S)
        return [json.loads((Path(folder) / f"measured-{number}").read_text()) for number in range(world_size)]


def _within(rank: Callable[..., None], limit_s: float, *arguments: Any) -> None:
    """A rank that is not done in time says where it stands, and ends by itself: whoever started it may be gone."""
    faulthandler.dump_traceback_later(limit_s, exit=True)
    rank(*arguments)


def _wait(processes: Sequence[Any], deadline: float) -> None:
    """Until all have ended; where one fails or the time is over, end the others, which would wait for it. Raises RuntimeError."""
    while any(process.is_alive() for process in processes):
        if time.monotonic() > deadline or any(process.exitcode not in (None, 0) for process in processes):
            break
        time.sleep(0.05)
    codes = [process.exitcode for process in processes]
    if any(code != 0 for code in codes):
        for process in processes:
            process.kill()
        raise RuntimeError(f"the ranks ended with {codes}")


def _rank(folder: str, rank: int, world_size: int, core: int, job: dict[str, Any]) -> None:
    os.sched_setaffinity(0, {core})
    network, shape = Network(**job["network"]), Shape(**job["shape"])
    group = (None, 0, 1) if job["apart"] else (folder, rank, world_size)
    with process_group(*group):
        training = LOOPS[job["loop"]](network, shape, precision=job["precision"], dropout=job["dropout"], world_size=group[2])
        turns = cycle(micro_batches(shape, network))
        steps = [list(islice(turns, job["accumulation"])) for _ in range(shape.count)]
        training.step(steps[0])
        num_steps = _agreed_steps(training, steps[0], job["seconds"])
        measured = _timed(training, steps, num_steps)
    (Path(folder) / f"measured-{rank}").write_text(json.dumps(measured))


def _agreed_steps(training: OurTraining | PlainLoop, batches: Sequence[Any], seconds: float) -> int:
    """How many steps take about `seconds`: rank 0 times one and tells the others."""
    import torch
    import torch.distributed as dist

    started_at = time.perf_counter()
    training.step(batches)
    number = torch.tensor([max(_LEAST_STEPS, round(seconds / (time.perf_counter() - started_at)))])
    dist.broadcast(number, 0)
    return int(number)


def _timed(training: OurTraining | PlainLoop, steps: Sequence[Sequence[Any]], num_steps: int) -> Measurement:
    """This rank's tokens by second, from when all begin to when all are done."""
    import torch.distributed as dist

    dist.barrier()
    tokens, wall_start, cpu_start = 0, time.perf_counter(), time.process_time()
    for batches in islice(cycle(steps), num_steps):
        training.step(batches)
        tokens += counts_of(batches)["tokens"]
    cpu_s = time.process_time() - cpu_start
    dist.barrier()
    wall_s = time.perf_counter() - wall_start
    return {"tokens_per_s": tokens / wall_s, "wall_s": wall_s, "cpu_s": cpu_s, "wall_share": wall_s / cpu_s, "counts": {"steps": num_steps}}
