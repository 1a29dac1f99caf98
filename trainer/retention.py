"""Which committed checkpoints a run keeps, and which it has by the word of its events (pure)."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

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


def committed_by(events: Sequence[Mapping[str, Any]]) -> dict[int, int]:
    """The attempt that committed each checkpoint which must still be there, by step; from a run's events, oldest first.

    Not those that were removed to keep no more than are wanted, were found damaged, or are of a history that a later attempt went back behind.
    Events of releases that did not say what is removed vouch for the checkpoint that they are about, and for no other.
    """
    there: dict[int, int] = {}
    for event in events:
        if event["kind"] == "checkpoint_committed":
            if "removed" not in event:
                there.clear()
            there[event["step"]] = event["attempt"]
            there = {step: attempt for step, attempt in there.items() if step not in event.get("removed", ())}
        elif event["kind"] == "checkpoint_damaged":
            there.pop(event["step"], None)
        elif event["kind"] == "resumed":
            there = {step: attempt for step, attempt in there.items() if step <= event["step"]}
    return there
