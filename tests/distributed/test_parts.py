"""Ranks average their parts of a vector and hear the others', however the numbers get from one to another."""

import resource
import time

import pytest
import torch

from tests.support.distributed import DistributedFailure, on_machines_of_their_own, run_distributed
from trainer.zero_parts import CollectiveParts, ExchangedParts, Parts, SharedParts, norm_of_parts, parts_of

WAYS: dict[str, type[Parts]] = {
    "read": SharedParts,
    "sent": ExchangedParts,
    "one has no room": ExchangedParts,
    "collectives": CollectiveParts,
}


def of(way: str, rank: int, flat: torch.Tensor) -> Parts:
    """Parts that are sent two elements at once, if any are. Collectives are those of GPUs, which gloo has, too."""
    if way == "collectives":
        return CollectiveParts(flat, None)
    if way == "sent":
        on_machines_of_their_own()
    if way == "one has no room" and rank == torch.distributed.get_world_size() - 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
    parts = parts_of(flat, None, elements=2)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    return parts


def moved(rank: int, world_size: int, way: str) -> list[tuple[str, list[float], list[float], float]]:
    """For some steps: how parts move; what a rank has of its own, averaged; all that it has then; the norm of all."""
    flat = torch.empty(5 * world_size)
    parts, view = of(way, rank, flat), flat[:]
    found: list[tuple[str, list[float], list[float], float]] = []
    for step in range(3):
        flat.copy_(torch.arange(5 * world_size) * (rank + 1) * (step + 1))
        time.sleep(0.02 * ((rank + step) % world_size))  # each is once ahead of the others
        parts.average_own()
        own = parts.own.tolist()
        parts.gather()
        found.append((type(parts).__name__, own, view.tolist(), float(norm_of_parts([parts.own], None))))
    return found


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("world_size", [1, 2, 3, pytest.param(5, marks=pytest.mark.full)])
def test_each_rank_averages_its_part_and_hears_the_others(world_size: int, way: str) -> None:
    kind = WAYS[way] if world_size > 1 or way == "collectives" else Parts
    for rank, steps in enumerate(run_distributed(moved, world_size, (way,), timeout_s=60)):
        for step, (name, own, gathered, norm) in enumerate(steps):
            mean = torch.arange(5 * world_size, dtype=torch.float32) * (world_size + 1) / 2 * (step + 1)
            assert name == kind.__name__
            assert own == mean.view(world_size, -1)[rank].tolist()
            assert gathered == mean.tolist()
            assert norm == pytest.approx(float(mean.norm()), rel=1e-6)


def left_alone(rank: int, world_size: int, way: str) -> None:
    """Rank 0 waits for one that does not come."""
    parts = of(way, rank, torch.ones(world_size << 20))
    if rank == 0:
        parts.average_own()
    else:
        time.sleep(4)


@pytest.mark.parametrize("way", ["read", "sent"])
def test_no_rank_waits_for_another_for_ever(way: str) -> None:
    with pytest.raises(DistributedFailure) as failure:
        run_distributed(left_alone, 2, (way,), timeout_s=60, group_timeout_s=1)
    error = failure.value.errors[0]
    assert isinstance(error, RuntimeError)
    assert "Timed out" in str(error)
    assert "gloo" in str(error), "which counts as the loss of a peer"
