"""What does the model see at step S: global batches put together from the ranks' own streams, as the trainer would read them."""

import copy
from collections.abc import Iterator, Sequence
from typing import Any

from data_pipeline.config import Phase
from data_pipeline.micro_batch import MicroBatch, step_digest
from data_pipeline.order import micro_batches_of_step, rank_micro_batches
from data_pipeline.stream import MicroBatchStream


def inspect_steps(
    stream: MicroBatchStream, phases: tuple[Phase, ...], first_step: int, num_steps: int, world_size: int, rank: int | None
) -> Iterator[dict[str, Any]]:
    """One object per step: step, digest (16 hex digits), num_samples, num_tokens; with `rank`, of that rank's part.

    Every rank reads through a stream of its own, so equal digests at two world sizes are evidence, not a tautology.
    """
    ranks = range(world_size) if rank is None else [rank]
    streams = {each: copy.copy(stream) for each in ranks}  # a copy shares no window
    for step in range(first_step, first_step + num_steps):
        numbers = micro_batches_of_step(phases, step)
        parts = [part for each in ranks for part in _read_part(streams[each], numbers, each, world_size)]
        yield {
            "step": step,
            "digest": f"{step_digest((position, batch.digest) for position, batch in parts):016x}",
            "num_samples": sum(batch.num_samples for _, batch in parts),
            "num_tokens": sum(batch.num_tokens for _, batch in parts),
        }


def _read_part(stream: MicroBatchStream, numbers: Sequence[int], rank: int, world_size: int) -> list[tuple[int, MicroBatch]]:
    return [(position, stream[numbers[position]]) for position in rank_micro_batches(len(numbers), rank, world_size)]
