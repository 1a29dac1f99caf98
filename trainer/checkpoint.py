"""Committed checkpoints: which one to resume from, and what is known of it (R2). How they are written: `trainer.saving`.

Functions that take ranks are collective.
"""

from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from data_pipeline.errors import ConfigError, NoCheckpointError, NotFoundError
from trainer.agreement import Ranks
from trainer.checkpoint_store import Checkpoints, step_of
from trainer.config import RunConfig
from trainer.manifest import Circumstances, Manifest, Problem, check_files, read_manifest, shares
from trainer.runlog import RunFolder
from trainer.snapshot import ZERO_FOLDER
from trainer.state import TrainState

STATE_FILE = "state.json"
PROBE_FILE = "probe.safetensors"


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint."""

    folder: Path
    manifest: Manifest

    @property
    def step(self) -> int:
        """Optimizer steps done when it was taken."""
        return self.manifest.step

    @property
    def state(self) -> TrainState:
        """Counters to continue from."""
        return self.manifest.train_state

    @property
    def zero_folder(self) -> Path:
        """DeepSpeed's files, for `Engine.load`."""
        return self.folder / ZERO_FOLDER

    @property
    def probe(self) -> Path:
        """A fixed input and the logits that the engine gave for it when the checkpoint was taken."""
        return self.folder / PROBE_FILE


def newest_usable(
    run: RunFolder,
    *,
    rank: int,
    world_size: int,
    attempt: int,
    group: dist.ProcessGroup | None,
    timeout_s: float = 600.0,
    before_step: int | None = None,
) -> Checkpoint | None:
    """The newest checkpoint that is complete and intact, the same on every rank; None when the run has none yet.

    The files are re-hashed, each by one rank. A damaged checkpoint is renamed to `step-N.damaged-<attempt>` with an event that names the
    file and the cause, and the one before it is tried. Ask `has_same_layout` how to load it.

    `before_step` goes back in history: to a checkpoint of at most that step. Those after it are renamed to `step-N.rewound-<attempt>`, once
    there is one to go back to.

    Raises:
        NoCheckpointError: there were checkpoints, and none (of at most `before_step`) is intact.
        EnvironmentMismatchError: the newest one was written by a newer release.
    """
    ranks, checkpoints = Ranks(rank, world_size, group, timeout_s), Checkpoints(run)
    names = ranks.rank_zero_does("list the checkpoints", lambda: _selectable(checkpoints, attempt))
    later = [name for name in names if before_step is not None and step_of(name) > before_step]
    for name in names[len(later) :]:
        folder = checkpoints.location(name).path
        manifest = ranks.rank_zero_does("read the manifest", lambda name=name: checkpoints.read(name))
        problems = _verify_together(ranks, folder, manifest) if isinstance(manifest, Manifest) else [manifest]
        if isinstance(manifest, Manifest) and not problems:
            ranks.rank_zero_does("set the later checkpoints aside", lambda: [checkpoints.set_aside(each, "rewound", attempt) for each in later])
            return Checkpoint(folder, manifest)
        ranks.rank_zero_does("set the damaged checkpoint aside", lambda n=name, p=problems: _quarantine(run, n, p, attempt))
    if later:
        raise NoCheckpointError(
            f"{run.checkpoints} has no intact checkpoint of step {before_step} or before to go back to; the oldest is {later[-1]}",
            "Set numerics.policy to skip_batch or stop, keep more (checkpoint.keep_last), or start again under another `name`.",
        )
    if ranks.rank_zero_does("look for damaged checkpoints", lambda: any(entry.kind == "damaged" for entry in checkpoints.entries())):
        raise NoCheckpointError(
            f"{run.checkpoints} has no intact checkpoint; the damaged ones are in its step-*.damaged-* folders, the causes in {run.events}",
            "Restore a checkpoint folder from a copy, or start again under another `name`.",
        )
    return None


def has_same_layout(manifest: Manifest, config: RunConfig, world_size: int) -> bool:
    """Whether the files are laid out for as many ranks and the ZeRO stage of this attempt.

    Raises:
        ConfigError: the precision differs.
    """
    then = manifest.circumstances
    if then.precision != config.precision:
        raise ConfigError(
            f"the checkpoint of step {manifest.step} was written in {then.precision}, this attempt has {config.precision}",
            f"Set precision to {then.precision} to continue this run.",
        )
    return (then.world_size, then.zero_stage) == (world_size, config.zero.stage)


def why_not_exact(manifest: Manifest, now: Circumstances, config: RunConfig | None = None) -> list[str]:
    """What may change the last bits of every loss from here on (R3): what differs from when the checkpoint was taken, and GPU kernels."""
    reasons = manifest.circumstances.differences(now)
    if config is not None:
        split = manifest.config.get("batch", {}).get("split", 1)
        if split != config.batch.split:
            reasons.append(f"batch.split: {split}, now {config.batch.split} (dropout is drawn for each part)")
        if manifest.config.get("zero", {}).get("deepspeed", {}) != config.zero.deepspeed:
            reasons.append("zero.deepspeed differs")
        if manifest.config.get("model", {}).get("activation_checkpointing", False) != config.model.activation_checkpointing:
            reasons.append("model.activation_checkpointing differs")
    if now.device.startswith("cuda"):
        reasons.append("GPU kernels may add in another order each time")
    return reasons


def verify(folder: Path) -> list[Problem]:
    """Re-hash a committed checkpoint; empty when it is intact.

    Raises:
        NotFoundError: there is no such folder.
        EnvironmentMismatchError: a newer release wrote it.
    """
    if not folder.is_dir():
        raise NotFoundError(f"checkpoint {folder} does not exist", "Check the path.")
    manifest = read_manifest(folder)
    return check_files(folder, manifest.files, manifest.files) if isinstance(manifest, Manifest) else [manifest]


def list_checkpoints(run: RunFolder) -> list[Checkpoint]:
    """Committed checkpoints, oldest first; only their manifests are read, damaged ones are left out."""
    checkpoints = Checkpoints(run)
    read = [(entry.name, checkpoints.read(entry.name)) for entry in checkpoints.committed()]
    return [Checkpoint(checkpoints.location(name).path, manifest) for name, manifest in read if isinstance(manifest, Manifest)]


def _selectable(checkpoints: Checkpoints, attempt: int) -> list[str]:
    """Names of committed checkpoints, newest first, after what earlier attempts left half-done is finished or undone."""
    checkpoints.tidy(attempt)
    return [entry.name for entry in reversed(checkpoints.committed())]


def _verify_together(ranks: Ranks, folder: Path, manifest: Manifest) -> list[Problem]:
    """Re-hash the files, each on one rank; every rank gets all problems."""
    part = shares(manifest.files, ranks.world_size)[ranks.rank]
    found = ranks.all_do("verify the checkpoint", lambda: check_files(folder, manifest.files, part))
    return [problem for problems in found for problem in problems]


def _quarantine(run: RunFolder, name: str, problems: list[Problem], attempt: int) -> None:
    aside = Checkpoints(run).set_aside(name, "damaged", attempt)
    first = problems[0]
    run.append_event(
        "checkpoint_damaged",
        attempt=attempt,
        step=step_of(name),
        file=first.file,
        cause=str(first),
        problems=[str(problem) for problem in problems],
        moved_to=aside,
    )
