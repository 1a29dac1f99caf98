"""Committed checkpoints: which one to resume from, and what is known of it (R2). How they are written: `trainer.saving`.

Functions that take ranks are collective.
"""

import re
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch.distributed as dist

from data_pipeline.errors import ConfigError, NoCheckpointError, NotFoundError, StorageUnreachableError
from data_pipeline.scratch import Scratch
from data_pipeline.storage import Location
from trainer.agreement import Ranks
from trainer.checkpoint_store import Checkpoints, checkpoints_of, step_of
from trainer.config import RunConfig
from trainer.manifest import MANIFEST, Circumstances, Manifest, Problem, check_files, nothing, read_manifest, shares
from trainer.node_copy import COPY, copy_to_nodes
from trainer.object_checkpoints import download
from trainer.retention import committed_by
from trainer.runlog import RunFolder
from trainer.snapshot import ZERO_FOLDER
from trainer.state import TrainState
from trainer.zero_config import ZeroConfig

STATE_FILE = "state.json"
PROBE_FILE = "probe.safetensors"
_RANK_FILE = re.compile(r"zero_pp_rank_(\d+)_")
_LAYOUT = ("offload_optimizer", "offload_parameters", "deepspeed")
"""What decides, beside ranks and stage, which part of what lies where: DeepSpeed has another optimizer for an offloaded state at stage 1 in bf16,
and the raw block orders parameters and cuts groups."""


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint."""

    location: Location
    manifest: Manifest
    copy: Scratch | None = None
    """The copy of what this process, or the ranks of its node, need out of a store."""

    @property
    def folder(self) -> Path:
        """The files, on this machine."""
        return self.location.path if self.copy is None else self.copy.path

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

    def discard_copy(self) -> None:
        """Have done with the copy, if it is one, once it is loaded; the last rank of the node removes it."""
        if self.copy is not None:
            self.copy.remove()


def newest_usable(
    run: RunFolder,
    *,
    rank: int,
    world_size: int,
    attempt: int,
    group: dist.ProcessGroup | None,
    timeout_s: float = 600.0,
    before_step: int | None = None,
    config: RunConfig | None = None,
    on_piece: Callable[[], None] = nothing,
) -> Checkpoint | None:
    """The newest checkpoint that is complete and intact, the same on every rank; None when the run has none yet.

    The files are re-hashed, each by one rank. A damaged checkpoint is renamed to `step-N.damaged-<attempt>` with an event that names the
    file and the cause, and the one before it is tried. Ask `has_same_layout` how to load it.

    `before_step` goes back in history: to a checkpoint of at most that step. Those after it are renamed to `step-N.rewound-<attempt>`, once
    there is one to go back to. Out of a store the ranks of a node copy what they need into a folder that they share: where the layout is that of
    `config` their own parts, else everything. `on_piece` is called before each piece that this rank reads.

    Raises:
        ConfigError: see `has_same_layout`.
        NoCheckpointError: there were checkpoints (or the run's events say so), and none (of at most `before_step`) is intact.
        EnvironmentMismatchError: the newest one was written by a newer release.
        StorageUnreachableError: a rank reads a file otherwise than another one.
    """
    ranks, checkpoints = Ranks(rank, world_size, group, timeout_s), checkpoints_of(run)
    names, committed = ranks.rank_zero_does("list the checkpoints", lambda: _selectable(run, checkpoints, attempt))
    later = [name for name in names if before_step is not None and step_of(name) > before_step]
    for name in names[len(later) :]:
        found = _open(ranks, checkpoints, name, config, on_piece)
        if isinstance(found, Checkpoint):
            with _discarding(found):
                ranks.rank_zero_does("set the later checkpoints aside", lambda: [checkpoints.set_aside(each, "rewound", attempt) for each in later])
            return found
        ranks.rank_zero_does("set the damaged checkpoint aside", lambda n=name, p=found: _quarantine(run, n, p, attempt))
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
    lost = [step for step in committed if before_step is None or step <= before_step]
    if lost:
        raise NoCheckpointError(
            f"{run.checkpoints} has no checkpoint, although by {run.events} some were committed, the newest at step {max(lost)}",
            f"Restore a checkpoint folder from a copy, or start again under another `name`; to start this run over, remove {run.root} first.",
        )
    return None


def newest_intact(run: RunFolder, ranks: Ranks, config: RunConfig, on_piece: Callable[[], None] = nothing) -> Checkpoint | None:
    """The checkpoint that `newest_usable` would give, for who only looks: nothing in the run folder changes. None when the run has none yet.

    Raises:
        NoCheckpointError: there are checkpoints, and none is intact.
        ConfigError, EnvironmentMismatchError, StorageUnreachableError: as `newest_usable`.
    """
    checkpoints = checkpoints_of(run)
    names = ranks.rank_zero_does("list the checkpoints", lambda: [entry.name for entry in reversed(checkpoints.committed())])
    for name in names:
        found = _open(ranks, checkpoints, name, config, on_piece)
        if isinstance(found, Checkpoint):
            return found
    if names:
        raise NoCheckpointError(f"{run.checkpoints} has no intact checkpoint", f"`maskwright resume {run.root.name}` says what is damaged.")
    return None


def _open(ranks: Ranks, checkpoints: Checkpoints, name: str, config: RunConfig | None, on_piece: Callable[[], None]) -> Checkpoint | list[Problem]:
    """A committed checkpoint, once every file is known to be intact; else what is wrong with it. The same on every rank."""
    location = checkpoints.location(name)
    manifest = ranks.rank_zero_does("read the manifest", lambda: checkpoints.read(name))
    if not isinstance(manifest, Manifest):
        return [manifest]
    copy, problems = _obtain(ranks, location, manifest, config, on_piece)
    return problems or Checkpoint(location, manifest, copy)


def has_same_layout(manifest: Manifest, config: RunConfig, world_size: int) -> bool:
    """Whether the files are laid out for as many ranks, the ZeRO stage, the offload and the `zero.deepspeed` of this attempt.

    Raises:
        ConfigError: the precision differs.
    """
    then = manifest.circumstances
    if then.precision != config.precision:
        raise ConfigError(
            f"the checkpoint of step {manifest.step} was written in {then.precision}, this attempt has {config.precision}",
            f"Set precision to {then.precision} to continue this run.",
        )
    before, now = _zero_settings(manifest), config.zero.model_dump(mode="json")
    return (then.world_size, then.zero_stage) == (world_size, config.zero.stage) and all(before[name] == now[name] for name in _LAYOUT)


def _zero_settings(manifest: Manifest) -> dict[str, Any]:
    """`zero` of the configuration that a checkpoint was written under; what its release did not know is at its default."""
    return ZeroConfig().model_dump(mode="json") | manifest.config.get("zero", {})


def why_not_exact(manifest: Manifest, now: Circumstances, config: RunConfig | None = None) -> list[str]:
    """What may change the last bits of every loss from here on (R3): what differs from when the checkpoint was taken, and GPU kernels."""
    reasons = manifest.circumstances.differences(now)
    if config is not None:
        split = manifest.config.get("batch", {}).get("split", 1)
        if split != config.batch.split:
            reasons.append(f"batch.split: {split}, now {config.batch.split} (dropout is drawn for each part)")
        zero_before, zero = _zero_settings(manifest), config.zero.model_dump(mode="json")
        reasons += [f"zero.{name} differs" for name in zero if name != "stage" and zero_before[name] != zero[name]]
        before, after = manifest.config.get("model", {}), config.model
        reasons += [f"model.{name} differs" for name in ("activation_checkpointing", "compile") if before.get(name, False) != getattr(after, name)]
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


def open_checkpoint(run: RunFolder, step: int | None = None) -> Checkpoint:
    """The checkpoint of `step`, or the newest, re-hashed; out of a store it is copied, `discard_copy` when done with it.

    Raises:
        NotFoundError: there is no such checkpoint.
        NoCheckpointError: it is damaged.
    """
    found = {checkpoint.step: checkpoint for checkpoint in list_checkpoints(run)}
    if not found:
        raise NotFoundError(f"{run.checkpoints} has no committed checkpoint", "Train first: `maskwright run CONFIG`.")
    if step is not None and step not in found:
        raise NotFoundError(f"{run.checkpoints} has no checkpoint of step {step}", f"Choose one of {', '.join(map(str, sorted(found)))}.")
    chosen = found[max(found) if step is None else step]
    files = chosen.manifest.files
    if chosen.location.is_local:
        problems = check_files(chosen.folder, files, files)
    else:
        chosen = replace(chosen, copy=Scratch.make(COPY))
        with _discarding(chosen):
            problems = download(chosen.location, chosen.manifest, files, chosen.folder)
    if problems:
        chosen.discard_copy()
        raise NoCheckpointError(
            f"{chosen.location} is damaged: {problems[0]}", "Resume the run, which falls back to an intact one, or export another --step."
        )
    return chosen


def list_checkpoints(run: RunFolder) -> list[Checkpoint]:
    """Committed checkpoints, oldest first; only their manifests are read, damaged ones are left out."""
    checkpoints = checkpoints_of(run)
    read = [(entry.name, checkpoints.read(entry.name)) for entry in checkpoints.committed()]
    return [Checkpoint(checkpoints.location(name), manifest) for name, manifest in read if isinstance(manifest, Manifest)]


def _selectable(run: RunFolder, checkpoints: Checkpoints, attempt: int) -> tuple[list[str], list[int]]:
    """Names of committed checkpoints, newest first, after what earlier attempts left half-done is finished or undone; and the steps at which
    the run has ever committed one."""
    events = run.read_events()
    for name in checkpoints.tidy(attempt, committed_by(events)):
        _quarantine(run, name, [Problem(MANIFEST, "missing")], attempt)
    return [entry.name for entry in reversed(checkpoints.committed())], [e["step"] for e in events if e["kind"] == "checkpoint_committed"]


def _obtain(
    ranks: Ranks, location: Location, manifest: Manifest, config: RunConfig | None, on_piece: Callable[[], None]
) -> tuple[Scratch | None, list[Problem]]:
    """What is wrong with any file. On a shared file system each is re-hashed by one rank; out of a store every node gets what its ranks need."""
    if location.is_local:
        return None, _verify_together(ranks, location.path, manifest, on_piece)
    is_same = config is not None and has_same_layout(manifest, config, ranks.world_size)

    def needs(rank: int) -> list[str]:
        return [name for name in manifest.files if not is_same or rank_of(name) in (None, rank)]

    copy, found = copy_to_nodes(ranks, location, manifest, needs, on_piece)
    with _discarding(Checkpoint(location, manifest, copy)):
        problems = _confirmed(ranks, location, found, lambda doubtful: _download_again(location, manifest, doubtful, on_piece))
    if problems:
        copy.remove()
    return copy, problems


def _download_again(location: Location, manifest: Manifest, names: list[str], on_piece: Callable[[], None]) -> list[Problem]:
    scratch = Scratch.make(COPY)
    try:
        return download(location, manifest, names, scratch.path, on_piece)
    finally:
        scratch.remove()


@contextmanager
def _discarding(checkpoint: Checkpoint) -> Generator[None]:
    """Discard its copy when the block fails: nobody gets to know of it."""
    try:
        yield
    except BaseException:
        checkpoint.discard_copy()
        raise


def rank_of(name: str) -> int | None:
    """The rank whose partition a file of DeepSpeed's is; None of what all ranks read."""
    match = _RANK_FILE.search(name)
    return int(match[1]) if match else None


def _verify_together(ranks: Ranks, folder: Path, manifest: Manifest, on_piece: Callable[[], None]) -> list[Problem]:
    """Re-hash the files, each on one rank; every rank gets all problems."""
    part = shares(manifest.files, ranks.world_size)[ranks.rank]
    found = ranks.all_do("verify the checkpoint", lambda: check_files(folder, manifest.files, part, on_piece))
    return _confirmed(ranks, Location.at(folder), found, lambda names: check_files(folder, manifest.files, names, on_piece))


def _confirmed(ranks: Ranks, folder: Location, found: list[list[Problem]], check: Callable[[list[str]], list[Problem]]) -> list[Problem]:
    """All problems that ranks have `found`, once another rank has found them too with `check`: far away, for ranks of a node are neighbours, and
    a node that reads badly must not cost the run its checkpoints.

    Raises:
        StorageUnreachableError: what is damaged for one rank is intact for another.
    """
    damaged, half = [{problem.file for problem in problems} for problems in found], ranks.world_size // 2
    if not any(damaged):
        return []
    again = ranks.all_do("verify the checkpoint again", lambda: check(sorted(damaged[(ranks.rank + half) % ranks.world_size])))
    for rank, names in enumerate(damaged):
        other = (rank - half) % ranks.world_size
        if healed := names - {problem.file for problem in again[other]}:
            raise StorageUnreachableError(
                f"rank {rank} finds {folder / min(healed)} damaged, and rank {other} finds it intact",
                f"Check memory, mount and disk of the node of rank {rank}, then `maskwright resume` the run.",
            )
    return [problem for problems in found for problem in problems]


def _quarantine(run: RunFolder, name: str, problems: list[Problem], attempt: int) -> None:
    aside = checkpoints_of(run).set_aside(name, "damaged", attempt)
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
