"""`zero.bucket_elements` bounds what CPUs reduce at once, at every stage, and changes nothing else; nor does how gradients lie at stage 1 in fp32."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.test_elastic import values_of
from tests.distributed.test_offload import step_of
from tests.support.batches import small_config, write_tokenizer
from tests.support.checkpoints import build_engine, train_step, write_engine
from tests.support.distributed import on_machines_of_their_own, run_distributed
from trainer import zero_reduce
from trainer.zero_buckets import FlatGradients

CASES = [(0, "fp32"), (0, "bf16"), (1, "fp32"), (1, "bf16"), (2, "bf16")]
LARGEST = 97 * 32
"""Elements of the word embeddings."""
SMALL = 3000


def reduced(rank: int, world_size: int, tokenizer: str) -> list[dict[int, tuple[list[float], int]]]:
    """By case and size of a bucket: gradient norms, and the most elements of gradients that were reduced or sent at once."""
    on_machines_of_their_own()
    sizes = list[int]()
    for call in ("all_reduce", "isend"):
        _count(call, sizes)
    found: list[dict[int, tuple[list[float], int]]] = []
    for stage, precision in CASES:
        found.append({})
        for elements in (SMALL, 50_000_000):
            engine = build_engine(small_config(zero={"stage": stage, "bucket_elements": elements}, precision=precision), tokenizer)
            sizes.clear()
            norms = [train_step(engine, rank, world_size, step)[1] for step in range(2)]
            found[-1][elements] = (norms, max(sizes))
    return found


def _count(call: str, sizes: list[int]) -> None:
    """Make a function of torch.distributed note how many numbers it is given, if they are of fp32 as gradients are."""
    inner = getattr(torch.distributed, call)

    def counted(tensor: torch.Tensor, *arguments: Any, **named: Any) -> Any:
        if tensor.dtype == torch.float32:
            sizes.append(tensor.numel())
        return inner(tensor, *arguments, **named)

    setattr(torch.distributed, call, counted)


def test_no_more_than_a_bucket_is_reduced_at_once(tmp_path: Path) -> None:
    write_tokenizer(str(tmp_path))
    for case, found in zip(CASES, run_distributed(reduced, 2, (str(tmp_path),), timeout_s=60)[0], strict=True):
        (norms, small), (expected, large) = found.values()
        assert norms == pytest.approx(expected, rel=1e-6), case
        assert small <= LARGEST + SMALL < large, case
        assert case[0] != 1 or small == SMALL, case


WAYS: dict[str, dict[str, Any]] = {
    "flat": {},
    "sent in buckets": {"bucket_elements": SMALL},
    "DeepSpeed's": {"deepspeed": {"zero_optimization": {"contiguous_gradients": True}}},
}


def each_way(rank: int, world_size: int, tokenizer: str, root: str) -> dict[str, list[float]]:
    """Norms of steps after one whose gradients are dropped; the weights and moments that they lead to are saved below `root`."""
    found: dict[str, list[float]] = {}
    for name, zero in WAYS.items():
        if name == "sent in buckets":
            on_machines_of_their_own()
        engine = build_engine(small_config(zero={"stage": 1} | zero), tokenizer)
        assert isinstance(getattr(engine._deepspeed.optimizer.reduce_gradients, "__self__", None), FlatGradients) == (name != "DeepSpeed's")
        step_of(engine, rank, world_size, 99, dropped=True)
        found[name] = [step_of(engine, rank, world_size, step).grad_norm for step in range(3)]
        write_engine(engine, Path(root) / name)
    return found


@pytest.mark.parametrize("world_size", [2, pytest.param(3, marks=pytest.mark.full), pytest.param(1, marks=pytest.mark.full)])
def test_gradients_that_lie_flat_are_those_of_deepspeed(tmp_path: Path, world_size: int) -> None:
    """To the bit, on two ranks: on more the order of a sum may depend on its place in a bucket."""
    write_tokenizer(str(tmp_path / "tokenizer"))
    tolerance = 0.0 if world_size < 3 else 1e-6
    for norms in run_distributed(each_way, world_size, (str(tmp_path / "tokenizer"), str(tmp_path)), timeout_s=60):
        for name in WAYS:
            assert norms[name] == pytest.approx(norms["DeepSpeed's"], rel=tolerance), name
    expected = values_of(tmp_path / "DeepSpeed's")
    for name in WAYS:
        for key, value in values_of(tmp_path / name).items():
            torch.testing.assert_close(value, expected[key], rtol=tolerance, atol=tolerance, msg=f"{name}: {key}")


def summed(rank: int, world_size: int, tokenizer: str, root: str, clip_norm: float) -> dict[str, list[float]]:
    """As `each_way`, at stage 1 in bf16, with our vectors and all by DeepSpeed."""
    found: dict[str, list[float]] = {}
    for name in ("read", "sent", "DeepSpeed's"):
        if name == "sent":
            on_machines_of_their_own()
        if name == "DeepSpeed's":
            zero_reduce.cut_into_buckets = lambda engine: None
        engine = build_engine(small_config(zero={"stage": 1}, precision="bf16", optimizer={"clip_norm": clip_norm}), tokenizer)
        optimizer = engine._deepspeed.optimizer
        assert bool(optimizer._grad_acc_hooks) == (name == "DeepSpeed's")
        assert optimizer.fp32_groups_gradients_flat[0].is_shared() == optimizer.bf16_groups_flat[0].is_shared() == (name == "read" and world_size > 1)
        step_of(engine, rank, world_size, 99, dropped=True)
        found[name] = [step_of(engine, rank, world_size, step).grad_norm for step in range(3)]
        write_engine(engine, Path(root) / name)
    return found


@pytest.mark.parametrize(
    ("world_size", "clip_norm"), [(2, 1e9), (2, 0.01), pytest.param(1, 1e9, marks=pytest.mark.full), pytest.param(3, 0.01, marks=pytest.mark.full)]
)
def test_gradients_that_are_added_up_and_reduced_in_place_are_those_of_deepspeed(tmp_path: Path, world_size: int, clip_norm: float) -> None:
    """Over steps of two micro-batches. Weights and moments to the bit where neither a norm decides over them nor the order of a sum."""
    write_tokenizer(str(tmp_path / "tokenizer"))
    for norms in run_distributed(summed, world_size, (str(tmp_path / "tokenizer"), str(tmp_path), clip_norm), timeout_s=60):
        assert norms["read"] == norms["sent"] == pytest.approx(norms["DeepSpeed's"], rel=1e-6 if clip_norm > 1 else 1e-3)
        assert clip_norm > 1 or min(norms["read"]) > 10 * clip_norm, "all are clipped"
    tolerance = 0.0 if clip_norm > 1 and world_size < 3 else 1e-3
    read, sent, expected = (values_of(tmp_path / name) for name in ("read", "sent", "DeepSpeed's"))
    for key, value in read.items():
        torch.testing.assert_close(value, sent[key], rtol=0, atol=0, msg=key)
        torch.testing.assert_close(value, expected[key], rtol=tolerance, atol=tolerance / 100, msg=key)
