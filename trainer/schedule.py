"""The learning rate of each optimizer step (pure)."""

import math

from trainer.config import ScheduleConfig


def learning_rate(peak: float, schedule: ScheduleConfig, step: int) -> float:
    """Learning rate of optimizer step `step`, counted from 0.

    Rises linearly over the warm-up, of which no step is wasted on a rate of 0, and decays, at once or (wsd) at the end, so that
    `final_ratio * peak` would be reached one step after the last. A function of the step alone: a resumed run follows the config, not a
    checkpoint.
    """
    if step < schedule.warmup_steps:
        return peak * (step + 1) / schedule.warmup_steps
    progress = (step - schedule.decay_from) / max(1, schedule.steps - schedule.decay_from)
    return peak * (schedule.final_ratio + (1.0 - schedule.final_ratio) * _remaining(schedule, min(1.0, max(0.0, progress))))


def _remaining(schedule: ScheduleConfig, progress: float) -> float:
    """Share of the way down that is left; `progress` runs from 0 where the decay begins to 1 at the end."""
    if schedule.kind == "constant":
        return 1.0
    if schedule.kind == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * progress))
    if schedule.kind == "wsd" and schedule.decay_shape == "sqrt":
        return 1.0 - math.sqrt(progress)
    return 1.0 - progress
