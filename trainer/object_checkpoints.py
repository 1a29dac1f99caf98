"""`ObjectCheckpoints`, checkpoints in a store that cannot rename: files in `step-N/attempt-A/`; `step-N/MANIFEST.json`, written last, commits.

What is set aside keeps its files; its manifest is called `MANIFEST.damaged-A.json` or `MANIFEST.rewound-A.json`.
"""

import hashlib
import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

from data_pipeline.errors import NotFoundError, StorageError
from data_pipeline.storage import Location, json_bytes
from trainer.checkpoint_store import Entry, name_of, require_older
from trainer.manifest import MANIFEST, FileDigest, Manifest, Problem, nothing, parse_manifest
from trainer.runlog import RunFolder

_STEP = re.compile(r"step-(\d{8,})")
_ASIDE = re.compile(r"MANIFEST\.(damaged|rewound)-(\d+)\.json")
_PART = re.compile(r"attempt-(\d+)")
_READ_BYTES = 4 << 20


class ObjectCheckpoints:
    """The checkpoints of a run in a store. See `Checkpoints` for what each method does; a listing is of a folder, never of all files."""

    def __init__(self, run: RunFolder) -> None:
        self._location = run.checkpoints

    def entries(self) -> list[Entry]:
        """A listing for each step that is there."""
        found: list[Entry] = []
        for name in self._location.children():
            if match := _STEP.fullmatch(name):
                step = int(match[1])
                for child in (self._location / name).children():
                    if child == MANIFEST:
                        found.append(Entry(name, step, "", 0))
                    elif aside := _ASIDE.fullmatch(child):
                        found.append(Entry(f"{name}/{child}", step, aside[1], int(aside[2])))
                    elif part := _PART.fullmatch(child):
                        found.append(Entry(f"{name}/{child}", step, "partial", int(part[1])))
        return found

    def committed(self) -> list[Entry]:
        return sorted((entry for entry in self.entries() if not entry.kind), key=lambda entry: entry.step)

    def location(self, name: str) -> Location:
        return self._location / name

    def read(self, name: str) -> Manifest | Problem:
        manifest = self._read(self._location / name / MANIFEST)
        if isinstance(manifest, Manifest) and name != name_of(manifest.step):
            return Problem(MANIFEST, f"is of step {manifest.step}")
        return manifest

    def part(self, step: int, attempt: int) -> Location:
        return self._location / name_of(step) / f"attempt-{attempt}"

    def free_bytes(self) -> int | None:
        return None

    def publish(self, manifest: Manifest) -> None:
        """The manifest last: with it, and at once, the files count. A newer attempt's stays, also one that comes while this is under way (in stores
        other than S3 only where it is the first of its step).
        """
        name, part = name_of(manifest.step), self.part(manifest.step, manifest.attempt)
        fs, path = part.filesystem()
        fs.invalidate_cache()
        sizes: dict[str, int] = {str(file)[len(path) + 1 :]: info["size"] for file, info in fs.find(path, detail=True).items()}  # pyright: ignore
        for file, digest in manifest.files.items():
            if sizes.get(file) != digest.bytes:
                raise StorageError(f"{part}/{file} has {sizes.get(file, 0)} bytes instead of {digest.bytes}", "Check the store, then resume the run.")
        stored = replace(manifest, files={f"{part.name}/{file}": digest for file, digest in manifest.files.items()})
        data, replaced = json_bytes(stored.to_json()), list[Manifest | Problem]()

        def commit(held: bytes | None) -> bytes:
            replaced[:] = [] if held is None else [parse_manifest(held, MANIFEST)]
            for before in replaced:
                require_older(before, manifest)
            return data

        (self._location / name / MANIFEST).rewrite(commit)
        for before in replaced:
            if isinstance(before, Manifest) and before.attempt != manifest.attempt:
                self.part(manifest.step, before.attempt).remove()

    def set_aside(self, name: str, kind: str, attempt: int) -> str:
        folder, aside = self._location / name, f"MANIFEST.{kind}-{attempt}.json"
        try:
            data = (folder / MANIFEST).read_bytes()
        except NotFoundError:  # one way of being damaged; an empty one in its place keeps the files from being taken for an unfinished save
            data = b""
        (folder / aside).write_bytes(data)
        (folder / MANIFEST).remove()
        return f"{name}/{aside}"

    def remove(self, name: str, attempt: int) -> None:
        del attempt
        (self._location / name / MANIFEST).remove()
        (self._location / name).remove()

    def tidy(self, attempt: int, committed: Mapping[int, int]) -> list[str]:
        """Remove files of earlier attempts that no manifest names; where a manifest cannot be read they stay."""
        entries = self.entries()
        there = {entry.step for entry in entries if not entry.kind}
        lost: list[str] = []
        for entry in self._unnamed(entries):
            if committed.get(entry.step) == entry.attempt and entry.step not in there:
                lost.append(name_of(entry.step))
            elif entry.attempt <= attempt:
                with suppress(Exception):  # a rank of that attempt may still be dying, and write: the next attempt tries again
                    (self._location / entry.name).remove()
        return lost

    def _unnamed(self, entries: list[Entry]) -> list[Entry]:
        """Files of attempts that no manifest of their step names, of those steps whose manifests can all be read."""
        named: dict[int, list[Manifest | Problem]] = {}
        for entry in entries:
            if entry.kind != "partial":
                path = self._location / entry.name
                named.setdefault(entry.step, []).append(self._read(path / MANIFEST if not entry.kind else path))
        attempts = {step: {manifest.attempt for manifest in manifests if isinstance(manifest, Manifest)} for step, manifests in named.items()}
        known = {step for step, manifests in named.items() if all(isinstance(manifest, Manifest) for manifest in manifests)}
        partial = [entry for entry in entries if entry.kind == "partial" and (entry.step in known or entry.step not in named)]
        return [entry for entry in partial if entry.attempt not in attempts.get(entry.step, set())]

    def _read(self, file: Location) -> Manifest | Problem:
        try:
            return parse_manifest(file.read_bytes(), str(file))
        except NotFoundError:
            return Problem(MANIFEST, "missing")


def download(folder: Location, manifest: Manifest, names: Iterable[str], target: Path, on_piece: Callable[[], None] = nothing) -> list[Problem]:
    """Copy files of a committed checkpoint into a local folder, hashing what comes; a file that comes damaged is read once more.

    They lie in `target` as in a checkpoint's folder of a shared file system. `on_piece` is called before each piece that is written.
    """
    problems: list[Problem] = []
    for name in names:
        path = target / local_name(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        once = partial(_download, folder / name, path, manifest.files[name], on_piece)
        problem = once() and once()
        if problem is not None:
            problems.append(Problem(name, problem))
    return problems


def local_name(name: str) -> str:
    """A file's path within a checkpoint, whatever the attempt."""
    head, _, rest = name.partition("/")
    return rest if _PART.fullmatch(head) else name


def _download(file: Location, path: Path, expected: FileDigest, on_piece: Callable[[], None]) -> str | None:
    digest, num_bytes = hashlib.sha256(), 0
    with path.open("wb") as copy:
        try:
            with file.open_binary() as source:
                while part := source.read(_READ_BYTES):
                    on_piece()
                    digest.update(part)
                    copy.write(part)
                    num_bytes += len(part)
        except FileNotFoundError:
            return "missing"
    if num_bytes != expected.bytes:
        return f"has {num_bytes} bytes instead of {expected.bytes}"
    if digest.hexdigest() != expected.sha256:
        return f"sha256 is {digest.hexdigest()[:12]}… instead of {expected.sha256[:12]}…"
    return None
