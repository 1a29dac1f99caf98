"""Batches of a labelled task: tokenised once, rows of near-equal length together, the same for every number of ranks (pure).

Shapes: B rows, T tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data_pipeline.hashing import mix64
from trainer.tasks import Rows

WINDOW_BATCHES = 8
"""Rows are sorted by length among this many batches: little padding, and a batch is still a fair sample."""
_ROUND_TO_TOKENS = 8


@dataclass(frozen=True)
class EncodedRows:
    """Rows as token ids."""

    input_ids: tuple[tuple[int, ...], ...]
    token_type_ids: tuple[tuple[int, ...], ...] | None
    """None where the model takes none."""
    labels: tuple[int, ...]
    pad_id: int
    max_length: int
    """No row is longer."""

    def __len__(self) -> int:
        return len(self.labels)

    def lengths_of(self, rows: Sequence[int]) -> list[int]:
        """Tokens of each of `rows`."""
        return [len(self.input_ids[row]) for row in rows]


def encode_rows(tokenizer: Any, rows: Rows, max_length: int) -> EncodedRows:
    """Tokenise with a Hugging Face tokenizer; a row longer than `max_length` tokens is cut, the longer text of a pair first."""
    pairs = None if rows.text_pairs is None else list(rows.text_pairs)
    encoded = tokenizer(list(rows.texts), pairs, truncation=True, max_length=max_length)
    types = encoded.get("token_type_ids")
    return EncodedRows(
        input_ids=tuple(tuple(ids) for ids in encoded["input_ids"]),
        token_type_ids=None if types is None else tuple(tuple(row) for row in types),
        labels=rows.labels,
        pad_id=int(tokenizer.pad_token_id),
        max_length=max_length,
    )


def epoch_batches(lengths: Sequence[int], batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """The row numbers of each batch of an epoch: every row once, all batches full but one, rows of a batch ascending in length."""
    order = np.argsort(mix64(seed, epoch, np.arange(len(lengths))), kind="stable").tolist()
    window = batch_size * WINDOW_BATCHES
    batches: list[list[int]] = []
    for first in range(0, len(order), window):
        near = sorted(order[first : first + window], key=lambda row: lengths[row])
        batches += [near[start : start + batch_size] for start in range(0, len(near), batch_size)]
    shuffled = np.argsort(mix64(seed, epoch, len(lengths), np.arange(len(batches))), kind="stable")
    return [batches[number] for number in shuffled.tolist()]


def padded_length(lengths: Sequence[int], limit: int) -> int:
    """T for rows of these lengths: the longest, rounded up for the kernels, at most `limit`."""
    return min(limit, -(-max(lengths) // _ROUND_TO_TOKENS) * _ROUND_TO_TOKENS)


def collate(encoded: EncodedRows, rows: Sequence[int], num_tokens: int) -> dict[str, Tensor]:
    """Model inputs of `rows`, each (B, T), padded to `num_tokens` = T and under their transformers names."""
    inputs = {
        "input_ids": _padded(encoded.input_ids, rows, num_tokens, encoded.pad_id),
        "attention_mask": _padded([[1] * length for length in encoded.lengths_of(rows)], range(len(rows)), num_tokens, 0),
    }
    if encoded.token_type_ids is not None:
        inputs["token_type_ids"] = _padded(encoded.token_type_ids, rows, num_tokens, 0)
    return inputs


def _padded(values: Sequence[Sequence[int]], rows: Sequence[int], num_tokens: int, padding: int) -> Tensor:
    return torch.tensor([[*values[row], *[padding] * (num_tokens - len(values[row]))] for row in rows])
