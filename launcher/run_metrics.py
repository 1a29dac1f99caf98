"""What a run tells Prometheus: the names of its metrics, and their values from its records (pure)."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Self

PREFIX = "maskwright_"
"""Of every name; Ray puts `ray_` before it."""

OF_STEP = {
    "loss": "Loss of the last step",
    "mlm_loss": "Loss of the masked or next tokens, last step",
    "nsp_loss": "Loss of the sentence objective, last step",
    "grad_norm": "Norm of the gradients before clipping, last step",
    "lr": "Learning rate of the last step",
    "tokens_per_s": "Real tokens a second of all ranks, last step",
    "mfu": "Useful FLOPs as a share of bare matrix products, last step",
}
"""Keys of metrics.jsonl that are passed on as they are. NaN is a value that does not exist, such as the sentence loss without pairs."""

OF_RUN = {
    "step": "Optimizer steps done",
    "steps": "Optimizer steps that the run is to take",
    "attempts": "Starts of the workers for pretraining, those of earlier commands included",
    "failures": "Attempts that failed, of pretraining and of fine-tuning, preemptions, rewinds and killed commands included",
    "last_checkpoint": "Step of the newest committed checkpoint",
}

TOTALS = {
    "data_wait_s": "Seconds that rank 0 has waited for data since the command began",
    "checkpoint_stall_s": "Seconds that checkpoints have held up training since the command began",
}
"""Sums over steps: of a value that is rarely more than nothing, what the last step had says little."""


@dataclass
class Vitals:
    """Where a run stands, kept up to date by its records as they come."""

    gauges: dict[str, float] = field(default_factory=lambda: {"attempts": 0.0, "failures": 0.0})
    """Values of `OF_RUN` and `OF_STEP`, those that are known."""
    totals: dict[str, float] = field(default_factory=lambda: dict.fromkeys(TOTALS, 0.0))

    @classmethod
    def of(cls, events: Iterable[Mapping[str, Any]], steps: int) -> Self:
        """Those of a run that is to take `steps` steps, and of which `events` are recorded."""
        vitals = cls()
        vitals.gauges["steps"] = float(steps)
        vitals.take_events(events)
        return vitals

    def take_events(self, events: Iterable[Mapping[str, Any]]) -> None:
        """Count attempts and failures, and see the newest checkpoint."""
        for event in events:
            if event["kind"] == "attempt_started" and event.get("stage") == "pretrain":
                self.gauges["attempts"] += 1
            elif event["kind"] == "worker_failed":
                self.gauges["failures"] += 1
            elif event["kind"] == "checkpoint_committed":
                self.gauges["last_checkpoint"] = float(event["step"])

    def take_steps(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Take the values of the newest step, and add to the totals what all of them have."""
        for record in records:
            self.gauges["step"] = float(record["step"] + 1)
            self.gauges |= {name: _number(record.get(name)) for name in OF_STEP}
            self.totals = {name: total + (record.get(name) or 0.0) for name, total in self.totals.items()}


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)
