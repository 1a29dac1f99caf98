"""Ranks average their parts of a vector and hear the others', however the numbers get from one to another."""

import resource
import time
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from tests.support.distributed import DistributedFailure, on_machines_of_their_own, run_distributed
from trainer import shared_vectors
from trainer.zero_parts import CollectiveParts, ExchangedParts, Parts, SharedParts, norm_of_parts, parts_of

WAYS: dict[str, type[Parts]] = {
    "read": SharedParts,
    "sent": ExchangedParts,
    "one has no room": ExchangedParts,
    "room is gone for one": ExchangedParts,
    "one has the name of another file": ExchangedParts,
    "collectives": CollectiveParts,
}


def of(way: str, *flats: torch.Tensor) -> list[Parts]:
    """Parts that are sent two elements at once, if any are. Collectives are those of GPUs, which gloo has, too."""
    if way == "collectives":
        return [CollectiveParts(flat, None) for flat in flats]
    if way == "sent":
        on_machines_of_their_own()
    if torch.distributed.get_rank() == torch.distributed.get_world_size() - 1:
        if way == "one has no room":
            needed = 2 * sum(flat.nbytes for flat in flats) * torch.distributed.get_world_size()
            shared_vectors._room = lambda: needed - 1
        if way == "one has the name of another file":
            shared = shared_vectors._shared
            shared_vectors._shared = lambda flat: ((shared(flat) or ("", ""))[0], "another")
        if way == "room is gone for one":
            with largest_file(0):
                return parts_of(flats, None, elements=2)
    return parts_of(flats, None, elements=2)


@contextmanager
def largest_file(size: int) -> Generator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextmanager
def slow(method: str, seconds: float) -> Generator[None]:
    """A method of tensors takes so long."""
    inner = getattr(torch.Tensor, method)

    def slowed(*given: Any, **named: Any) -> Any:
        time.sleep(seconds)
        return inner(*given, **named)

    setattr(torch.Tensor, method, slowed)
    try:
        yield
    finally:
        setattr(torch.Tensor, method, inner)


def stepped(rank: int, world_size: int, way: str) -> list[tuple[str, list[float], list[float], float]]:
    """For some steps: how parts move; a rank's own averaged gradients; the weights that all have made of theirs; the norm of all gradients.

    In each step another rank comes last everywhere: to write and to read. What it is not to see is NaN.
    """
    gradient, weight = torch.empty(5 * world_size), torch.empty(5 * world_size)
    (gradients, weights), view = of(way, gradient, weight), weight[:]
    found: list[tuple[str, list[float], list[float], float]] = []
    for step in range(3):
        late_s = 0.05 if rank == step % world_size else 0.0
        time.sleep(late_s)
        gradient.copy_(torch.arange(5 * world_size) * (rank + 1) * (step + 1))
        with slow("add_", late_s):
            gradients.average_own()
        own = gradients.own.clone()
        norm = float(norm_of_parts([own], None)) if step == 1 else 0.0
        gradient.fill_(torch.nan)
        time.sleep(late_s)
        weights.own.copy_(own)
        with slow("copy_", late_s):
            weights.gather()
        found.append((type(gradients).__name__, own.tolist(), view.tolist(), norm))
    return found


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("world_size", [1, 2, 3, pytest.param(5, marks=pytest.mark.full)])
def test_each_rank_averages_its_part_and_hears_the_others(world_size: int, way: str) -> None:
    kind = WAYS[way] if world_size > 1 or way == "collectives" else Parts
    for rank, steps in enumerate(run_distributed(stepped, world_size, (way,), timeout_s=60)):
        for step, (name, own, gathered, norm) in enumerate(steps):
            mean = torch.arange(5 * world_size, dtype=torch.float32) * (world_size + 1) / 2 * (step + 1)
            assert name == kind.__name__
            assert own == mean.view(world_size, -1)[rank].tolist()
            assert gathered == mean.tolist()
            assert norm == pytest.approx(float(mean.norm()) if step == 1 else 0.0, rel=1e-6)


def left_alone(rank: int, world_size: int, way: str) -> None:
    """Rank 0 waits for one that does not come."""
    [parts] = of(way, torch.ones(world_size << 20))
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
