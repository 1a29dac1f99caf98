"""How many ranks an attempt gets: the fewest that make its steps as short as the live nodes allow (pure)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from data_pipeline.errors import ConfigError


@dataclass(frozen=True)
class Node:
    """A live node of a cluster: what it has, and what of it nobody uses now."""

    address: str
    num_cpus: float
    num_gpus: float
    free_cpus: float
    free_gpus: float


@dataclass(frozen=True)
class Work:
    """Steps of one batch shape that remain to be done."""

    num_steps: int
    num_micro_batches: int
    """Micro-batches of a step (M)."""


def rounds(work: Sequence[Work], num_workers: int) -> int:
    """Micro-steps that each rank still has to make: a step of M micro-batches takes ⌈M/W⌉, the last of them partly empty (D5)."""
    return sum(part.num_steps * math.ceil(part.num_micro_batches / num_workers) for part in work)


def choose_size(num_places: int, minimum: int, maximum: int | None, work: Sequence[Work]) -> int | None:
    """The world size for what remains: as few rounds as `num_places` ranks allow, and no more ranks than these need.

    Five ranks for 8 micro-batches take the two rounds that four take. Never more ranks than a step has micro-batches, because
    some would never have work. None when there are fewer places than `minimum`.
    """
    if num_places < minimum:
        return None
    useful = max((part.num_micro_batches for part in work), default=minimum)
    most = max(minimum, min(num_places, useful, maximum or num_places))
    return min(range(minimum, most + 1), key=lambda size: (rounds(work, size), size))


def require_work(num_workers: int, num_micro_batches: int) -> None:
    """Refuse a number of ranks that a person asks for and no step can use.

    Raises:
        ConfigError: a step has fewer micro-batches.
    """
    if num_workers > num_micro_batches:
        raise ConfigError(
            f"num_workers {num_workers} exceeds the {num_micro_batches} micro-batches of a step, so some ranks would never have work",
            "Lower num_workers, or batch.micro_batch_size so that a step has more micro-batches.",
        )


def pays(current: int, other: int, work: Sequence[Work]) -> bool:
    """Whether more ranks are worth an interruption: only when the rounds become fewer."""
    return other > current and rounds(work, other) < rounds(work, current)


def count_places(nodes: Sequence[Node], threads: int, *, use_gpu: bool, free: bool) -> int:
    """Ranks that fit on the nodes, with what each has in all or (`free`) with what is unused."""
    return sum(_fit(node.free_cpus if free else node.num_cpus, node.free_gpus if free else node.num_gpus, threads, use_gpu) for node in nodes)


def _fit(cpus: float, gpus: float, threads: int, use_gpu: bool) -> int:
    by_cpu = math.floor(cpus / threads)
    return min(by_cpu, math.floor(gpus)) if use_gpu else by_cpu


def threads_per_worker(nodes: Sequence[Node], num_workers: int | None, *, use_gpu: bool) -> int:
    """CPUs divided by ranks, on the node where that is least: a rank per GPU, else `num_workers` spread evenly, else (None) one per node."""
    if use_gpu:
        shares = [node.num_cpus / node.num_gpus for node in nodes if node.num_gpus >= 1]
    else:
        with_cpus = [node.num_cpus for node in nodes if node.num_cpus >= 1]
        ranks_per_node = math.ceil(num_workers / len(with_cpus)) if num_workers and with_cpus else 1
        shares = [cpus / ranks_per_node for cpus in with_cpus]
    return max(1, math.floor(min(shares, default=1)))
