"""Checkpoints: a save becomes selectable all at once (R1), and only an intact one is resumed from (R2). Owns `checkpoints/` of a run.

Names in that folder: `step-N` is committed; `step-N.partial-A` is a save (or a removal) that attempt A did not finish; `step-N.damaged-A`
was found damaged by attempt A; `step-N.replaced-A` exists for a moment while A commits a step that was committed before.
"""

import os
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save

from data_pipeline.errors import ConfigError, NoCheckpointError, NotFoundError, StorageError
from data_pipeline.storage import Location, storage_errors, sync_folder
from trainer.agreement import Ranks
from trainer.config import RunConfig
from trainer.manifest import MANIFEST, Circumstances, FileDigest, Manifest, Problem, check_files, fsync_file, read_manifest, shares, write_manifest
from trainer.runlog import RunFolder
from trainer.state import TrainState

ZERO_FOLDER = "zero"
STATE_FILE = "state.json"
PROBE_FILE = "probe.safetensors"
_NAME = re.compile(r"step-(\d{8,})(?:\.(partial|damaged|replaced)-(\d+))?")
_RANK_FILE = re.compile(r"zero_pp_rank_(\d+)_")


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


@dataclass(frozen=True)
class _Entry:
    """A name in the checkpoints folder, taken apart; `kind` is empty for a committed checkpoint."""

    name: str
    step: int
    kind: str
    attempt: int


def commit(
    run: RunFolder,
    state: TrainState,
    *,
    attempt: int,
    config: RunConfig,
    rank: int,
    world_size: int,
    write_rank_files: Callable[[Path], None],
    probe: Callable[[], dict[str, torch.Tensor]],
    group: dist.ProcessGroup | None,
    timeout_s: float = 600.0,
) -> float:
    """Save a checkpoint on every rank and commit it; returns the seconds for which training stood still.

    Every rank calls this between two optimizer steps. `write_rank_files` gets the folder for DeepSpeed's files; `probe` returns a fixed
    input and the engine's logits for it (both are called on every rank, since ZeRO 3 needs all of them for a forward pass). `group` is a
    gloo group that nothing else uses, from `agreement_group`. Until the rename at the end nothing is selectable; a failure on one rank
    is raised on all of them and the partial save is removed.

    Raises:
        StorageError: storage is full, unwritable or not shared, on any rank.
        MaskwrightError: a rank failed otherwise, or did not finish within `timeout_s`.
    """
    started_at = time.monotonic()
    ranks = Ranks(rank, world_size, group, timeout_s)
    partial = _folder(run) / f"step-{state.step:08d}.partial-{attempt}"
    ranks.rank_zero_does("prepare the checkpoint folder", lambda: _prepare(run, partial, attempt))
    try:
        receipts = ranks.all_do("write its part of the checkpoint", lambda: _write_part(partial, state, rank, write_rank_files, probe))
        circumstances = Circumstances.now(world_size=world_size, zero_stage=config.zero.stage, precision=config.precision)
        files = {name: file for receipt in receipts for name, file in sorted(receipt.items())}
        manifest = Manifest(attempt, circumstances, files, state, config.model_dump(mode="json"))
        ranks.rank_zero_does("commit the checkpoint", lambda: _publish(run, manifest, partial, config.checkpoint.keep_last, started_at))
    except Exception:
        if rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    return time.monotonic() - started_at


def newest_usable(
    run: RunFolder,
    *,
    rank: int,
    world_size: int,
    attempt: int,
    group: dist.ProcessGroup | None,
    timeout_s: float = 600.0,
) -> Checkpoint | None:
    """The newest checkpoint that is complete and intact, the same on every rank; None when the run has none yet.

    The files are re-hashed, each by one rank. A damaged checkpoint is renamed to `step-N.damaged-<attempt>` with an event that names the
    file and the cause, and the one before it is tried. Ask `has_same_layout` how to load it.

    Raises:
        NoCheckpointError: there were checkpoints, and none is intact.
        EnvironmentMismatchError: the newest one was written by a newer release.
    """
    ranks = Ranks(rank, world_size, group, timeout_s)
    steps = ranks.rank_zero_does("list the checkpoints", lambda: _tidy(run, attempt))
    for name in steps:
        folder = _folder(run) / name
        manifest = ranks.rank_zero_does("read the manifest", lambda f=folder: _read_named(f))
        problems = _verify_together(ranks, folder, manifest) if isinstance(manifest, Manifest) else [manifest]
        if isinstance(manifest, Manifest) and not problems:
            return Checkpoint(folder, manifest)
        ranks.rank_zero_does("set the damaged checkpoint aside", lambda f=folder, p=problems: _quarantine(run, f, p, attempt))
    if ranks.rank_zero_does("look for damaged checkpoints", lambda: any(entry.kind == "damaged" for entry in _entries(run))):
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
    found: list[Checkpoint] = []
    for entry in _entries(run):
        if not entry.kind and isinstance(manifest := read_manifest(_folder(run) / entry.name), Manifest):
            found.append(Checkpoint(_folder(run) / entry.name, manifest))
    return sorted(found, key=lambda checkpoint: checkpoint.step)


def _folder(run: RunFolder) -> Path:
    if not run.checkpoints.is_local:
        raise ConfigError(
            f"storage {run.root} is a URL; checkpoints need a folder that all workers share (a local or POSIX-shared path) for now",
            "Set `storage` to such a path.",
        )
    return run.checkpoints.path


def _entries(run: RunFolder) -> list[_Entry]:
    names = sorted(os.listdir(_folder(run))) if _folder(run).is_dir() else []
    matches = [(name, match) for name in names if (match := _NAME.fullmatch(name))]
    return [_Entry(name, int(match[1]), match[2] or "", int(match[3] or 0)) for name, match in matches]


def _read_named(folder: Path) -> Manifest | Problem:
    manifest = read_manifest(folder)
    if isinstance(manifest, Manifest) and folder.name != f"step-{manifest.step:08d}":
        return Problem(MANIFEST, f"is of step {manifest.step}")
    return manifest


def _verify_together(ranks: Ranks, folder: Path, manifest: Manifest) -> list[Problem]:
    """Re-hash the files, each on one rank; every rank gets all problems."""
    part = shares(manifest.files, ranks.world_size)[ranks.rank]
    found = ranks.all_do("verify the checkpoint", lambda: check_files(folder, manifest.files, part))
    return [problem for problems in found for problem in problems]


def _tidy(run: RunFolder, attempt: int) -> list[str]:
    """Finish or undo what earlier attempts left half-done; returns the names of committed checkpoints, newest first."""
    entries = _entries(run)
    committed = {entry.step: entry.name for entry in entries if not entry.kind}
    for entry in entries:
        folder = _folder(run) / entry.name
        if entry.kind == "replaced" and entry.step not in committed:  # killed between the two renames of `_rename`
            committed[entry.step] = folder.name.split(".")[0]
            folder.rename(folder.with_name(committed[entry.step]))
        elif entry.kind == "replaced" or (entry.kind == "partial" and entry.attempt <= attempt):
            shutil.rmtree(folder)
    return [committed[step] for step in sorted(committed, reverse=True)]


def _prepare(run: RunFolder, partial: Path, attempt: int) -> None:
    with storage_errors(str(partial)):
        _tidy(run, attempt)
        (partial / ZERO_FOLDER).mkdir(parents=True)


def _write_part(
    partial: Path, state: TrainState, rank: int, write_rank_files: Callable[[Path], None], probe: Callable[[], dict[str, torch.Tensor]]
) -> dict[str, FileDigest]:
    """Write this rank's files durably; returns their sizes and digests by path relative to the checkpoint."""
    with storage_errors(str(partial)):
        write_rank_files(partial / ZERO_FOLDER)
        logits = probe()
        if rank == 0:
            Location.at(partial / PROBE_FILE).write_bytes(save({name: tensor.detach().cpu().contiguous() for name, tensor in logits.items()}))
            Location.at(partial / STATE_FILE).write_json(state.to_json())
        own = [path for path in sorted(partial.rglob("*")) if path.is_file() and _writer(path.name) == rank]
        receipt: dict[str, FileDigest] = {}
        for path in own:
            fsync_file(path)
            receipt[path.relative_to(partial).as_posix()] = FileDigest.of(path)
        return receipt


def _writer(name: str) -> int:
    """The rank that wrote a file, from DeepSpeed's naming: partitions carry their rank, rank 0 writes the rest."""
    match = _RANK_FILE.search(name)
    return int(match[1]) if match else 0


def _publish(run: RunFolder, manifest: Manifest, partial: Path, keep_last: int, started_at: float) -> None:
    """Rank 0's part: the manifest last, then the rename that commits, then retention."""
    target = partial.with_name(f"step-{manifest.step:08d}")
    for name, file in manifest.files.items():
        path = partial / name
        if not path.is_file() or path.stat().st_size != file.bytes:
            raise StorageError(
                f"rank {_writer(path.name)} wrote {name}, but rank 0 does not see it in {partial}: the storage is not shared",
                "Use a path that all workers share.",
            )
    write_manifest(partial, manifest)
    for folder in (partial / ZERO_FOLDER, partial):
        sync_folder(folder)
    _rename(partial, target, manifest.attempt)
    run.append_event(
        "checkpoint_committed",
        attempt=manifest.attempt,
        step=manifest.step,
        name=target.name,
        bytes=manifest.num_bytes,
        seconds=round(time.monotonic() - started_at, 3),
    )
    _retain(run, target, keep_last, manifest.attempt)


def _rename(partial: Path, target: Path, attempt: int) -> None:
    """Give the finished save its name. A step that was committed before (by a history that was rewound) is replaced."""
    aside = target.with_name(f"{target.name}.replaced-{attempt}")
    if target.exists():
        target.rename(aside)  # killed here: `_tidy` gives the old one its name back
    partial.rename(target)
    sync_folder(target.parent)
    shutil.rmtree(aside, ignore_errors=True)


def _retain(run: RunFolder, newest: Path, keep_last: int, attempt: int) -> None:
    """Remove the oldest committed checkpoints; `newest`, just committed, is never one of them."""
    others = sorted((entry for entry in _entries(run) if not entry.kind and entry.name != newest.name), key=lambda entry: entry.step)
    for name in [entry.name for entry in others[: max(0, len(others) + 1 - keep_last)]]:
        # Not selectable first, then gone: a removal that is killed half-way must not look like a damaged checkpoint.
        doomed = newest.with_name(f"{name}.partial-{attempt}")
        newest.with_name(name).rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def _quarantine(run: RunFolder, folder: Path, problems: list[Problem], attempt: int) -> None:
    aside = folder.with_name(f"{folder.name}.damaged-{attempt}")
    shutil.rmtree(aside, ignore_errors=True)
    folder.rename(aside)
    sync_folder(folder.parent)
    first = problems[0]
    run.append_event(
        "checkpoint_damaged",
        attempt=attempt,
        step=int(folder.name.removeprefix("step-")),
        file=first.file,
        cause=str(first),
        problems=[str(problem) for problem in problems],
        moved_to=aside.name,
    )
