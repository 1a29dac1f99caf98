"""A file in a store as a Python file: read by ranges, the next range ahead of use, with the retries and time-outs of `remote`."""

import io
from concurrent.futures import Future
from typing import IO, Any, cast

from data_pipeline import remote
from data_pipeline.config import DataConfig
from data_pipeline.errors import UnreachableError


def open_remote(url: str, settings: DataConfig) -> IO[bytes]:
    """Open the file of a URL.

    Raises:
        FileNotFoundError: there is no such file.
        UnreachableError: its store gave no answer in time, or refused us.
    """
    store = remote.Store.of(url)
    num_bytes = remote.call(url, lambda: remote.size(store), settings)
    return cast("IO[bytes]", io.BufferedReader(RemoteFile(url, store, num_bytes, settings), remote.PART_BYTES // 8))


class RemoteFile(io.RawIOBase):
    """Raw reads come out of the part of the file held; the part that follows it is on its way."""

    def __init__(self, url: str, store: remote.Store, num_bytes: int | None, settings: DataConfig) -> None:
        self._url = url
        self._store = store
        self._num_bytes = num_bytes
        self._settings = settings
        self._position = 0
        self._part, self._start = b"", 0
        self._next: tuple[int, Future[bytes]] | None = None

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return self._num_bytes is not None

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        self._position = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._num_bytes or 0}[whence] + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any, /) -> int:
        offset = self._position - self._start
        if not 0 <= offset < len(self._part):
            self._part, self._start, offset = self._load(self._position), self._position, 0
        data = self._part[offset : offset + len(buffer)]
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)

    def close(self) -> None:
        if self._next is not None:
            self._next[1].cancel()
        super().close()

    def _load(self, start: int) -> bytes:
        stop = self._stop(start)
        if start >= stop:
            return b""
        ahead = self._next
        future = ahead[1] if ahead is not None and ahead[0] == start else self._read(start, stop)
        data = remote.wait(future, self._url, self._settings)
        if self._num_bytes is None and len(data) < stop - start:
            self._num_bytes = stop = start + len(data)  # the end is where the store has no more
        self._next = (stop, self._read(stop, self._stop(stop))) if self._num_bytes is not None and stop < self._num_bytes else None
        if len(data) > stop - start:
            raise remote.ranges_ignored(self._url)
        if len(data) < stop - start:
            raise UnreachableError(
                f"cannot read {self._url}: bytes {start} to {stop} were asked for, {len(data)} came",
                "Check that the file does not change, and that its server answers requests for ranges.",
            )
        return data

    def _stop(self, start: int) -> int:
        stop = start + remote.PART_BYTES
        return stop if self._num_bytes is None else min(stop, self._num_bytes)

    def _read(self, start: int, stop: int) -> "Future[bytes]":
        read = remote.with_retries(self._url, lambda: remote.range_of(self._store, start, stop), self._settings)
        return remote.start(read)
