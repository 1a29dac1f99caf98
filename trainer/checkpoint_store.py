"""Where checkpoints lie and what their names say: `Checkpoints`, and its form for folders of a shared file system. Committing is a rename (R1).

Names: `step-N` is committed; `step-N.partial-A` is a save (or a removal) that attempt A did not finish; `step-N.damaged-A` was found damaged by
attempt A; `step-N.rewound-A` is of a history that attempt A went back behind; `step-N.replaced-A` exists for a moment while A commits a step
that was committed before.
"""

import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from data_pipeline.errors import ConflictError, StorageError
from data_pipeline.storage import Location, storage_errors, sync_folder
from trainer.manifest import MANIFEST, Manifest, Problem, read_manifest, write_manifest
from trainer.runlog import RunFolder

_NAME = re.compile(r"step-(\d{8,})(?:\.(partial|damaged|replaced|rewound)-(\d+))?")


@dataclass(frozen=True)
class Entry:
    """A name in the checkpoints folder, taken apart; `kind` is empty for a committed checkpoint."""

    name: str
    step: int
    kind: str
    attempt: int


def name_of(step: int) -> str:
    """Of a committed checkpoint."""
    return f"step-{step:08d}"


def step_of(name: str) -> int:
    """Of a committed checkpoint's name."""
    return int(name.removeprefix("step-"))


class Checkpoints(Protocol):
    """The checkpoints of a run. Nothing here is collective: rank 0 calls it, or a process without ranks."""

    def entries(self) -> list[Entry]:
        """All that is there."""
        ...

    def committed(self) -> list[Entry]:
        """Committed checkpoints, by step."""
        ...

    def location(self, name: str) -> Location:
        """Of an entry."""
        ...

    def read(self, name: str) -> Manifest | Problem:
        """The manifest of a committed checkpoint, or what is wrong with it. Errors as `read_manifest` has them."""
        ...

    def part(self, step: int, attempt: int) -> Location:
        """Where an attempt's files of a save go."""
        ...

    def free_bytes(self) -> int | None:
        """Bytes that can still be written; None where nobody can say."""
        ...

    def publish(self, manifest: Manifest) -> None:
        """Commit a save whose files all are in `part`. A step that was committed before is replaced.

        Raises:
            ConflictError: a newer attempt has committed this step.
            StorageError: a file is missing, or is not what was sent.
        """
        ...

    def set_aside(self, name: str, kind: str, attempt: int) -> str:
        """Make a committed checkpoint unselectable and keep it; returns its new name."""
        ...

    def remove(self, name: str, attempt: int) -> None:
        """Remove a committed checkpoint. Unselectable first, then gone: a removal that is killed must not look like damage."""
        ...

    def tidy(self, attempt: int, committed: Mapping[int, int]) -> list[str]:
        """Finish or undo what this attempt and earlier ones left half-done. Not while a save of this attempt is under way.

        What looks like a save that was not finished, although it is `committed` (the attempt, by step), stays: returns the names of those.
        """
        ...


class FolderCheckpoints:
    """The checkpoints folder of a run on a shared file system. See `Checkpoints`."""

    def __init__(self, run: RunFolder) -> None:
        self._location = run.checkpoints

    def entries(self) -> list[Entry]:
        names = sorted(os.listdir(self._folder)) if self._folder.is_dir() else []
        matches = [(name, match) for name in names if (match := _NAME.fullmatch(name))]
        return [Entry(name, int(match[1]), match[2] or "", int(match[3] or 0)) for name, match in matches]

    def committed(self) -> list[Entry]:
        return sorted((entry for entry in self.entries() if not entry.kind), key=lambda entry: entry.step)

    def location(self, name: str) -> Location:
        return self._location / name

    def read(self, name: str) -> Manifest | Problem:
        manifest = read_manifest(self._folder / name)
        if isinstance(manifest, Manifest) and name != name_of(manifest.step):
            return Problem(MANIFEST, f"is of step {manifest.step}")
        return manifest

    def part(self, step: int, attempt: int) -> Location:
        return self._location / f"{name_of(step)}.partial-{attempt}"

    def free_bytes(self) -> int | None:
        folder = next(folder for folder in (self._folder, *self._folder.parents) if folder.is_dir())
        return shutil.disk_usage(folder).free

    def publish(self, manifest: Manifest) -> None:
        """The manifest last, then the rename. Tried again after the rename, it has nothing left to do but to make it durable."""
        part, target = self.part(manifest.step, manifest.attempt).path, self._folder / name_of(manifest.step)
        aside = target.with_name(f"{target.name}.replaced-{manifest.attempt}")
        if target.exists() and self.read(target.name) == manifest:
            sync_folder(self._folder)
            shutil.rmtree(aside, ignore_errors=True)
            return
        _require_files(part, manifest)
        write_manifest(part, manifest)
        for folder in {part, *((part / name).parent for name in manifest.files)}:
            sync_folder(folder)
        if target.exists():
            require_older(self.read(target.name), manifest)
            target.rename(aside)  # killed here: `tidy` gives the old one its name back
        part.rename(target)
        sync_folder(self._folder)
        shutil.rmtree(aside, ignore_errors=True)

    def set_aside(self, name: str, kind: str, attempt: int) -> str:
        aside = self._folder / f"{name}.{kind}-{attempt}"
        shutil.rmtree(aside, ignore_errors=True)
        (self._folder / name).rename(aside)
        sync_folder(self._folder)
        return aside.name

    def remove(self, name: str, attempt: int) -> None:
        doomed = self._folder / f"{name}.partial-{attempt}"
        shutil.rmtree(doomed, ignore_errors=True)
        (self._folder / name).rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)

    def tidy(self, attempt: int, committed: Mapping[int, int]) -> list[str]:
        """Of those that stay there are none: a folder is committed by its name, also without a manifest."""
        del committed
        entries = self.entries()
        there = {entry.step for entry in entries if not entry.kind}
        with storage_errors(str(self._folder)):
            for entry in entries:
                if entry.kind == "replaced" and entry.step not in there:  # killed between the two renames of `publish`
                    (self._folder / entry.name).rename(self._folder / name_of(entry.step))
                elif entry.kind == "replaced" or (entry.kind == "partial" and entry.attempt <= attempt):
                    # A rank of that attempt may still be dying, and write: what cannot be removed now cannot be selected either.
                    shutil.rmtree(self._folder / entry.name, ignore_errors=True)
        return []

    @property
    def _folder(self) -> Path:
        return self._location.path


def checkpoints_of(run: RunFolder) -> Checkpoints:
    """The checkpoints of a run, wherever it lies."""
    if run.checkpoints.is_local:
        return FolderCheckpoints(run)
    from trainer.object_checkpoints import ObjectCheckpoints

    return ObjectCheckpoints(run)


def require_older(there: Manifest | Problem, manifest: Manifest) -> None:
    """Refuse to replace what a newer attempt has committed (R10).

    Raises:
        ConflictError: it has.
    """
    if isinstance(there, Manifest) and there.attempt > manifest.attempt:
        raise ConflictError(
            f"attempt {there.attempt} has committed step {manifest.step}; attempt {manifest.attempt} is superseded",
            "Follow the run with `maskwright status`.",
        )


def _require_files(part: Path, manifest: Manifest) -> None:
    for name, file in manifest.files.items():
        path = part / name
        if not path.is_file() or path.stat().st_size != file.bytes:
            raise StorageError(
                f"another rank wrote {name}, but rank 0 does not see it in {part}: the storage is not shared", "Use a path that all workers share."
            )
