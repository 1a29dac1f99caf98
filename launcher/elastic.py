"""How many ranks an attempt gets: the fewest that make its steps as short as the live nodes allow (pure)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from data_pipeline.errors import ConfigError


@dataclass(frozen=True)
class Node:
    """A live node of a cluster: what it has, and what of it nobody uses now."""

    address: str
    num_cpus: float
    num_gpus: float
    free_cpus: float
    free_gpus: float
    id: str = ""
    """Ray's."""


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


@dataclass(frozen=True)
class Pace:
    """How an attempt gets on, as far as it was followed."""

    age_s: float = 0.0
    """Since its start."""
    first_step: int | None = None
    """The step that it began with; None during set-up."""
    step: int = 0
    """The step that its slowest rank is at."""
    start_up_s: float | None = None
    """From its start to the end of its first step: what an interruption costs. None before."""
    paced_from: int = 0
    """The step that it was at then."""

    def after(self, step: int | None, elapsed_s: float) -> "Pace":
        """The pace at a look that finds the attempt at `step` (None: in set-up), `elapsed_s` after the look before."""
        now = replace(self, age_s=self.age_s + elapsed_s)
        if step is None or step < self.step:
            return now
        if self.first_step is None:
            return replace(now, first_step=step, step=step)
        if self.start_up_s is None and step > self.first_step:
            return replace(now, step=step, start_up_s=now.age_s, paced_from=step)
        return replace(now, step=step)

    @property
    def num_steps(self) -> int:
        """Steps that it has made."""
        return 0 if self.first_step is None else self.step - self.first_step

    @property
    def worked_s(self) -> float:
        """Since the end of its first step."""
        return 0.0 if self.start_up_s is None else self.age_s - self.start_up_s

    @property
    def step_s(self) -> float | None:
        """Seconds from step to step, checkpoints and validation included; None before there is one to measure."""
        return self.worked_s / (self.step - self.paced_from) if self.start_up_s is not None and self.step > self.paced_from else None


def after_steps(work: Sequence[Work], num_steps: int) -> list[Work]:
    """What remains of the work when so many of its steps are done."""
    left: list[Work] = []
    for part in work:
        done = min(part.num_steps, num_steps)
        num_steps -= done
        if done < part.num_steps:
            left.append(replace(part, num_steps=part.num_steps - done))
    return left


def pays(current: int, other: int, work: Sequence[Work], pace: Pace) -> bool:
    """Whether more ranks are worth an interruption: on what remains they save more time than it takes until the next first step.

    Not before the attempt has worked for as long as its own start-up took: a node that comes and goes must not keep the run in start-ups.
    """
    if other <= current or not work or pace.step_s is None or pace.start_up_s is None or pace.worked_s < pace.start_up_s:
        return False
    round_s = pace.step_s / math.ceil(work[0].num_micro_batches / current)
    return round_s * (rounds(work, current) - rounds(work, other)) > pace.start_up_s


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
