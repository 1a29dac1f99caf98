"""Hours and cost of a run: from the steps of an earlier one, from stated tokens a second, or from a stated MFU of a GPU (pure)."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from data_pipeline.order import micro_steps
from launcher.history import Attempt, History
from launcher.plan_work import PhaseWork, total_tokens
from trainer.config import RunConfig
from trainer.dimensions import Dimensions

MIN_STEPS = 5
"""Steps that must have been seen; the first of an attempt, which sets things up, are none of them."""
_WARM_UP = 2


@dataclass(frozen=True)
class Speed:
    """What an earlier run of the same network and precision took."""

    source: str
    """Its id."""
    num_steps: int
    """Steps that it is the median of."""
    world_size: int
    flops_per_s: float
    """Useful operations of a rank by second of its passes."""
    step_overhead_s: float
    """Seconds of a step outside of its passes: agreeing, reducing, the update, waiting for data."""
    validation_s: float
    checkpoint_stall_s: float
    """Seconds for which one checkpoint holds training up."""
    start_up_s: float
    """From the start of the workers to their first step."""
    caveat: str = ""
    """What is not known of the devices it was measured on, or not the same."""


@dataclass(frozen=True)
class Stated:
    """What a person says on the command line."""

    mfu: float | None = None
    tokens_per_s: float | None = None
    """Of all ranks together."""
    price_per_hour: float | None = None
    """Of one worker."""
    failures_per_day: float | None = None
    """Of all machines together."""


@dataclass(frozen=True)
class Duration:
    """How long the run takes; None where nothing says it."""

    hours: float | None
    basis: str
    """What it is computed from; where there is nothing, why."""
    step_s: float | None = None
    """Of the last phase, checkpoints and validation left out."""
    is_bound: bool = False
    """Whether it is at most so: nothing is known of the corpus, and every row counts as full."""


def measured_speed(source: str, history: History, attempts: Sequence[Attempt], work: Sequence[PhaseWork], network: Dimensions) -> Speed | None:
    """The speed of a run from its records, by `work`, its own phases; None when it took too few steps.

    The steps of its newest attempts with one world size count: those of others had other work.
    """
    sizes = {attempt.number: attempt.world_size for attempt in attempts}
    newest = next((attempt.world_size for attempt in reversed(attempts) if attempt.world_size and attempt.last_step is not None), None)
    if newest is None:
        return None
    firsts = {attempt.number: (attempt.first_step or 0) + _WARM_UP for attempt in attempts}
    steps = list(zip(history.step.tolist(), history.attempt.tolist(), strict=True))
    kept = np.array([sizes.get(attempt) == newest and step >= firsts[attempt] for step, attempt in steps], dtype=bool)
    passes_s = history.values["forward_s"] + history.values["backward_s"]
    whole_s = history.values["step_s"] - np.nan_to_num(history.values["data_wait_s"])
    passes_s = np.where(np.isfinite(passes_s), passes_s, whole_s)  # releases that kept no time line tell only the whole
    kept &= np.isfinite(passes_s) & np.isfinite(history.values["step_s"])
    if int(kept.sum()) < MIN_STEPS:
        return None
    rates = [_round_flops(step, work, network, newest) / seconds for (step, _), seconds in zip(_of(steps, kept), passes_s[kept], strict=True)]
    return Speed(
        source=source,
        num_steps=int(kept.sum()),
        world_size=newest,
        flops_per_s=float(np.median(rates)),
        step_overhead_s=float(np.median((history.values["step_s"] - passes_s)[kept])),
        validation_s=_mean_of_nonzero(history.values["validation_s"]),
        checkpoint_stall_s=_mean_of_nonzero(history.values["checkpoint_stall_s"]),
        start_up_s=_start_up(attempts, history),
    )


def duration(
    config: RunConfig, work: Sequence[PhaseWork], network: Dimensions | None, world_size: int, stated: Stated, speed: Speed | None, peak: float | None
) -> Duration:
    """By what was stated, else by what was measured. `peak` is the stated FLOP/s of the GPU in the run's precision."""
    if stated.tokens_per_s is not None:
        seconds = total_tokens(work) / stated.tokens_per_s
        return _stated(seconds, f"stated: {stated.tokens_per_s:g} tokens/s", work[-1].tokens / stated.tokens_per_s, work)
    if network is None:
        return Duration(None, "the network is not known here")
    if stated.mfu is not None:
        if peak is None:
            return Duration(None, "--mfu needs --gpu, a GPU whose rate in this precision is known")
        rate = stated.mfu * peak
        seconds = [_passes_s(part, network, world_size, rate) for part in work]
        total = sum(part.phase.num_steps * each for part, each in zip(work, seconds, strict=True))
        basis = f"stated: {stated.mfu:g} of {peak / 1e12:g} TFLOP/s a rank; start-up, validation and checkpoints not counted"
        return _stated(total, basis, seconds[-1], work)
    if speed is not None:
        return _as_before(config, work, network, world_size, speed)
    return Duration(
        None, "no earlier run of this network and precision on such a device in the storage; state --tokens-per-second, or --gpu and --mfu"
    )


def cost(hours: float | None, world_size: int, stated: Stated) -> tuple[float | None, str | None]:
    """(cost, None), or (None, the reason); in the unit of the price."""
    if stated.price_per_hour is None:
        return None, "no --price-per-hour"
    if hours is None:
        return None, "hours are not known"
    return hours * world_size * stated.price_per_hour, None


def _as_before(config: RunConfig, work: Sequence[PhaseWork], network: Dimensions, world_size: int, speed: Speed) -> Duration:
    step_s = [_passes_s(part, network, world_size, speed.flops_per_s) + speed.step_overhead_s for part in work]
    steps = config.schedule.steps
    training = sum(part.phase.num_steps * seconds for part, seconds in zip(work, step_s, strict=True))
    beside = -(-steps // config.validation.every_steps) * speed.validation_s + -(-steps // config.checkpoint.every_steps) * speed.checkpoint_stall_s
    basis = f"measured: {speed.num_steps} steps of run {speed.source}{_on_other_ranks(speed, world_size)}{speed.caveat and '; '}{speed.caveat}"
    return Duration((training + beside + speed.start_up_s) / 3600, basis, step_s[-1])


def _on_other_ranks(speed: Speed, world_size: int) -> str:
    if speed.world_size == world_size:
        return ""
    if speed.world_size == 1:
        return " on 1 rank, which neither exchanged gradients nor shared the machine"
    return f" on {speed.world_size} ranks"


def _passes_s(part: PhaseWork, network: Dimensions, world_size: int, flops_per_s: float) -> float:
    """Seconds of a rank's passes in a step."""
    return micro_steps(part.phase.num_micro_batches, world_size) * part.flops_of_round(network.flops) / flops_per_s


def _stated(seconds: float, basis: str, step_s: float, work: Sequence[PhaseWork]) -> Duration:
    """At a stated rate, full rows take longer than the corpus will. A measured one was itself computed from such rows, which cancels out."""
    is_bound = any(part.is_bound for part in work)
    return Duration(seconds / 3600, f"{basis}{'; at most: every row counts as full' if is_bound else ''}", step_s, is_bound)


def _round_flops(step: int, work: Sequence[PhaseWork], network: Dimensions, world_size: int) -> float:
    """What a rank does in the passes of `step`."""
    part = next(part for part in reversed(work) if part.phase.first_step <= step)
    return micro_steps(part.phase.num_micro_batches, world_size) * part.flops_of_round(network.flops)


def _of(steps: Sequence[tuple[int, int]], kept: NDArray[np.bool_]) -> list[tuple[int, int]]:
    return [step for step, is_kept in zip(steps, kept.tolist(), strict=True) if is_kept]


def _mean_of_nonzero(values: NDArray[np.float64]) -> float:
    found = values[np.isfinite(values) & (values > 0)]
    return float(found.mean()) if len(found) else 0.0


def _start_up(attempts: Sequence[Attempt], history: History) -> float:
    """From the newest attempt's start to its first step; 0 where it cannot be told."""
    newest = attempts[-1]
    own = history.of_attempt(newest.number)
    if not len(own) or not np.isfinite(own.values["time"][0]):
        return 0.0
    return max(0.0, float(own.values["time"][0] - own.values["step_s"][0]) - newest.started_at)
