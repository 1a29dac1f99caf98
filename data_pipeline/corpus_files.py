"""Reads a corpus' files beside its blocks: verified, and from a store once more before damage counts; large ones are kept on the node."""

import atexit
import hashlib
from collections import deque
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from data_pipeline import remote
from data_pipeline.block_cache import BlockCache
from data_pipeline.config import DataConfig
from data_pipeline.errors import DataCorruptError, NotFoundError
from data_pipeline.scratch import Scratch
from data_pipeline.storage import Location

T = TypeVar("T")

_REMEDY = "Restore the corpus from a copy or prepare it again."


def read_intact(path: Location, settings: DataConfig, parse: Callable[[bytes], T]) -> tuple[bytes, T]:
    """A file and what `parse` makes of it. A file in a store that `parse` refuses with DataCorruptError is read once more.

    Raises:
        NotFoundError: there is no such file. UnreachableError: its store gave no answer in time.
    """
    try:
        data = path.read_bytes(settings)
        return data, parse(data)
    except DataCorruptError:
        if path.is_local:
            raise
    data = path.read_bytes(settings)
    return data, parse(data)


def read_large(path: Location, num_bytes: int, sha256: str, settings: DataConfig) -> NDArray[np.uint8]:
    """A file in a store, from the node's cache and mapped into memory where it can be, so that the ranks of a node share it.

    Raises:
        DataCorruptError: it is missing, or not the file with this digest. UnreachableError: its store gave no answer in time.
    """
    kept = BlockCache.of(settings)
    if (copy := kept.path(sha256)) is not None:
        mapped = _mapped(copy)
        if hashlib.sha256(mapped.data).hexdigest() == sha256:
            return mapped
        copy.unlink(missing_ok=True)
    for _ in range(2):
        data = _read_parts(path, num_bytes, settings)
        if hashlib.sha256(data).hexdigest() == sha256:
            kept.put(sha256, data)
            copy = kept.path(sha256)
            return np.frombuffer(data, dtype=np.uint8) if copy is None else _mapped(copy)
    raise DataCorruptError(f"{path}: its digest is not the one in corpus.json", _REMEDY)


@cache
def local_copy(folder: Location, digests: tuple[tuple[str, str], ...], settings: DataConfig) -> Path:
    """A private copy of files in a store with these SHA-256 digests; removed when the process ends.

    Raises:
        DataCorruptError: one is missing or is another one. UnreachableError: its store gave no answer in time.
    """
    copy = Scratch.make("maskwright-tokenizer-")
    atexit.register(copy.remove)
    for name, sha256 in digests:
        try:
            data, _ = read_intact(folder / name, settings, partial(_require_digest, folder / name, sha256))
        except NotFoundError as error:
            raise DataCorruptError(f"{folder / name} is missing", _REMEDY) from error
        (copy.path / name).write_bytes(data)
    return copy.path


def _require_digest(path: Location, sha256: str, data: bytes) -> None:
    if hashlib.sha256(data).hexdigest() != sha256:
        raise DataCorruptError(f"{path} has not the digest in corpus.json", _REMEDY)


def _mapped(path: Path) -> NDArray[np.uint8]:
    return np.memmap(path, dtype=np.uint8, mode="r")


def _read_parts(path: Location, num_bytes: int, settings: DataConfig) -> bytes:
    """All of a file whose size is known, several parts at a time."""
    store = remote.Store.of(path.url)
    waiting = deque((start, min(start + remote.PART_BYTES, num_bytes)) for start in range(0, num_bytes, remote.PART_BYTES))
    running: deque[remote.Future[bytes]] = deque()
    data = bytearray()
    try:
        while waiting or running:
            while waiting and len(running) < settings.concurrent_reads:
                running.append(remote.start(remote.with_retries(path.url, partial(remote.range_of, store, *waiting.popleft()), settings)))
            data += remote.wait(running.popleft(), path.url, settings)
    except FileNotFoundError as error:
        raise DataCorruptError(f"{path} is missing", _REMEDY) from error
    finally:
        for future in running:
            future.cancel()
    return bytes(data)
