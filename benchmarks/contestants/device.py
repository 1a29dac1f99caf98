"""What `benchmarks.gpu` measures, on the device that is there: steps, ZeRO-1 beside a plain loop, a profile. torch.distributed is initialised."""

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import cycle, islice
from statistics import median
from typing import Any

from benchmarks.contestants.training import OurTraining
from benchmarks.contestants.training_batches import micro_batches
from benchmarks.contestants.training_peers import PlainLoop
from benchmarks.planned import Case
from benchmarks.training import TINY, Work

_WARM_UP_STEPS = 3
_TOP = 10


@dataclass(frozen=True)
class Rate:
    """Of one contestant: real tokens by second of wall clock, useful FLOPs by second, and what a bare matrix product reaches here."""

    tokens_per_s: float
    flops_per_s: float
    matmul_flops_per_s: float
    work: Work
    """What was done: with micro-batches that fit into memory."""


def steps(work: Work, precision: str, seconds: float) -> Rate:
    """Optimizer steps of our trainer; where memory is short, with half as many samples, and so on."""
    import torch

    while True:
        try:
            return _rate(work, precision, seconds)
        except torch.OutOfMemoryError:
            if work.shape.samples == 1:
                raise
            work = replace(work, shape=replace(work.shape, samples=work.shape.samples // 2))
        free()


def _rate(work: Work, precision: str, seconds: float) -> Rate:
    from trainer.flops import StepFlops
    from trainer.peaks import measured_peak
    from trainer.totals import StepCounts

    training, batches = _training(work, precision), _step(work)
    tokens_per_s, steps_per_s = rate(partial(training.step, following=batches), batches, seconds)
    flops = StepFlops.of(training.engine.model).of_step(StepCounts.of(batches, 0))
    peak = measured_peak(training.engine.device, training.engine.dtype)
    return Rate(tokens_per_s, flops * steps_per_s, peak, work)


def _training(work: Work, precision: str) -> OurTraining:
    return OurTraining.build(work.network, work.shape, precision=precision, dropout=work.dropout, compile=work.compiled)


def _step(work: Work) -> list[Any]:
    """The micro-batches of a step."""
    return list(islice(cycle(micro_batches(work.shape, work.network)), work.accumulation))


def zero_and_plain(work: Work, precision: str, seconds: float, rounds: int) -> dict[str, list[float]]:
    """Tokens a second of our engine under ZeRO-1 and of a plain torch loop, by turns."""
    found: dict[str, list[float]] = {"ours": [], "plain": []}
    training, batches = _training(work, precision), _step(work)
    loop = PlainLoop(work.network, work.shape, precision=precision, dropout=work.dropout)
    loop.model.kernels = training.engine.model.kernels
    for _ in range(rounds):
        found["ours"].append(rate(partial(training.step, following=batches), batches, seconds)[0])
        found["plain"].append(rate(loop.step, batches, seconds)[0])
    return found


def peak_bytes(case: Case) -> int:
    """Most that torch has allocated of a GPU's memory for a rank that is built and takes steps."""
    import torch

    _peak_bytes(replace(case, network=TINY, attention="eager"))  # takes the place of what DeepSpeed still holds of the engine before
    free()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    _peak_bytes(case)
    free()
    return torch.cuda.max_memory_allocated() - before


def _peak_bytes(case: Case) -> None:
    model = {"attention": case.attention, "activation_checkpointing": case.checkpointing}
    training = OurTraining.build(case.network, case.shape, precision=case.precision, dropout=case.dropout, stage=case.stage, **model)
    for batch in micro_batches(case.shape, case.network):
        training.step([batch])


def rate(step: Callable[[Sequence[Any]], Any], batches: Sequence[Any], seconds: float) -> tuple[float, float]:
    """Real tokens and steps by second of wall clock, after some steps that do not count."""
    for _ in range(_WARM_UP_STEPS):
        step(batches)
    synchronize()
    taken, started_at = 0, time.perf_counter()
    while not taken or time.perf_counter() - started_at < seconds:
        step(batches)
        taken += 1
    synchronize()
    steps_per_s = taken / (time.perf_counter() - started_at)
    return steps_per_s * sum(batch.num_tokens for batch in batches), steps_per_s


def profile(work: Work, precision: str, num_steps: int) -> list[tuple[str, float]]:
    """The ten largest costs of a step by their own time on the device: name, share of all."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiled

    from trainer.costs import costs_of

    training, batches = _training(work, precision), _step(work)
    for _ in range(_WARM_UP_STEPS):
        training.step(batches)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if is_cuda() else [])]
    with profiled(activities=activities) as trace:
        for _ in range(num_steps):
            training.step(batches)
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
