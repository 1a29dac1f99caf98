"""Files on local disks and object stores behind one small type; every write is atomic, every failure names the path."""

import errno
import io
import json
import os
import time
import uuid
from collections.abc import Awaitable, Callable, Coroutine, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any, TypeVar

import fsspec
from fsspec.core import url_to_fs

from data_pipeline import remote
from data_pipeline.config import DataConfig
from data_pipeline.errors import NotFoundError, StorageError, StorageUnreachableError
from data_pipeline.remote_file import open_remote

T = TypeVar("T")

_NO_SPACE = {errno.ENOSPC, errno.EDQUOT}
_NO_LINKS = {errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP}
_UNWRITABLE = {errno.EACCES, errno.EPERM, errno.EROFS}
_NO_FOLDER = {errno.ENOTDIR, errno.EEXIST}
_PARTS_AT_ONCE = 64
_REMOVAL_S = 120.0
_STARTED_NS = time.time_ns() - time.monotonic_ns()


@contextmanager
def storage_errors(path: str) -> Generator[None]:
    """Turn operating-system errors about `path` into errors with a remedy.

    Raises:
        StorageError: the disk is full or the path cannot be written. StorageUnreachableError: the disk or mount fails for now.
    """
    try:
        yield
    except OSError as error:
        if error.errno in _NO_SPACE:
            raise StorageError(f"no space left while writing {path}", "Free space (`maskwright clean`) or choose another --storage.") from error
        if error.errno in _UNWRITABLE:
            raise StorageError(f"cannot write {path}: {error.strerror}", "Check the permissions or choose another --storage.") from error
        if error.errno in _NO_FOLDER and not os.path.isdir(error.filename or ""):
            raise StorageError(f"cannot write {path}: a file is where a folder has to be", "Choose another --storage.") from error
        if error.errno is not None and remote.is_passing(error):  # libraries raise OSErrors of their own, without a number
            raise StorageUnreachableError(f"cannot use {path}: {error.strerror}", "Check the disk or mount, then run the command again.") from error
        raise


def is_unwritable(error: BaseException) -> bool:
    """Whether the operating system says that a disk is full or must not be written: another attempt fails alike."""
    return isinstance(error, OSError) and error.errno in _NO_SPACE | _UNWRITABLE


@dataclass(frozen=True)
class Location:
    """A file or folder: a local absolute path, or an fsspec URL such as `s3://bucket/key`."""

    url: str

    @classmethod
    def at(cls, url: str | os.PathLike[str]) -> "Location":
        """A location from a path (made absolute) or an fsspec URL."""
        text = os.fspath(url)
        if "://" not in text or text.startswith("file://"):
            return cls(str(Path(text.removeprefix("file://")).expanduser().absolute()))
        return cls(text.rstrip("/"))

    def __truediv__(self, name: str) -> "Location":
        return Location(f"{self.url}/{name}")

    def __str__(self) -> str:
        return self.url

    @property
    def name(self) -> str:
        """Last part of the path."""
        return self.url.rsplit("/", 1)[-1]

    @property
    def parent(self) -> "Location":
        """The folder that holds this location."""
        return Location(self.url.rsplit("/", 1)[0])

    @property
    def is_local(self) -> bool:
        """Whether this is a path on this machine."""
        return "://" not in self.url

    @property
    def path(self) -> Path:
        """The local path; only for local locations."""
        if not self.is_local:
            raise ValueError(f"{self.url} is not a local path")
        return Path(self.url)

    def filesystem(self) -> tuple[fsspec.AbstractFileSystem, str]:
        """The fsspec filesystem and the path within it."""
        return url_to_fs(self.url)

    def exists(self, patience_s: float | None = None) -> bool:
        """Whether a file or folder is there. In a store this is tried for `patience_s` seconds, as all that follows is for some time."""
        if self.is_local:
            return self.path.exists()
        return self._ask(remote.exists, "reach", remote.patience(patience_s))

    def children(self) -> list[str]:
        """Sorted names in this folder; empty when there is no such folder."""
        if self.is_local:
            return sorted(os.listdir(self.url)) if self.path.is_dir() else []
        return sorted(self._ask(remote.names, "reach", remote.patience()))

    def read_bytes(self, settings: DataConfig | None = None) -> bytes:
        """The whole file; one in a store with the retries and time-outs of `settings`.

        Raises:
            NotFoundError: there is no such file.
            UnreachableError: its store gave no answer in time, or refused us.
        """
        try:
            return self.path.read_bytes() if self.is_local else remote.read_file(self.url, settings or DataConfig())
        except (FileNotFoundError, NotADirectoryError) as error:
            raise NotFoundError(f"{self.url} does not exist", "Check the path.") from error

    def read_range(self, start: int, stop: int, settings: DataConfig | None = None) -> bytes:
        """Bytes [start, stop) of the file, or those there are. Errors as `read_bytes` has them, but a missing file is a FileNotFoundError."""
        if not self.is_local:
            return remote.read_range(self.url, start, stop, settings or DataConfig())
        file = os.open(self.url, os.O_RDONLY)  # half the time of a Python file, which shows in blocks of a small corpus
        try:
            return os.pread(file, stop - start, start)
        finally:
            os.close(file)

    def open_binary(self, settings: DataConfig | None = None) -> IO[bytes]:
        """The file to be read from, and sought in; one in a store is read in large ranges, the next ahead of use, with retries and time-outs.

        Raises:
            FileNotFoundError: there is no such file. UnreachableError: see `read_bytes`; also of the reads that follow.
        """
        return self.path.open("rb") if self.is_local else open_remote(self.url, settings or DataConfig())

    def read_json(self) -> Any:
        """The file parsed as JSON.

        Raises:
            NotFoundError: there is no such file.
            ValueError: it is not JSON.
        """
        return json.loads(self.read_bytes())

    def write_bytes(self, data: bytes, patience_s: float | None = None) -> None:
        """Write the whole file so that a reader sees the old content, the new content, never a part of it.

        Raises:
            StorageError: the disk is full or the path cannot be written. StorageUnreachableError: the disk or the store fails for now.
        """
        if not self.is_local:
            self._ask(lambda store: remote.put(store, data), "write", remote.patience(patience_s, len(data)))
            return
        with storage_errors(self.url):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            temporary = self.path.with_name(f".{self.name}.{uuid.uuid4().hex[:8]}.tmp")
            try:
                with temporary.open("wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                temporary.replace(self.path)
            except OSError:
                temporary.unlink(missing_ok=True)
                raise
            sync_folder(self.path.parent)

    def write_json(self, value: Any, patience_s: float | None = None) -> None:
        """Write `value` as indented JSON with sorted keys, atomically."""
        self.write_bytes(json_bytes(value), patience_s)

    def rewrite(self, change: Callable[[bytes | None], bytes]) -> None:
        """Write a file of a store by what it holds; see `remote.rewrite`. Errors as `write_bytes` and `change` have them."""
        self._ask(lambda store: remote.rewrite(store, change), "write", remote.patience())

    def claim(self, data: bytes) -> bool:
        """Create the file if nobody has; True for exactly one of several callers, whose `data` differ. Errors as `write_bytes` has them."""
        if not self.is_local:
            return self._ask(lambda store: remote.create(store, data), "write", remote.patience())
        with storage_errors(self.url):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            whole = self.path.with_name(f".{self.name}.{uuid.uuid4().hex[:8]}.tmp")
            try:
                with whole.open("xb", buffering=0) as file:
                    _write_whole(file, data)
                _link(whole, self.path)
            except FileExistsError:
                return False
            finally:
                whole.unlink(missing_ok=True)
            return True

    def append_line(self, *lines: str) -> None:
        """Append one line, or several, in one write. On an object store the file is a folder of parts, a folder for each hour, named by the time.

        A line that a full disk or a crash has cut is closed first: it spoils itself and not the one that follows.

        Errors as `write_bytes` has them. A part that is put again has the same name: a line is never there twice.
        """
        data = "".join(f"{line}\n" for line in lines).encode()
        if not self.is_local:
            (self / _next_part()).write_bytes(data)
            return
        with storage_errors(self.url):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab+", buffering=0) as file:
                if file.seek(0, os.SEEK_END) and os.pread(file.fileno(), 1, file.tell() - 1) != b"\n":
                    data = b"\n" + data
                _write_whole(file, data)

    def read_lines(self) -> list[str]:
        """Complete lines of a file written by `append_line`; a torn last line is left out. Empty when there is no file."""
        return list(self.iter_lines())

    def iter_lines(self) -> Generator[str]:
        """What `read_lines` gives, without holding all of it: a long run has a line for each of a million steps."""
        if not self.is_local:
            hours = self.children()
            for first in range(0, len(hours), _PARTS_AT_ONCE):  # some of them, or all names of a long run would be held
                found = self._each(hours[first : first + _PARTS_AT_ONCE], remote.names, remote.patience())
                yield from self.read_parts([f"{hour}/{part}" for hour, parts in found for part in sorted(parts)])
        elif self.exists():
            with self.path.open("rb") as file:
                yield from (line[:-1].decode(errors="replace") for line in file if line.endswith(b"\n"))

    def read_parts(self, names: Sequence[str]) -> Generator[str]:
        """The lines of parts in this folder of a store, many requests at a time."""
        for _, data in self._each(names, remote.cat, DataConfig()):
            yield from data.decode(errors="replace").splitlines()

    def _each(
        self, names: Sequence[str], request: Callable[[remote.Store], Coroutine[Any, Any, T]], settings: DataConfig
    ) -> Generator[tuple[str, T]]:
        """Names in this folder of a store, each with the answer to a request, in order; many requests at a time."""
        for first in range(0, len(names), _PARTS_AT_ONCE):
            some = [(name, f"{self.url}/{name}") for name in names[first : first + _PARTS_AT_ONCE]]
            stores = [remote.Store.of(url) for _, url in some]
            asked = [remote.start(remote.with_retries(url, partial(request, store), settings)) for (_, url), store in zip(some, stores, strict=True)]
            for (name, url), answer in zip(some, asked, strict=True):
                yield name, remote.wait(answer, url, settings)

    def remove(self) -> None:
        """Remove the file or the whole folder; nothing happens when it is not there. Errors as `write_bytes` has them."""
        if not self.is_local:
            self._ask(remote.remove, "write", remote.patience(_REMOVAL_S))
            return
        with storage_errors(self.url):
            if self.exists():
                fs, path = self.filesystem()
                fs.rm(path, recursive=True)

    def _ask(self, request: Callable[[remote.Store], Awaitable[T]], what: remote.What, settings: DataConfig) -> T:
        store = remote.Store.of(self.url)
        return remote.call(self.url, lambda: request(store), settings, what)


def json_bytes(value: Any) -> bytes:
    """`value` as indented JSON with sorted keys."""
    return (json.dumps(value, indent=2, sort_keys=True) + "\n").encode()


def _next_part() -> str:
    """Name of a new part within a file of lines: sorted by time, whose setting back changes nothing within a process, and listed by the hour."""
    now_ns = _STARTED_NS + time.monotonic_ns()
    return f"{time.strftime('%Y%m%d%H', time.gmtime(now_ns // 10**9))}/{now_ns:020d}-{uuid.uuid4().hex[:8]}.jsonl"


def _link(whole: Path, path: Path) -> None:
    """Give a file its name if nobody has it: with all its contents or not at all, for a claim that names nobody would never be given up.

    On file systems without hard links a process that is killed in between can leave such a claim.
    """
    try:
        os.link(whole, path)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        with path.open("xb", buffering=0) as file:
            _write_whole(file, whole.read_bytes())


def _write_whole(file: io.FileIO, data: bytes) -> None:
    """One write; a full disk shows as a short one."""
    if file.write(data) != len(data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def sync_folder(folder: Path) -> None:
    """Make a rename inside a local folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
