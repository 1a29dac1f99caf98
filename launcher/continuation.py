"""What may change when an existing run is continued (pure)."""

import json
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

from data_pipeline.errors import ConfigError
from trainer.config import RunConfig

FREE = (
    *("storage", "data", "zero", "batch.split", "batch.loader_workers", "checkpoint", "validation", "numerics", "finetune", "tracking"),
    *("model.activation_checkpointing", "model.attention", "model.compile"),
)
"""Change what a run costs or keeps, never what it computes (beyond summation order, on a GPU the numbers that dropout draws, and but for
steps in numeric trouble)."""
DELIBERATE = (*("optimizer.lr", "optimizer.betas", "optimizer.eps", "optimizer.weight_decay", "optimizer.clip_norm"), "schedule")
"""Change the rest of the run: only by `resume --set`, and recorded. Not `optimizer.kind`: the moments would stay, but no learning rate fits both."""


@dataclass(frozen=True)
class Change:
    """One setting that differs between the run's configuration and the one given now."""

    path: str
    before: Any
    after: Any

    def __str__(self) -> str:
        return f"{self.path}: {self.before!r} -> {self.after!r}"


def changes(before: RunConfig, after: RunConfig) -> list[Change]:
    """Every leaf that differs, by dotted path."""
    old, new = dict(_leaves(before.model_dump(mode="json"))), dict(_leaves(after.model_dump(mode="json")))
    return [Change(path, old.get(path), new.get(path)) for path in sorted({*old, *new}) if old.get(path) != new.get(path)]


def resolve_diff(before: RunConfig, after: RunConfig, *, deliberate: bool, steps_done: int = 0) -> list[Change]:
    """The changes between a run's configuration and the one given to continue it.

    `deliberate` is True for `resume --set`, which may also change the learning rate, other settings of the optimizer, and the schedule.

    Raises:
        ConfigError: a change would make another model out of the same run, of which `steps_done` steps are committed, or would change nothing.
    """
    found = changes(before, after)
    _require_steps_for(found, after, steps_done)
    allowed = (*FREE, *DELIBERATE) if deliberate else FREE
    refused = [change for change in found if not (_within(change.path, allowed) or _leaves_choice(change))]
    if not refused:
        return found
    listed = "; ".join(str(change) for change in refused)
    if all(_within(change.path, DELIBERATE) for change in refused):
        remedy = f"If it is meant: maskwright resume {before.name} " + " ".join(f"--set {shlex.quote(_setting(c))}" for c in refused)
    else:
        remedy = "Give the configuration another name to start a new run, or change it back."
    raise ConfigError(f"run {before.name!r} exists and cannot continue with {listed}", remedy)


def _require_steps_for(found: list[Change], after: RunConfig, steps_done: int) -> None:
    """Refuse fewer steps than were taken, and another optimizer or schedule for no step at all: what is said of the model would not be true."""
    idle = [change for change in found if _within(change.path, DELIBERATE)]
    if not idle or steps_done < after.schedule.steps:
        return
    listed = "; ".join(map(str, idle))
    raise ConfigError(
        f"run {after.name!r} has taken {steps_done} steps already, and no step would follow {listed}",
        f"Give more steps: maskwright resume {after.name} --set schedule.steps={2 * steps_done}",
    )


def _leaves_choice(change: Change) -> bool:
    """`precision: auto` continues in what the run is computed in."""
    return change.path == "precision" and "auto" in {change.before, change.after}


def _setting(change: Change) -> str:
    """As `--set` takes it: JSON is YAML, and a word needs no quotes."""
    return f"{change.path}={change.after if isinstance(change.after, str) else json.dumps(change.after)}"


def _within(path: str, prefixes: tuple[str, ...]) -> bool:
    return any(path == prefix or path.startswith(prefix + ".") for prefix in prefixes)


def _leaves(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, child in value.items():
        if isinstance(child, dict) and child:
            yield from _leaves(cast(dict[str, Any], child), f"{prefix}{key}.")
        else:
            yield prefix + key, child
