"""What the mean step of a run is made of: the time lines of its records, by phase; the parts add up to the whole (pure)."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from launcher.history import PHASES, History

_TEXTS = {
    "data_wait": "waiting for data",
    "agree": "agreeing on counts and losses, and waiting for other ranks",
    "forward": "forward",
    "backward": "backward",
    "reduce": "reducing gradients, waiting for other ranks included",
    "optimizer": "optimizer",
    "checkpoint": "standing still for checkpoints",
    "validation": "validation",
    "other": "between phases",
}
"""Keys of the JSON, in the order in which they are shown, and what they mean."""
_BETWEEN_STEPS = ("checkpoint_stall_s", "validation_s")


@dataclass(frozen=True)
class PhaseShare:
    """A phase of the mean step."""

    phase: str
    text: str
    seconds: float
    share: float


@dataclass(frozen=True)
class StepPhases:
    """The mean step of a history, with its part of the checkpoints and validations between steps."""

    num_steps: int
    step_s: float
    parts: tuple[PhaseShare, ...]
    """Those that took time."""
    reduces_apart: bool
    """Whether reducing gradients is a part of its own; where it is not, it lies in the backward pass."""

    @classmethod
    def of(cls, history: History) -> "StepPhases | None":
        """Of the steps that have a time line; None where there are none, as in runs of older releases."""
        there = np.isfinite(history.values["forward_s"]) & np.isfinite(history.values["step_s"])
        if not there.any():
            return None
        means = {name: float(np.nan_to_num(history.values[name][there]).mean()) for name in PHASES}
        between_s = sum(means[name] for name in _BETWEEN_STEPS)
        whole_s = float(history.values["step_s"][there].mean()) + between_s
        seconds = {name.removesuffix("_s").removesuffix("_stall"): mean_s for name, mean_s in means.items()}
        seconds["other"] = max(0.0, whole_s - sum(means.values()))
        whole_s = sum(seconds.values())
        reduces_apart = bool(np.isfinite(history.values["reduce_s"][there]).any())
        texts = _TEXTS if reduces_apart else _TEXTS | {"backward": "backward, reducing gradients included"}
        parts = tuple(PhaseShare(phase, text, seconds[phase], seconds[phase] / whole_s) for phase, text in texts.items() if seconds[phase])
        return cls(int(there.sum()), whole_s, parts, reduces_apart)

    def to_json(self) -> dict[str, Any]:
        """JSON object: seconds of the mean step by phase; `reduce` is null where it cannot be told from the backward pass."""
        seconds: dict[str, Any] = dict.fromkeys(_TEXTS, 0.0) | {part.phase: round(part.seconds, 6) for part in self.parts}
        if not self.reduces_apart:
            seconds["reduce"] = None
        return {"num_steps": self.num_steps, "step_s": round(self.step_s, 6), "seconds": seconds}

    def summary(self) -> str:
        """A line that names the largest parts."""
        largest = sorted(self.parts, key=lambda part: -part.share)[:3]
        return f"a step takes {1000 * self.step_s:,.1f} ms: " + ", ".join(f"{part.phase} {part.share:.0%}" for part in largest)
