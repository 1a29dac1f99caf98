"""What `benchmarks.gpu` measures, on the device that is there: steps, ZeRO-1 beside a plain loop, a profile. torch.distributed is initialised."""

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import cycle, islice
from statistics import median
from typing import Any

from benchmarks.contestants.training import OurTraining
from benchmarks.contestants.training_batches import micro_batches
from benchmarks.contestants.training_peers import PlainLoop
from benchmarks.training import Network, Shape

_WARM_UP_STEPS = 3
_TOP = 10


@dataclass(frozen=True)
class Rate:
    """Of one contestant: real tokens by second of wall clock, useful FLOPs by second, and what a bare matrix product reaches here."""

    tokens_per_s: float
    flops_per_s: float
    matmul_flops_per_s: float
    samples: int
    """Of a micro-batch: as many as fit into memory."""


def steps(network: Network, shape: Shape, precision: str, seconds: float) -> Rate:
    """Optimizer steps of our trainer; where memory is short, with half as many samples, and so on."""
    import torch

    while True:
        try:
            return _rate(network, shape, precision, seconds)
        except torch.OutOfMemoryError:
            if shape.samples == 1:
                raise
            shape = replace(shape, samples=shape.samples // 2)
        free()


def _rate(network: Network, shape: Shape, precision: str, seconds: float) -> Rate:
    from trainer.flops import StepFlops
    from trainer.peaks import measured_peak
    from trainer.totals import StepCounts

    training = OurTraining.build(network, shape, precision=precision, dropout=0.1)
    batches = [[batch] for batch in micro_batches(shape, network)]
    tokens_per_s, steps_per_s = rate(training.step, batches, seconds)
    counts = [StepCounts.of(step, 0, stop=False, failed=False) for step in batches]
    useful = StepFlops.of(training.engine.model)
    flops = sum(useful.of_step(each) for each in counts) / len(counts)
    peak = measured_peak(training.engine.device, training.engine.dtype)
    return Rate(tokens_per_s, flops * steps_per_s, peak, shape.samples)


def zero_and_plain(network: Network, shape: Shape, accumulation: int, precision: str, seconds: float, rounds: int) -> dict[str, list[float]]:
    """Tokens a second of our engine under ZeRO-1 and of a plain torch loop, by turns, with `accumulation` micro-batches a step."""
    batches = list(islice(cycle(micro_batches(shape, network)), accumulation))
    found: dict[str, list[float]] = {"ours": [], "plain": []}
    training = OurTraining.build(network, shape, precision=precision, dropout=0.1)
    loop = PlainLoop(network, shape, precision=precision, dropout=0.1)
    for _ in range(rounds):
        found["ours"].append(rate(training.step, [batches], seconds)[0])
        found["plain"].append(rate(loop.step, [batches], seconds)[0])
    return found


def rate(step: Callable[[Sequence[Any]], Any], batches: Sequence[Sequence[Any]], seconds: float) -> tuple[float, float]:
    """Real tokens and steps by second of wall clock, after some steps that do not count."""
    turns = cycle(batches)
    for _ in range(_WARM_UP_STEPS):
        step(next(turns))
    synchronize()
    tokens, taken, started_at = 0, 0, time.perf_counter()
    while not taken or time.perf_counter() - started_at < seconds:
        chosen = next(turns)
        step(chosen)
        tokens, taken = tokens + sum(batch.num_tokens for batch in chosen), taken + 1
    synchronize()
    elapsed_s = time.perf_counter() - started_at
    return tokens / elapsed_s, taken / elapsed_s


def profile(network: Network, shape: Shape, precision: str, num_steps: int) -> list[tuple[str, float]]:
    """The ten largest costs of a step by their own time on the device: name, share of all."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiled

    from trainer.costs import costs_of

    training = OurTraining.build(network, shape, precision=precision, dropout=0.1)
    turns = cycle([batch] for batch in micro_batches(shape, network))
    for _ in range(_WARM_UP_STEPS):
        training.step(next(turns))
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if is_cuda() else [])]
    with profiled(activities=activities) as trace:
        for _ in range(num_steps):
            training.step(next(turns))
        synchronize()
    return [(cost.name, cost.share) for cost in costs_of(trace.key_averages(), on_gpu=is_cuda())[:_TOP]]


def milliseconds(run: Callable[[], Any], repeats: int) -> float:
    """Median of a call, after two that do not count."""
    found: list[float] = []
    for number in range(repeats + 2):
        synchronize()
        started_at = time.perf_counter()
        run()
        synchronize()
        found += [1e3 * (time.perf_counter() - started_at)] if number > 1 else []
    return median(found)


def is_cuda() -> bool:
    """Whether there is a GPU."""
    import torch

    return torch.cuda.is_available()


def synchronize() -> None:
    """Wait for the device."""
    import torch

    if is_cuda():
        torch.cuda.synchronize()


def free() -> None:
    """Give back the memory of what nothing refers to any more: to be called by who called what held it."""
    import torch

    gc.collect()
    if is_cuda():
        torch.cuda.empty_cache()
