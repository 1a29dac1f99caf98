"""Damaged blocks against the budget of a run."""

import pytest

from data_pipeline.errors import DataCorruptError
from data_pipeline.micro_batch import SkippedBlock
from trainer.skips import with_skipped
from trainer.state import TrainState


def _block(number: int) -> SkippedBlock:
    return SkippedBlock("corpus", "train-000000.tar", number, 40, f"block {number} is damaged")


def test_skipped_blocks_are_remembered_up_to_the_budget() -> None:
    state = with_skipped(TrainState(step=3), [_block(1), _block(5)], budget=3)
    assert state.skipped_blocks == ("corpus/train-000000.tar:1", "corpus/train-000000.tar:5")
    assert TrainState.from_json(state.to_json()) == state
    with pytest.raises(DataCorruptError, match=r"4 damaged blocks, data\.skip_budget is 3; the last: block 8 is damaged"):
        with_skipped(state, [_block(7), _block(8)], budget=3)


def test_a_budget_that_was_lowered_ends_the_run_at_the_next_block() -> None:
    state = with_skipped(TrainState(step=3), [_block(1), _block(5)], budget=3)
    assert with_skipped(state, [], budget=1) == state
    with pytest.raises(DataCorruptError, match=r"3 damaged blocks, data\.skip_budget is 1; the last: block 7 is damaged"):
        with_skipped(state, [_block(7)], budget=1)


def test_a_state_of_an_older_release_has_skipped_none() -> None:
    value = TrainState(step=3).to_json()
    del value["skipped_blocks"]
    assert TrainState.from_json(value) == TrainState(step=3)
