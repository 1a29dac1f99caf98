"""Child's side of `plan_memory`: the most memory that a rank of our trainer takes, above the same process when it had trained a tiny network."""

import ctypes
import gc
import json
import os
from dataclasses import replace
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from benchmarks.children import Measurement
from benchmarks.contestants.ranks import on_ranks
from benchmarks.contestants.training import OurTraining, process_group
from benchmarks.contestants.training_batches import micro_batches
from benchmarks.training import Network, Shape

STEPS = 4
"""The optimizer's state comes with the first; what lies where on the heap settles with the next ones."""
_TINY_SHAPE = Shape(2, 16, count=1)
_LIMIT_S = 1200.0


def peak(cores: list[int], world_size: int, **job: Any) -> Measurement:
    """`peak_bytes` of rank 0, of `world_size` ranks that train together; `job` as `benchmarks.plan_memory.Case` has it."""
    return on_ranks(_rank, cores, world_size, {**job, "cores": cores}, _LIMIT_S)[0]


def _rank(folder: str, rank: int, world_size: int, core: int, job: dict[str, Any]) -> None:
    """On any core: what is measured does not depend on it, and where others are at work one core may be theirs for long."""
    del core
    os.sched_setaffinity(0, job["cores"])
    network, shape = Network(**job["network"]), Shape(**job["shape"])
    settings = {name: job[name] for name in ("precision", "dropout", "stage", "optimizer", "attention")}
    with process_group(folder, rank, world_size, _LIMIT_S / 2):
        _train(replace(network, layers=2, width=64, heads=2), _TINY_SHAPE, 1, world_size=world_size, **settings)
        process_bytes = _forget()
        settings["activation_checkpointing"] = job["checkpointing"]
        parameters = _train(network, shape, job["accumulation"], world_size=world_size, **settings)
        peak_bytes = _status()["VmHWM"] - process_bytes
    (Path(folder) / f"measured-{rank}").write_text(json.dumps({"peak_bytes": peak_bytes, "parameters": parameters, "process_bytes": process_bytes}))


def _train(network: Network, shape: Shape, accumulation: int, **settings: Any) -> int:
    """Take some steps; returns the number of parameters."""
    training = OurTraining.build(network, shape, **settings)
    turns = cycle(micro_batches(shape, network))
    for _ in range(STEPS):
        training.step(list(islice(turns, accumulation)))
    return sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in training.engine.model.parameters())


def _forget() -> int:
    """Give back what can be, and begin to measure; returns the resident set that is left, in bytes."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark of the resident set begins anew, see proc(5)
    return _status()["VmRSS"]


def _status() -> dict[str, int]:
    """Resident set now, and at most, in bytes."""
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(("VmRSS", "VmHWM")))
    return {name.rstrip(":"): int(kilobytes) * 1024 for name, kilobytes, _ in lines}
