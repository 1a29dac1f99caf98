"""Which committed checkpoints a run keeps (pure)."""

import math
from collections.abc import Mapping

from trainer.config import CheckpointConfig


def superfluous(committed: Mapping[int, float | None], newest: int, config: CheckpointConfig) -> list[int]:
    """Steps of the checkpoints to remove, ascending. `committed` has the validation loss of each step, None where it was not measured.

    Kept are `newest`, the one just committed and known to be whole (later ones are of a history that was rewound), with the last others,
    every so many steps, and the one of the lowest validation loss.
    """
    others = sorted(step for step in committed if step != newest)
    kept = {newest, *others[max(0, len(others) + 1 - config.keep_last) :]}
    if config.keep_every is not None:
        kept |= {step for step in committed if step % config.keep_every == 0}
    measured = {step: loss for step, loss in committed.items() if loss is not None and not math.isnan(loss)}
    if config.keep_best and measured:
        kept.add(min(measured, key=lambda step: (measured[step], -step)))
    return [step for step in others if step not in kept]
