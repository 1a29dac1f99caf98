"""`zero.bucket_elements` bounds what is reduced at once, at every stage, and changes nothing else."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.batches import small_config, write_tokenizer
from tests.support.checkpoints import build_engine, train_step
from tests.support.distributed import run_distributed

CASES = [(0, "fp32"), (0, "bf16"), (1, "fp32"), (1, "bf16"), (2, "bf16")]
LARGEST = 97 * 32
"""Elements of the word embeddings."""
SMALL = 3000


def reduced(rank: int, world_size: int, tokenizer: str) -> list[dict[int, tuple[list[float], int]]]:
    """By case and size of a bucket: gradient norms, and elements of the largest all-reduce."""
    all_reduce, sizes = torch.distributed.all_reduce, list[int]()

    def counted(tensor: torch.Tensor, *arguments: Any, **named: Any) -> Any:
        sizes.append(tensor.numel())
        return all_reduce(tensor, *arguments, **named)

    torch.distributed.all_reduce = counted
    found: list[dict[int, tuple[list[float], int]]] = []
    for stage, precision in CASES:
        found.append({})
        for elements in (SMALL, 50_000_000):
            engine = build_engine(small_config(zero={"stage": stage, "bucket_elements": elements}, precision=precision), tokenizer)
            sizes.clear()
            norms = [train_step(engine, rank, world_size, step)[1] for step in range(2)]
            found[-1][elements] = (norms, max(sizes))
    return found


def test_no_more_than_a_bucket_is_reduced_at_once(tmp_path: Path) -> None:
    write_tokenizer(str(tmp_path))
    for case, found in zip(CASES, run_distributed(reduced, 2, (str(tmp_path),), timeout_s=60)[0], strict=True):
        (norms, small), (expected, large) = found.values()
        assert norms == pytest.approx(expected, rel=1e-6), case
        assert small <= LARGEST + SMALL < large, case
        assert case != (1, "bf16") or small == SMALL
