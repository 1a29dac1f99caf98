"""What can be removed from a storage without losing anything that counts: finds it, and removes it (reads and removes files in storage)."""

import os
import re
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import cast

from data_pipeline.block_cache import BlockCache
from data_pipeline.claims import claimed, is_claimed
from data_pipeline.config import DataConfig
from data_pipeline.errors import ConflictError, MaskwrightError
from data_pipeline.index import MANIFEST
from data_pipeline.mixture import MIXTURE
from data_pipeline.partitions import WORK
from data_pipeline.storage import Location, storage_errors
from launcher.lease import Lease, user_of
from launcher.node_storage import TRIAL
from launcher.runs import read_config, run_ids
from launcher.submission import waiting_submission
from trainer.checkpoint_store import Entry, checkpoints_of
from trainer.manifest import MANIFEST as CHECKPOINT_MANIFEST
from trainer.manifest import Manifest, Problem, parse_manifest
from trainer.retention import committed_by
from trainer.runlog import RunFolder

_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{8}\.tmp")
_CACHE = ".cache"
_TRIAL_S = 3600.0
CLAIM = "claim.json"
WHY = {
    "partial": "a save that was not finished",
    "damaged": "a checkpoint that was found damaged",
    "rewound": "a checkpoint that training went back behind",
    "replaced": "a checkpoint that was committed anew",
    "temporary": "a file whose writer was killed",
    "corpus": "a corpus that no run of this storage uses",
    "unfinished-corpus": "a corpus whose preparation was ended",
    "trial": "what `maskwright doctor` tried the storage with, an hour ago or more",
    "cache": "copies, which are made again when they are needed",
}
"""Kinds of leftovers, and what they are."""


@dataclass(frozen=True)
class Leftover:
    """A file or folder that may go."""

    location: Location
    kind: str
    """One of `WHY`."""
    bytes: int
    run: RunFolder | None = None
    """Whose it is: it goes only while nobody drives that run."""


@dataclass(frozen=True)
class Found:
    """What may go, and what was not looked at."""

    leftovers: list[Leftover]
    passed_over: dict[str, str]
    """Why, by name."""


def in_use(run: RunFolder) -> bool:
    """Whether somebody drives a run, profiles it, or is about to: a job that waits knows by the number of its lease whether it is still wanted."""
    return user_of(run) is not None or waiting_submission(run) is not None


def find_in_run(run: RunFolder) -> list[Leftover]:
    """Leftovers of a run that nobody drives. Committed checkpoints are none, nor, while there is no committed one, what was set aside."""
    folders = list(_set_aside(run) if run.checkpoints.is_local else _set_aside_in_store(run))
    folders += [(run.models / name, "partial") for name in run.models.children() if name.endswith(".partial")]
    inside = {folder.url for folder, _ in folders}
    files = [(file, "temporary") for file in _temporary(run.root) if not inside & {str(parent) for parent in file.path.parents}]
    return [_leftover(location, kind, run) for location, kind in [*folders, *files] if _is_own(location, run.root.parent)]


def _set_aside(run: RunFolder) -> Iterator[tuple[Location, str]]:
    """Folders of the checkpoints folder, and their kinds."""
    entries = checkpoints_of(run).entries()
    committed = {entry.step for entry in entries if not entry.kind and (run.checkpoints / entry.name / CHECKPOINT_MANIFEST).exists()}
    for entry in entries:
        if entry.kind == "partial" or (entry.kind and (entry.step in committed if entry.kind == "replaced" else committed)):
            yield run.checkpoints / entry.name, entry.kind


def _set_aside_in_store(run: RunFolder) -> Iterator[tuple[Location, str]]:
    """Manifests that were set aside, then files that no committed manifest names. A step whose committed manifest cannot be read is left alone.

    Files whose own manifest was lost, by the word of the run's events or of what was set aside in its place, are a damaged checkpoint.
    """
    entries, vouched = checkpoints_of(run).entries(), committed_by(run.read_events())
    any_committed = any(not entry.kind for entry in entries)
    for step, group in groupby(sorted(entries, key=lambda entry: (entry.step, entry.name)), key=lambda entry: entry.step):
        there = list(group)
        manifests = [(entry.kind, _manifest(run, entry)) for entry in there if entry.kind != "partial"]
        readable = [(kind, manifest.attempt) for kind, manifest in manifests if isinstance(manifest, Manifest)]
        lost = len(readable) < len(manifests)
        if lost and any(not kind and isinstance(manifest, Problem) for kind, manifest in manifests):
            continue
        kinds = {attempt: kind for kind, attempt in sorted(readable, reverse=True)}  # committed last: it counts
        for entry in there:
            unnamed = "damaged" if lost or vouched.get(step) == entry.attempt else "partial"
            kind = kinds.get(entry.attempt, unnamed) if entry.kind == "partial" else entry.kind
            if kind == "partial" or (kind and any_committed):
                yield run.checkpoints / entry.name, kind


def _manifest(run: RunFolder, entry: Entry) -> Manifest | Problem:
    file = run.checkpoints / entry.name
    return checkpoints_of(run).read(entry.name) if not entry.kind else parse_manifest(file.read_bytes(), str(file))


def find_in_storage(storage: Location) -> Found:
    """Leftovers of every run in a storage, of its corpora, and the caches of this node. What runs is passed over."""
    leftovers: list[Leftover] = []
    passed_over: dict[str, str] = {}
    leftovers += _trials(storage)
    runs = [RunFolder(storage / name) for name in run_ids(storage)]
    for run in runs:
        if not in_use(run):
            leftovers += find_in_run(run)
        else:
            passed_over[run.root.name] = "it runs, is profiled, or waits on a cluster"
    shared = "corpora and caches"
    if passed_over:
        passed_over[shared] = "a run may use them just now"
    elif not runs:
        passed_over[shared] = "no run lies in this storage: those that use its corpora may lie in another"
    else:
        try:
            leftovers += [*_corpora(storage, _used(storage)), *_caches(storage, runs)]
        except MaskwrightError as error:
            passed_over[shared] = f"not every run can be read: {error.cause}"
    return Found(leftovers, passed_over)


def corpora_of(run: RunFolder) -> set[str]:
    """Names of the corpora that a run has trained on, those of a mixture included."""
    events = run.read_events()
    folders = [Location(event["corpus"]) for event in events if event["kind"] == "stage_finished" and event.get("corpus")]
    parts = [part["corpus"] for folder in folders if (folder / MIXTURE).exists() for part in (folder / MIXTURE).read_json()["corpora"]]
    return {*parts, *(folder.name for folder in folders)}


def remove(leftover: Leftover, storage: Location) -> None:
    """Remove one leftover, while nobody can begin to use it.

    Raises:
        ConflictError: somebody uses it by now. StorageError: it cannot be removed.
    """
    if leftover.run is not None and in_use(leftover.run):
        raise ConflictError(f"run {leftover.run.root.name} is in use by now", "Run `maskwright clean` again later.")
    with storage_errors(str(leftover.location)), _held(leftover):
        if leftover.kind == "corpus" and leftover.location.name in _used(storage):
            raise ConflictError(f"a run uses {leftover.location} by now", "Nothing has to be done.")
        if leftover.kind == "cache" and leftover.location.parent != storage / "corpora":
            BlockCache(leftover.location.path, 0).clear()
            return
        for manifest in (MANIFEST, MIXTURE):  # first: what is killed here must not leave a corpus that looks whole
            (leftover.location / manifest).remove()
        leftover.location.remove()


def _held(leftover: Leftover) -> AbstractContextManager[object]:
    """The lease of its run, or the claim of the corpus."""
    if leftover.run is not None:
        return Lease.acquire(leftover.run)
    if leftover.kind in {"corpus", "unfinished-corpus"}:
        return claimed(leftover.location / CLAIM, f"corpus {leftover.location.name}")
    return nullcontext()


def _used(storage: Location) -> set[str]:
    """Names of the corpora that the runs of a storage have trained on."""
    return {name for run in run_ids(storage) for name in corpora_of(RunFolder(storage / run))}


def _corpora(storage: Location, used: set[str]) -> Iterator[Leftover]:
    for name in (storage / "corpora").children():
        folder = storage / "corpora" / name
        if name.startswith(".") or name in used or is_claimed(folder / CLAIM) or not _is_own(folder, storage):
            continue
        if (folder / MANIFEST).exists() or (folder / MIXTURE).exists():
            yield _leftover(folder, "corpus")
        elif (folder / CLAIM).exists() or (folder / WORK).exists():
            yield _leftover(folder, "unfinished-corpus")


def _caches(storage: Location, runs: list[RunFolder]) -> Iterator[Leftover]:
    """Of the storage, and of this node: the default one and those that runs name."""
    own = storage / "corpora" / _CACHE
    if own.exists() and _is_own(own, storage):
        yield _leftover(own, "cache")
    for cache in sorted({BlockCache.of(settings).folder for settings in [DataConfig(), *(read_config(run).data for run in runs)]}):
        if (held := BlockCache(cache, 0).held_bytes()) > 0:
            yield Leftover(Location.at(cache), "cache", held)


def _trials(storage: Location) -> Iterator[Leftover]:
    """A doctor is at work for some minutes. In a store a folder has no time of its own, and is listed all the same."""
    for folder in (storage / name for name in storage.children() if name.startswith(TRIAL)):
        with suppress(FileNotFoundError):  # one that is at work has just removed it
            if _is_own(folder, storage) and (not folder.is_local or folder.path.stat().st_mtime < time.time() - _TRIAL_S):
                yield _leftover(folder, "trial")


def _temporary(folder: Location) -> Iterator[Location]:
    if not folder.is_local:
        return
    for root, _, files in os.walk(folder.path):
        yield from (Location.at(Path(root) / name) for name in sorted(files) if _TEMPORARY.fullmatch(name))


def _leftover(location: Location, kind: str, run: RunFolder | None = None) -> Leftover:
    return Leftover(location, kind, _bytes(location), run)


def _bytes(location: Location) -> int:
    fs, path = location.filesystem()
    return cast("int", fs.du(path, total=True))


def _is_own(folder: Location, storage: Location) -> bool:
    """Whether it lies in the storage, is no link and not behind one that leads out of it."""
    return not folder.is_local or (not folder.path.is_symlink() and folder.path.resolve().is_relative_to(storage.path.resolve()))
