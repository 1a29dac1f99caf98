"""Re-hashes checkpoints and exported models wherever they lie, streaming; imports no torch."""

import hashlib
import json
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from data_pipeline.errors import EnvironmentMismatchError, NotFoundError
from data_pipeline.storage import Location
from trainer.manifest import MANIFEST, FileDigest, Manifest, Problem, read_manifest

LINEAGE = "lineage.json"
LINEAGE_VERSION = 1
_READ_BYTES = 4 << 20

Progress = Callable[[int, int], None]
"""Called with the bytes done and their total."""


def verify_checkpoint(folder: Location, progress: Progress) -> list[Problem]:
    """Everything that a checkpoint's manifest says and that is otherwise; empty when it is intact.

    Raises:
        EnvironmentMismatchError: a newer release wrote it.
        UnreachableError: its store gave no answer in time.
    """
    manifest = _read_manifest(folder)
    return verify_files(folder, manifest.files, progress) if isinstance(manifest, Manifest) else [manifest]


def verify_model(folder: Location, progress: Progress) -> list[Problem]:
    """The same of an exported model and its lineage. Errors as `verify_checkpoint` has them."""
    files = read_lineage(folder)
    return [files] if isinstance(files, Problem) else verify_files(folder, files, progress)


def read_lineage(folder: Location) -> dict[str, FileDigest] | Problem:
    """Size and digest of each file of an exported model, or what is wrong with its lineage.

    Raises:
        NotFoundError: there is no exported model.
        EnvironmentMismatchError: a newer release wrote it.
    """
    path = folder / LINEAGE
    try:
        data = path.read_bytes()
    except NotFoundError as error:
        raise NotFoundError(f"{folder} is not an exported model: it has no {LINEAGE}", "Run `maskwright export` or check the path.") from error
    try:
        lineage: Any = json.loads(data)
        if lineage["format_version"] > LINEAGE_VERSION:
            raise EnvironmentMismatchError(
                f"{path} has format_version {lineage['format_version']}; this release reads up to {LINEAGE_VERSION}",
                "Upgrade maskwright to the release that wrote it, or newer.",
            )
        if any(PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts for name in lineage["files"]):
            return Problem(LINEAGE, "names files outside its folder")
        return {name: FileDigest(**file) for name, file in lineage["files"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return Problem(LINEAGE, f"damaged: {error}")


def verify_files(folder: Location, files: dict[str, FileDigest], progress: Progress) -> list[Problem]:
    """Files that are not what they should be. What comes damaged out of a store is read once more before it counts."""
    problems: list[Problem] = []
    total, done = sum(file.bytes for file in files.values()), 0
    for name, expected in files.items():
        compare = partial(_compare, folder, name, expected, lambda num_bytes, before=done: progress(before + num_bytes, total))
        problem = compare()
        if problem is not None and not folder.is_local:
            problem = compare()
        if problem is not None:
            problems.append(problem)
        done += expected.bytes
        progress(done, total)
    return problems


def _compare(folder: Location, name: str, expected: FileDigest, progress: Callable[[int], None]) -> Problem | None:
    digest, num_bytes = hashlib.sha256(), 0
    try:
        with (folder / name).open_binary() as file:
            while part := file.read(_READ_BYTES):
                digest.update(part)
                num_bytes += len(part)
                progress(num_bytes)
    except (FileNotFoundError, NotADirectoryError):
        return Problem(name, "missing")
    except IsADirectoryError:
        return Problem(name, "is a folder")
    if num_bytes != expected.bytes:
        return Problem(name, f"has {num_bytes} bytes instead of {expected.bytes}")
    if digest.hexdigest() != expected.sha256:
        return Problem(name, f"sha256 is {digest.hexdigest()[:12]}… instead of {expected.sha256[:12]}…")
    return None


def _read_manifest(folder: Location) -> Manifest | Problem:
    if folder.is_local:
        return read_manifest(folder.path)
    with tempfile.TemporaryDirectory(prefix="maskwright-manifest-") as copy:
        (Path(copy) / MANIFEST).write_bytes((folder / MANIFEST).read_bytes())
        return read_manifest(Path(copy))
