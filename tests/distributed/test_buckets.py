"""`zero.bucket_elements` bounds what CPUs reduce at once, at every stage, and changes nothing else; nor does how gradients lie at stage 1 in fp32."""

import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.test_elastic import values_of
from tests.distributed.test_offload import step_of
from tests.support.batches import small_config, write_tokenizer
from tests.support.checkpoints import build_engine, train_step, write_engine
from tests.support.distributed import DistributedFailure, run_distributed
from trainer import zero_buckets, zero_reduce
from trainer.zero_buckets import FlatGradients, average_own_part, gather_parts, norm_of_parts

CASES = [(0, "fp32"), (0, "bf16"), (1, "fp32"), (1, "bf16"), (2, "bf16")]
LARGEST = 97 * 32
"""Elements of the word embeddings."""
SMALL = 3000


def reduced(rank: int, world_size: int, tokenizer: str) -> list[dict[int, tuple[list[float], int]]]:
    """By case and size of a bucket: gradient norms, and the most elements of gradients that were reduced or sent at once."""
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
    "in buckets": {"bucket_elements": SMALL},
    "DeepSpeed's": {"deepspeed": {"zero_optimization": {"contiguous_gradients": True}}},
}


def each_way(rank: int, world_size: int, tokenizer: str, root: str) -> dict[str, list[float]]:
    """Norms of steps after one whose gradients are dropped; the weights and moments that they lead to are saved below `root`."""
    found: dict[str, list[float]] = {}
    for name, zero in WAYS.items():
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
    for name in ("in place", "DeepSpeed's"):
        if name == "DeepSpeed's":
            zero_reduce.cut_into_buckets = lambda engine: None
        engine = build_engine(small_config(zero={"stage": 1}, precision="bf16", optimizer={"clip_norm": clip_norm}), tokenizer)
        assert bool(engine._deepspeed.optimizer._grad_acc_hooks) == (name == "DeepSpeed's")
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
        assert norms["in place"] == pytest.approx(norms["DeepSpeed's"], rel=1e-6 if clip_norm > 1 else 1e-3)
        assert clip_norm > 1 or min(norms["in place"]) > 10 * clip_norm, "all are clipped"
    tolerance = 0.0 if clip_norm > 1 and world_size < 3 else 1e-3
    expected = values_of(tmp_path / "DeepSpeed's")
    for key, value in values_of(tmp_path / "in place").items():
        torch.testing.assert_close(value, expected[key], rtol=tolerance, atol=tolerance / 100, msg=key)


def exchanged(rank: int, world_size: int, by_collectives: bool) -> tuple[list[float], list[float], float]:
    """A vector of which each rank averages its part in pieces of two; the parts that come together then; their norm. As on CPUs, or by the calls
    of GPUs, which gloo has, too."""
    if by_collectives:
        zero_buckets.has_gloo = lambda tensor: False
    flat = torch.arange(5 * world_size, dtype=torch.float32) * (rank + 1)
    average_own_part(flat, None, elements=2)
    own = flat.view(world_size, -1)[rank].tolist()
    gather_parts(flat, None)
    return own, flat.tolist(), float(norm_of_parts([flat.view(world_size, -1)[rank]], None))


@pytest.mark.parametrize("by_collectives", [False, True])
@pytest.mark.parametrize("world_size", [1, 2, 3, pytest.param(5, marks=pytest.mark.full)])
def test_each_rank_averages_its_part_and_hears_the_others(world_size: int, by_collectives: bool) -> None:
    mean = torch.arange(5 * world_size, dtype=torch.float32) * (world_size + 1) / 2
    for rank, (own, gathered, norm) in enumerate(run_distributed(exchanged, world_size, (by_collectives,), timeout_s=60)):
        assert own == mean.view(world_size, -1)[rank].tolist()
        assert gathered == mean.tolist()
        assert norm == pytest.approx(float(mean.norm()), rel=1e-6)


def left_alone(rank: int, world_size: int) -> None:
    """Rank 0 exchanges with one that does not come."""
    if rank == 0:
        average_own_part(torch.ones(world_size << 20), None, elements=1 << 20)
    else:
        time.sleep(4)


def test_no_rank_waits_for_another_for_ever() -> None:
    with pytest.raises(DistributedFailure) as failure:
        run_distributed(left_alone, 2, timeout_s=60, group_timeout_s=1)
    error = failure.value.errors[0]
    assert isinstance(error, RuntimeError)
    assert "Timed out" in str(error)
    assert "gloo" in str(error), "which counts as the loss of a peer"
