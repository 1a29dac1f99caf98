"""Damaged blocks that a run leaves out: agreed between the ranks, counted against the budget, remembered in the state."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch.distributed as dist

from data_pipeline.errors import DataCorruptError
from trainer.state import TrainState
from trainer.totals import StepCounts

if TYPE_CHECKING:
    from data_pipeline.micro_batch import MicroBatch, SkippedBlock


def newly_skipped(batches: "Sequence[MicroBatch]", counts: StepCounts, state: TrainState) -> "list[SkippedBlock]":
    """Blocks that any rank found damaged in its micro-batches and that `state` does not know yet, the same on every rank.

    Collective where `counts`, of all ranks, say that there are any.
    """
    if not counts.skipped_blocks:
        return []
    found: list[list[SkippedBlock]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(found, [block for batch in batches for block in batch.skipped])
    by_name = {block.name: block for part in found for block in part}
    return sorted(block for name, block in by_name.items() if name not in state.skipped_blocks)


def with_skipped(state: TrainState, blocks: "Sequence[SkippedBlock]", budget: int) -> TrainState:
    """The state that remembers `blocks`; pure.

    Raises:
        DataCorruptError: with them there are more than the run may skip.
    """
    after = replace(state, skipped_blocks=(*state.skipped_blocks, *(block.name for block in blocks)))
    if blocks and len(after.skipped_blocks) > budget:
        raise DataCorruptError(
            f"{len(after.skipped_blocks)} damaged blocks, data.skip_budget is {budget}; the last: {blocks[-1].cause}",
            "`maskwright verify CORPUS` lists all damage. Restore the corpus, or allow more with --set data.skip_budget=N.",
        )
    return after
