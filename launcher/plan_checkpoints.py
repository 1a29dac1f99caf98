"""Checkpoints of a run: their bytes, how many are kept, and how far apart they should be (pure)."""

import math
from dataclasses import asdict, dataclass
from typing import Any

from trainer.config import CheckpointConfig


@dataclass(frozen=True)
class CheckpointPlan:
    """What the run saves."""

    checkpoint_bytes: int
    """Of one, all ranks together."""
    every_steps: int
    number: int
    """That the run commits."""
    kept: int
    """That remain at its end."""
    kept_bytes: int
    stall_s: float | None
    """For which one holds training up; None where nothing says it."""
    stall_basis: str
    best_every_steps: int | None
    """By `daly_interval_s`, for the stated failures; None where those, the stall or the length of a step are not known."""
    best_basis: str
    """What that is computed from; where it is not, what is missing."""

    def to_json(self) -> dict[str, Any]:
        """JSON object."""
        return asdict(self)


def checkpoint_plan(
    config: CheckpointConfig,
    num_steps: int,
    num_bytes: int,
    *,
    stall_s: float | None,
    stall_basis: str,
    step_s: float | None,
    failures_per_day: float | None,
) -> CheckpointPlan:
    """What `config` makes of a run of `num_steps`, and the interval that loses least time."""
    kept = len(kept_steps(config, num_steps))
    best, basis = _best(stall_s, stall_basis, step_s, failures_per_day)
    return CheckpointPlan(
        checkpoint_bytes=num_bytes,
        every_steps=config.every_steps,
        number=math.ceil(num_steps / config.every_steps),
        kept=kept,
        kept_bytes=kept * num_bytes,
        stall_s=stall_s,
        stall_basis=stall_basis,
        best_every_steps=None if best is None else min(best, num_steps),
        best_basis=basis,
    )


def kept_steps(config: CheckpointConfig, num_steps: int) -> set[int]:
    """Steps whose checkpoints remain at the end, as `trainer.retention` keeps them; with `keep_best` one more may."""
    committed = [*range(config.every_steps, num_steps, config.every_steps), num_steps]
    kept = set(committed[-config.keep_last :])
    if config.keep_every is not None:
        kept |= {step for step in committed if step % config.keep_every == 0}
    others = [step for step in committed if step not in kept]
    return kept | set(others[-1:] if config.keep_best else ())


def daly_interval_s(stall_s: float, mtbf_s: float) -> float:
    """Seconds of training between two checkpoints that cost `stall_s` each, when failures come every `mtbf_s` on average.

    Daly 2006 ("A higher order estimate of the optimum checkpoint interval for restart dumps"), equation 37; its first term is Young's (1974).
    """
    if stall_s >= 2 * mtbf_s:
        return mtbf_s
    ratio = stall_s / (2 * mtbf_s)
    return math.sqrt(2 * stall_s * mtbf_s) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - stall_s


def _best(stall_s: float | None, stall_basis: str, step_s: float | None, failures_per_day: float | None) -> tuple[int | None, str]:
    if failures_per_day is None:
        return None, "no --failures-per-day"
    if failures_per_day == 0:
        return None, "--failures-per-day is 0: nothing would be lost between checkpoints"
    if step_s is None or stall_s is None:
        return None, f"how long a {'step' if step_s is None else 'checkpoint'} takes is not known"
    interval_s = daly_interval_s(stall_s, 86400 / failures_per_day)
    said = f"{failures_per_day:g} failures a day, {stall_s:.3g} s a checkpoint ({stall_basis}), {step_s:.3g} s a step"
    return max(1, round(interval_s / step_s)), f"Young/Daly: {said}"
