"""Writes a snapshot's files, hashing what is written: each byte is read once, from memory."""

import errno
import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from data_pipeline import remote
from data_pipeline.errors import MaskwrightError, StorageError, StorageUnreachableError
from data_pipeline.storage import Location, storage_errors
from trainer.manifest import FileDigest
from trainer.snapshot import Snapshot

_PART_BYTES = 16 << 20


def write_files(snapshot: Snapshot, part: Location, on_piece: Callable[[], None]) -> dict[str, FileDigest]:
    """Write every file into the folder `part`, durably, replacing what is there; returns sizes and digests by name.

    `on_piece` is called before each piece; what it raises ends the writing.

    Raises:
        StorageError: the disk is full or cannot be written. StorageUnreachableError: it fails for now.
        OSError: it failed otherwise. Whatever the client of a store raises.
    """
    write = _write_local if part.is_local else _upload
    with storage_errors(part.url):
        return {name: write(part / name, snapshot, name, on_piece) for name in snapshot.sizes}


def is_worth_a_retry(error: BaseException) -> bool:
    """Whether writing the same again may work in a moment: not on a full or read-only disk, not what was refused."""
    return isinstance(error, StorageUnreachableError) or (not isinstance(error, MaskwrightError) and remote.is_passing(error))


def as_known(error: Exception, what: str) -> MaskwrightError:
    """The error that every rank will raise: its type, cause and remedy, behind `what`, as "rank 1 could not save"; one that says as much stays."""
    if isinstance(error, MaskwrightError) and error.cause.startswith("rank "):
        return error
    if isinstance(error, MaskwrightError):
        return type(error)(f"{what}: {error.cause}", error.remedy)
    if remote.is_passing(error):
        return StorageUnreachableError(f"{what}: {error}", "Check the storage and the network to it, then `maskwright resume` the run.")
    if isinstance(error, OSError):
        return StorageError(f"{what}: {error}", "Check that the storage is mounted, writable and has free space.")
    return MaskwrightError(f"{what}: {type(error).__name__}: {error}", "See that rank's log for the traceback.")


def _write_local(file: Location, snapshot: Snapshot, name: str, on_piece: Callable[[], None]) -> FileDigest:
    path = Path(file.url)
    path.parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    try:
        for piece in snapshot.pieces(name):
            on_piece()
            digest.update(piece)
            at = 0
            while at < len(piece):  # a disk that fills up takes a part first, and refuses the rest
                at += os.write(descriptor, piece[at:])
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return FileDigest(snapshot.sizes[name], digest.hexdigest())


def _upload(file: Location, snapshot: Snapshot, name: str, on_piece: Callable[[], None]) -> FileDigest:
    """In parts, so that no file is held twice. What the store says that it has is compared: an upload may end early."""
    fs, path = file.filesystem()
    digest = hashlib.sha256()
    upload: Any = fs.open(path, "wb", block_size=_PART_BYTES)
    try:
        for piece in snapshot.pieces(name):
            on_piece()
            digest.update(piece)
            upload.write(piece)
    except BaseException:
        upload.discard()
        upload.closed = True  # or its destructor would complete the upload
        raise
    upload.close()
    fs.invalidate_cache(path)
    found, expected = fs.info(path)["size"], snapshot.sizes[name]
    if found != expected:
        raise OSError(errno.EIO, f"{file} has {found} bytes of {expected} that were sent")
    return FileDigest(expected, digest.hexdigest())
