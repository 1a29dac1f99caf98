"""Child's side of `data_scale`: one rank of many opens a corpus and makes the first micro-batches of its share of a step."""

import resource
import time
from pathlib import Path
from typing import Any

from benchmarks.children import Measurement

BATCH = 64


def rank(folder: str, rank: int, world_size: int, lanes_per_rank: int, share: float, sequence_length: int) -> Measurement:
    """Seconds to open, seconds to the first micro-batch and to the whole share of a step, bytes read and memory, at `share` of an epoch."""
    from data_pipeline.config import BatchConfig, ObjectiveConfig
    from data_pipeline.index import CorpusIndex
    from data_pipeline.order import micro_batches_of_step, rank_micro_batches
    from data_pipeline.storage import Location
    from data_pipeline.stream import MicroBatchStream

    num_lanes = world_size * lanes_per_rank
    before = _memory()
    started_at = time.perf_counter()
    index = CorpusIndex.open(Location.at(folder))
    opened_at, opened = time.perf_counter(), _bytes_read()
    step = int(index.num_samples("train", sequence_length) * share) // (BATCH * num_lanes)
    phases = BatchConfig(global_batch_size=BATCH * num_lanes, micro_batch_size=BATCH, sequence_length=sequence_length).phases_until(step + 1)
    stream = MicroBatchStream(index, ObjectiveConfig(), phases, seed=0, packing="unpadded")
    numbers = micro_batches_of_step(phases, step)
    mine = [numbers[position] for position in rank_micro_batches(num_lanes, rank, world_size)]
    _ = stream[mine[0]]
    first_at, first = time.perf_counter(), _bytes_read()
    for number in mine[1:]:
        _ = stream[number]
    done_at, done = time.perf_counter(), _bytes_read()
    after = _memory()
    return {
        "open_s": opened_at - started_at,
        "position_s": first_at - opened_at,
        "step_s": done_at - first_at,
        "first_bytes": first - opened,
        "step_bytes": done - opened,
        "private_bytes": after["private"] - before["private"],
        "mapped_bytes": after["shared"] - before["shared"],
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "num_samples": index.num_samples("train", sequence_length),
    }


def _bytes_read() -> int:
    """Bytes this process asked the system for; what it maps does not count."""
    for line in Path("/proc/self/io").read_text().splitlines():
        if line.startswith("rchar:"):
            return int(line.split()[1])
    raise RuntimeError("/proc/self/io has no rchar")


def _memory() -> dict[str, int]:
    """Private memory, and pages of files that all ranks of a node share."""
    found: dict[str, Any] = {"private": 0, "shared": 0}
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        name, _, value = line.partition(":")
        if name in {"Private_Dirty", "Anonymous", "Rss"}:
            found[name] = int(value.split()[0]) * 1024
    return {"private": found["Anonymous"], "shared": found["Rss"] - found["Anonymous"]}
