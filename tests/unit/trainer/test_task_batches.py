"""Batches of a task: every row once an epoch, full but one, of near-equal length; padding that the model does not see."""

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.tokenizer import load_tokenizer
from tests.support.tiny_task import write_model
from trainer.task_batches import collate, encode_rows, epoch_batches, padded_length
from trainer.tasks import Rows


@given(st.lists(st.integers(2, 128), min_size=1, max_size=400), st.integers(1, 48), st.integers(0, 5), st.integers(0, 5))
def test_an_epoch_has_every_row_once_and_one_short_batch_at_most(lengths: list[int], batch_size: int, seed: int, epoch: int) -> None:
    batches = epoch_batches(lengths, batch_size, seed, epoch)
    assert sorted(row for batch in batches for row in batch) == list(range(len(lengths)))
    assert len(batches) == -(-len(lengths) // batch_size)
    assert sum(len(batch) < batch_size for batch in batches) <= 1
    assert all(lengths[a] <= lengths[b] for batch in batches for a, b in pairwise(batch))


def test_epochs_and_seeds_differ_and_padding_is_small() -> None:
    lengths = [10 + (row * 37) % 90 for row in range(640)]
    batches = epoch_batches(lengths, 32, 0, 0)
    assert epoch_batches(lengths, 32, 0, 0) == batches
    assert epoch_batches(lengths, 32, 0, 1) != batches
    assert epoch_batches(lengths, 32, 1, 0) != batches
    padded = sum(len(batch) * max(lengths[row] for row in batch) for batch in batches)
    assert padded < 1.2 * sum(lengths)  # without sorting: 1.8
    assert max(lengths[row] for row in batches[0]) != max(lengths[row] for row in batches[1])  # batches themselves are shuffled


@pytest.mark.parametrize(("lengths", "limit", "expected"), [([3], 128, 8), ([8, 5], 128, 8), ([9], 128, 16), ([30], 30, 30)])
def test_padded_length(lengths: list[int], limit: int, expected: int) -> None:
    assert padded_length(lengths, limit) == expected


def test_pairs_are_two_segments_long_rows_are_cut_and_padding_is_masked(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(write_model(tmp_path / "model")))
    encoded = encode_rows(tokenizer, Rows(("boil salt", "wind"), ("mast " * 40, "deck"), (1, 0)), max_length=16)
    assert encoded.lengths_of([0, 1]) == [16, 5]
    inputs = collate(encoded, [1, 0], 16)
    assert inputs["input_ids"].shape == (2, 16)
    assert inputs["attention_mask"].sum(dim=1).tolist() == [5, 16]
    assert inputs["token_type_ids"][0].tolist() == [0, 0, 0, 1, 1, *[0] * 11]
    assert inputs["input_ids"][0, 5:].eq(tokenizer.pad_token_id).all()
    assert torch.equal(inputs["input_ids"][1], torch.tensor(encoded.input_ids[0]))
