"""A folder on a node's disk that keeps what was read from a store: bounded, shared by all processes of the node, checked at every use."""

import fcntl
import logging
import os
import re
import time
import uuid
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.config import DataConfig

_LOCK_WAIT_S = 5.0
_STALE_S = 3600.0
_KEPT_SHARE = 0.9
"""An eviction goes on until this share of the bound is left, so that it is rare."""
_NAME = re.compile(r"[0-9a-f]{16,}|\.[0-9a-f]{16,}\.[0-9a-f]{8}\.tmp")
_log = logging.getLogger(__name__)


def default_folder() -> str:
    """Where the copies of a node lie unless `data.cache_dir` says otherwise."""
    return f"{os.environ.get('XDG_CACHE_HOME') or '~/.cache'}/maskwright"


@dataclass(frozen=True)
class BlockCache:
    """Files named by digests of their contents. Trouble with the folder (full, locked, unwritable) costs speed and never stops a read."""

    folder: Path
    max_bytes: int

    @classmethod
    def of(cls, settings: DataConfig) -> "BlockCache":
        """The cache that the settings describe."""
        folder = settings.cache_dir or default_folder()
        return cls(Path(folder).expanduser().absolute() / "blocks", settings.cache_bytes)

    def get(self, key: str, is_intact: Callable[[bytes], bool]) -> bytes | None:
        """What is kept under `key`; None when it is not there, or was damaged (and is removed)."""
        path = self.path(key)
        if path is None:
            return None
        try:
            data = path.read_bytes()
            if not is_intact(data):
                _log.warning("%s is damaged: it is removed and read again", path)
                path.unlink(missing_ok=True)
                return None
            os.utime(path)  # the time of the last use
        except OSError:
            return None
        return data

    def path(self, key: str) -> Path | None:
        """Where the file of `key` is kept, to be mapped into memory; an eviction does not disturb a mapping."""
        path = self._path(key)
        return path if self.max_bytes and path.is_file() else None

    def put(self, key: str, data: bytes) -> None:
        """Keep `data`, and make room for it first. A reader sees the whole file or none."""
        if len(data) > self.max_bytes * _KEPT_SHARE:
            return
        path = self._path(key)
        temporary = path.with_name(f".{key}.{uuid.uuid4().hex[:8]}.tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            if path.exists() or not self._reserve(len(data)):
                return
            temporary.write_bytes(data)
            temporary.replace(path)
        except OSError as error:
            _log.warning("cannot keep a copy in %s: %s", self.folder, error)
            with suppress(OSError):
                temporary.unlink(missing_ok=True)

    def held_bytes(self) -> int:
        """Bytes of all copies."""
        return sum(size for _, size, _ in self._copies())

    def clear(self) -> None:
        """Remove all copies; whoever reads one keeps what it has open."""
        with self._locked() as file:
            self._evict(0)
            if file is not None:
                os.ftruncate(file, 0)

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / key

    def _reserve(self, num_bytes: int) -> bool:
        """Add `num_bytes` to what the folder is said to hold, evicting when it would be too much. False when the lock cannot be had."""
        with self._locked() as file:
            if file is None:
                return False
            said = os.pread(file, 32, 0)
            held = int(said) if said.isdigit() else self._evict(self.max_bytes)
            if held + num_bytes > self.max_bytes:
                held = self._evict(int(self.max_bytes * _KEPT_SHARE) - num_bytes)
            os.ftruncate(file, 0)
            os.pwrite(file, str(held + num_bytes).encode(), 0)
        return True

    def _evict(self, limit: int) -> int:
        """Remove the least recently used files until at most `limit` bytes are left; returns the bytes that are left."""
        found = self._copies()
        held = sum(size for _, size, _ in found)
        for _, size, path in sorted(found):
            if held <= limit:
                break
            with suppress(FileNotFoundError):
                os.unlink(path)
            held -= size
        return held

    def _copies(self) -> list[tuple[float, int, str]]:
        """(time of the last use, bytes, path) of every file."""
        found: list[tuple[float, int, str]] = []
        for path in self.folder.glob("[0-9a-f][0-9a-f]/*"):
            if _NAME.fullmatch(path.name) is None:
                continue
            with suppress(FileNotFoundError):
                status = path.stat()
                is_stale = path.suffix == ".tmp" and status.st_mtime < time.time() - _STALE_S  # its writer was killed
                found.append((0.0 if is_stale else status.st_mtime, status.st_size, str(path)))
        return found

    @contextmanager
    def _locked(self) -> Generator[int | None]:
        """The descriptor of the file that holds the size, locked against other processes; None when somebody keeps it too long."""
        file = os.open(self.folder / "size", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            deadline = time.monotonic() + _LOCK_WAIT_S
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    if time.monotonic() > deadline:
                        yield None
                        return
                    time.sleep(0.01)
                else:
                    break
            yield file
        finally:
            os.close(file)
