"""Numeric trouble: which losses and gradients are unsound, and what follows by the run's policy (pure)."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from trainer.config import NumericsConfig

TroubleKind = Literal["non_finite_loss", "non_finite_gradients", "loss_spike", "non_finite_weights"]
Response = Literal["stop", "skip", "rewind"]

_MAD_TO_DEVIATION = 1.4826  # the standard deviation of a normal distribution over its median absolute deviation
_SAID: dict[TroubleKind, str] = {
    "non_finite_loss": "the loss of step {step} is not finite ({value})",
    "non_finite_gradients": "the gradients of step {step} are not finite (norm {value}) although its loss is",
    "loss_spike": "the loss of step {step} is a spike ({value:.6g})",
    "non_finite_weights": "the weights after step {step} give nothing finite ({value}) although its loss and gradients were",
}


@dataclass(frozen=True)
class Trouble:
    """What is wrong with a step, the same on every rank. `step` counts from 0; `value` is the loss or the gradient norm."""

    step: int
    kind: TroubleKind
    value: float
    micro_batches: tuple[int, int]
    """First and last micro-batch of its batch, by run-wide number."""

    def __str__(self) -> str:
        return _SAID[self.kind].format(step=self.step, value=self.value)


@dataclass(frozen=True)
class TroubleHistory:
    """What numeric trouble has cost a run so far, over all attempts."""

    skipped: frozenset[int] = frozenset()
    """Steps whose batch was skipped."""
    rewound: tuple[int, ...] = ()
    """The step of each rewind."""
    resume_before: int | None = None
    """The checkpoint to resume from, or an older one; None without a rewind that is still to be made."""

    @classmethod
    def of(cls, events: Sequence[Mapping[str, Any]]) -> "TroubleHistory":
        """Read from a run's events, oldest first. A rewind is done when a later attempt has resumed or committed."""
        skipped, rewound, resume_before, by_attempt = set[int](), list[int](), None, 0
        for event in events:
            if event["kind"] == "batch_skipped":
                skipped.add(event["step"])
            elif event["kind"] == "numeric_trouble" and event["response"] == "rewind":
                rewound.append(event["step"])
                resume_before, by_attempt = event["rewind_to"], event["attempt"]
            elif event["kind"] in ("resumed", "checkpoint_committed") and event["attempt"] > by_attempt:
                resume_before = None
        return cls(frozenset(skipped), tuple(rewound), resume_before)

    @property
    def spent(self) -> int:
        """Skips and rewinds, as `numerics.budget` counts them: a batch that is skipped again after a restart counts once."""
        return len(self.skipped) + len(self.rewound)


def loss_trouble(loss: float, recent: Sequence[float], config: NumericsConfig) -> TroubleKind | None:
    """What is wrong with a step's loss, after the losses `recent`."""
    if not math.isfinite(loss):
        return "non_finite_loss"
    return "loss_spike" if is_spike(loss, recent, config) else None


def is_spike(loss: float, recent: Sequence[float], config: NumericsConfig) -> bool:
    """Whether a finite loss is above the median of `recent` by more than `spike_threshold` robust standard deviations."""
    if config.spike_threshold is None or 2 * len(recent) < config.spike_window:
        return False
    median = statistics.median(recent)
    deviation = _MAD_TO_DEVIATION * statistics.median(abs(other - median) for other in recent)
    return loss > median + config.spike_threshold * deviation


def with_loss(recent: tuple[float, ...], loss: float, config: NumericsConfig) -> tuple[float, ...]:
    """The losses that the next one is measured against, after an update with this one: where nothing asks for more, this one alone."""
    return (*recent, loss)[-config.spike_window :] if config.spike_threshold is not None else (loss,)


def response(step: int, kind: TroubleKind, config: NumericsConfig, history: TroubleHistory) -> Response:
    """What follows trouble at `step`. A step that is in trouble again after its rewind has a bad batch, not a bad machine: it is skipped.

    Weights that are bad after it can be repaired by a rewind alone, once.
    """
    if config.policy == "stop":
        return "stop"
    if kind == "non_finite_weights":
        can_rewind = config.rewind_checkpoints is not None and step not in history.rewound and history.spent < config.budget
        return "rewind" if can_rewind else "stop"
    if step in history.skipped:
        return "skip"
    if history.spent >= config.budget or are_weights_bad(step, kind, config, history):
        return "stop"
    return "skip" if config.policy == "skip_batch" or step in history.rewound else "rewind"


def are_weights_bad(step: int, kind: TroubleKind, config: NumericsConfig, history: TroubleHistory) -> bool:
    """Whether the same weights fail on two batches in a row, after a rewind as before it: then no machine and no batch is at fault. Diverged."""
    return config.rewind_checkpoints is not None and kind != "loss_spike" and step - 1 in history.skipped


def rewind_target(committed: Sequence[int], step: int, checkpoints: int) -> int:
    """The `checkpoints`-th newest of the committed steps at or before `step`; the oldest where there are fewer, 0 where there are none."""
    older = sorted(other for other in committed if other <= step)
    return older[-checkpoints:][0] if older else 0


def continuity(loss: float | None, same_step: float | None, step_before: float | None) -> dict[str, Any]:
    """R8's loss continuity, as in the event `continued`: the first loss after a resume beside that of the same step in an earlier attempt,
    which it equals where nothing else has changed, or else that of the step before."""
    before = step_before if same_step is None else same_step
    difference = None if loss is None or before is None else abs(loss - before) / max(abs(before), 1e-30)
    return {"loss": loss, "loss_before": before, "same_step": same_step is not None, "relative_difference": difference}
