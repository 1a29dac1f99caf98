"""Object stores and web servers: retries with back-off, a time-out for each attempt and for all of them, failures as errors with a remedy.

All requests run on fsspec's own event loop, so many are under way without a thread for each, and one that hangs is really given up.
"""

import asyncio
import errno
import time
from collections.abc import Awaitable, Callable, Coroutine, Generator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple, TypeVar

from fsspec.asyn import AsyncFileSystem, get_loop
from fsspec.config import conf
from fsspec.core import url_to_fs
from tenacity import AsyncRetrying, retry_if_exception, stop_after_attempt, stop_before_delay, wait_random_exponential

from data_pipeline.config import DataConfig
from data_pipeline.errors import (
    ConfigError,
    EnvironmentMismatchError,
    MaskwrightError,
    StorageError,
    StorageUnreachableError,
    UnreachableError,
)

T = TypeVar("T")
What = Literal["read", "reach", "write"]

_NETWORK_ERRORS = {
    "ClientError",
    "ConnectionError",
    "HTTPClientError",
    "IncompleteRead",
    "IncompleteReadError",
    "ProtocolError",
    "ResponseStreamingError",
    "HTTPError",
}
"""Names of the exceptions, not OSErrors, with which aiohttp, botocore, urllib3 and requests report a broken connection."""
_PERMANENT = (FileNotFoundError, FileExistsError, PermissionError, IsADirectoryError, NotADirectoryError)
_REFUSED = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EINVAL, errno.ENAMETOOLONG, errno.ENOTEMPTY, errno.ELOOP, errno.EXDEV}
"""What a file system refuses now, and will in a moment, beside what the types above stand for."""
_TRY_AGAIN_STATUS = {408, 409, 425, 429}
_GONE = (404, 410)
_CHANGED = (404, 412)
"""What a write is answered with whose condition does not hold."""
_RANGE_NOT_SATISFIABLE = 416
_LONGEST_PAUSE_S = 10.0
_CONNECTIONS = 64
"""To a store at a time; botocore's own are ten, for which many requests would wait."""
_GRACE_S = 2.0
PATIENCE_S = 40.0
"""How long a small write, a listing or a look is tried: less than a rank may stand still (45 s), so that the error is this one and not a hang."""
_ANSWER_S = 15.0
_SLOWEST_BYTES_PER_S = 1 << 20
PART_BYTES = 8 << 20
"""A file is read in parts of this size, each with retries and time-outs of its own."""
_CHECK: dict[What, str] = {
    "read": "Check the store, the network and the credentials; data.total_timeout_s says how long to try.",
    "reach": "Check the store, the network and the credentials.",
    "write": "Check the store and the network, then run the command again.",
}
_PACKAGES = {"s3": 'pip install "maskwright[s3]"', "s3a": 'pip install "maskwright[s3]"', "gs": "pip install gcsfs", "gcs": "pip install gcsfs"}


class Store(NamedTuple):
    """A filesystem that answers coroutines, and a path in it."""

    fs: AsyncFileSystem
    path: str

    @classmethod
    def of(cls, url: str) -> "Store":
        """The store of a URL.

        Raises:
            EnvironmentMismatchError: the package for this kind of store is not installed. ConfigError: there is no such kind of store.
        """
        try:
            found, path = url_to_fs(url, **_options(url))
        except ImportError as error:
            remedy = _PACKAGES.get(url.partition("://")[0], "Install the fsspec implementation of this protocol.")
            raise EnvironmentMismatchError(f"{url} needs a package that is not installed: {error}", f"Install it: {remedy}.") from error
        except ValueError as error:
            raise ConfigError(f"{url}: {error}", "Use a path, or a URL such as s3://bucket/folder or https://host/folder.") from error
        if isinstance(found, AsyncFileSystem) and found.async_impl:
            return cls(found, path)
        from fsspec.implementations.asyn_wrapper import AsyncFileSystemWrapper

        return cls(AsyncFileSystemWrapper(found, asynchronous=False), path)


def read_range(url: str, start: int, stop: int, settings: DataConfig) -> bytes:
    """Bytes [start, stop) of a file; fewer where it ends before, as the store says it. See `call` for errors."""
    store = Store.of(url)
    return call(url, lambda: range_of(store, start, stop), settings)


def read_file(url: str, settings: DataConfig) -> bytes:
    """The whole of a small file. See `call` for errors."""
    store = Store.of(url)
    return call(url, lambda: cat(store), settings)


def call(url: str, operation: Callable[[], Awaitable[T]], settings: DataConfig, what: What = "read") -> T:
    """Run a request with retries and wait for it. One whose answer is lost may have been carried out, so a write must bear being repeated.

    Raises:
        FileNotFoundError: the store says that there is no such file. StorageError: it refuses a write.
        UnreachableError: it refuses us. StorageUnreachableError: it did not give an answer in `total_timeout_s`.
    """
    return wait(start(with_retries(url, operation, settings, what=what)), url, settings, what)


def patience(seconds: float | None = None, num_bytes: int = 0) -> DataConfig:
    """Time-outs of a request for little that others wait for: `PATIENCE_S` in all where nothing else is said, and more for each of `num_bytes`."""
    more_s = num_bytes / _SLOWEST_BYTES_PER_S
    total_s = (PATIENCE_S if seconds is None else seconds) + more_s
    return DataConfig(read_timeout_s=_ANSWER_S + more_s, total_timeout_s=total_s, max_attempts=1_000)


def start(coroutine: Coroutine[Any, Any, T]) -> "Future[T]":
    """Begin a request; `wait` for it later."""
    return asyncio.run_coroutine_threadsafe(coroutine, get_loop())  # pyright: ignore[reportArgumentType]


def wait(future: "Future[T]", url: str, settings: DataConfig, what: What = "read") -> T:
    """The result of a request that was started; never waits longer than `total_timeout_s`."""
    try:
        return future.result(settings.total_timeout_s + _GRACE_S)
    except TimeoutError as error:
        future.cancel()
        raise _silent(url, f"no answer in {settings.total_timeout_s:g} s", what) from error


def _options(url: str) -> dict[str, Any]:
    """Listings are never remembered: others write, too. botocore would retry by itself, and check only the checksums of whole objects, as a
    failure like any other: both are done here."""
    if url.partition("://")[0] not in ("s3", "s3a"):
        return {"use_listings_cache": False}
    configured: dict[str, Any] = conf.get("s3", {}).get("config_kwargs", {})
    ours = {
        "retries": {"mode": "standard", "total_max_attempts": 1},
        "response_checksum_validation": "when_required",
        "max_pool_connections": _CONNECTIONS,
    }
    return {"use_listings_cache": False, "config_kwargs": {**ours, **configured}}


def deadline_of(settings: DataConfig) -> float:
    """When a read that begins now is given up, on the monotonic clock."""
    return time.monotonic() + settings.total_timeout_s


async def with_retries(
    url: str, operation: Callable[[], Awaitable[T]], settings: DataConfig, deadline: float | None = None, what: What = "read"
) -> T:
    """Try until it works, the failure is not a passing one, or attempts or the time until `deadline` are spent. See `call`."""
    started_at = time.monotonic()
    until = deadline_of(settings) if deadline is None else deadline
    said: list[str] = []
    retrying = AsyncRetrying(
        retry=retry_if_exception(is_passing),
        stop=stop_after_attempt(settings.max_attempts) | stop_before_delay(max(0.0, until - started_at)),
        wait=wait_random_exponential(multiplier=0.2, max=_LONGEST_PAUSE_S),
        after=lambda state: said.append(_said(state.outcome and state.outcome.exception())),
        reraise=True,
    )
    attempts, left_s = 0, 0.0
    try:
        async for attempt in retrying:
            with attempt:
                attempts += 1
                left_s = max(0.0, until - time.monotonic())
                async with asyncio.timeout(min(settings.read_timeout_s, left_s)):
                    return await operation()
    except MaskwrightError:
        raise
    except Exception as error:
        if is_missing(error) and what != "write":
            raise
        if not is_passing(error):
            raise _refused(url, _said(error), what) from error
        number = "1 attempt" if attempts == 1 else f"{attempts} attempts"
        was_cut_short = isinstance(error, TimeoutError) and left_s < settings.read_timeout_s  # which says nothing about the store
        last = said[-2] if was_cut_short and attempts > 1 else _said(error)
        raise _silent(url, f"no answer in {number} over {time.monotonic() - started_at:.1f} s: {last}", what) from error
    raise AssertionError("tenacity ends with a result or an error")


async def range_of(store: Store, start: int, stop: int) -> bytes:
    """One attempt at a range. A range past the end of the file is empty, as it is locally."""
    try:
        return bytes(await store.fs._cat_file(store.path, start=start, end=stop))  # pyright: ignore[reportPrivateUsage]
    except Exception as error:
        if http_status(error) == _RANGE_NOT_SATISFIABLE:
            return b""
        raise


async def cat(store: Store) -> bytes:
    """One attempt at a whole file."""
    return bytes(await store.fs._cat_file(store.path))  # pyright: ignore[reportPrivateUsage]


async def exists(store: Store) -> bool:
    """Whether a file or folder is there. (`_exists` of fsspec's HTTP takes a server that is down for a file that is not there.)"""
    try:
        await store.fs._info(store.path)  # pyright: ignore[reportPrivateUsage]
    except FileNotFoundError as error:
        if not is_missing(error):
            raise
        return False
    return True


async def names(store: Store) -> list[str]:
    """Names of what is in a folder, in no order; none where there is no such folder."""
    try:
        entries: list[Any] = await store.fs._ls(store.path, detail=False)  # pyright: ignore[reportPrivateUsage]
    except FileNotFoundError as error:
        if not is_missing(error):
            raise
        return []
    return [str(entry).rstrip("/").rsplit("/", 1)[-1] for entry in entries]


async def put(store: Store, data: bytes) -> None:
    """Write a whole file."""
    await store.fs._pipe_file(store.path, data)  # pyright: ignore[reportPrivateUsage]


async def create(store: Store, data: bytes) -> bool:
    """Write a whole file if there is none (a conditional put), and say whether it is there with `data`, which nobody else writes.

    It may be carried out and its answer lost, so whose file is there counts, and not who was told that it was written.
    """
    try:
        await store.fs._pipe_file(store.path, data, mode="create")  # pyright: ignore[reportPrivateUsage]
    except FileExistsError:
        return await cat(store) == data
    return True


async def rewrite(store: Store, change: Callable[[bytes | None], bytes]) -> None:
    """Write a file by what it holds (None: there is none). Where another writer comes between, `change` is asked again. It may raise, not wait.

    Where it is there already, this needs a store that knows If-Match (S3 does); in others a writer that comes between the look and the write loses.
    """
    while True:
        etag, held = None, None
        if await exists(store):
            etag = (await store.fs._info(store.path)).get("ETag")  # pyright: ignore[reportPrivateUsage]
            held = await cat(store)
        data = change(held)
        if held == data:  # written before, and the answer was lost
            return
        condition: dict[str, Any] = {"mode": "create"} if held is None else {"IfMatch": etag} if etag else {}
        try:
            return await store.fs._pipe_file(store.path, data, **condition)  # pyright: ignore[reportPrivateUsage]
        except OSError as error:
            if not isinstance(error, FileExistsError) and http_status(error) not in _CHANGED:
                raise


async def remove(store: Store) -> None:
    """Remove a file, or a folder with all that is in it; nothing happens when it is not there."""
    try:
        await store.fs._rm(store.path, recursive=True)  # pyright: ignore[reportPrivateUsage]
    except FileNotFoundError as error:
        if not is_missing(error):
            raise


async def size(store: Store) -> int | None:
    """Bytes of a file; None where the store does not say."""
    info: dict[str, Any] = await store.fs._info(store.path)  # pyright: ignore[reportPrivateUsage]
    return None if info.get("size") is None else int(info["size"])


def is_passing(error: BaseException) -> bool:
    """Whether the same may work in a moment: server errors, time-outs, broken connections, a disk or mount that fails; not what was refused."""
    if isinstance(error, TimeoutError):  # of S3 also with the status of a request that is wrong
        return True
    status = http_status(error)
    if status is not None:
        return status >= 500 or status in _TRY_AGAIN_STATUS
    if isinstance(error, _PERMANENT):  # fsspec's HTTP says "not found" of whatever kept it from looking
        return isinstance(error, FileNotFoundError) and error.__cause__ is not None and is_passing(error.__cause__)
    if isinstance(error, OSError):
        return error.errno not in _REFUSED
    return isinstance(error, EOFError) or any(each.__name__ in _NETWORK_ERRORS for each in type(error).__mro__)


def is_missing(error: BaseException) -> bool:
    """Whether the store says that there is no such file."""
    return isinstance(error, FileNotFoundError) and not is_passing(error) and http_status(error) in (None, *_GONE)


def http_status(error: BaseException) -> int | None:
    """The HTTP status behind an exception of aiohttp, botocore, gcsfs or requests; None where there is none."""
    cause: BaseException | None = error
    while cause is not None:
        response: Any = getattr(cause, "response", None)
        if isinstance(response, dict):
            found = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        else:
            found = getattr(cause, "status", None) or getattr(cause, "code", None) or getattr(response, "status_code", None)
        if isinstance(found, int):
            return found
        cause = cause.__cause__ if isinstance(cause, OSError) else None  # as s3fs and fsspec wrap what they translate
    return None


@contextmanager
def store_errors(url: str) -> Generator[None]:
    """Turn what a store fails with in the body into UnreachableError: for what is not retried."""
    try:
        yield
    except (MaskwrightError, FileNotFoundError):
        raise
    except Exception as error:
        if "://" in url and is_passing(error):
            raise _silent(url, _said(error), "reach") from error
        if "://" in url and (isinstance(error, PermissionError) or http_status(error) is not None):
            raise _refused(url, _said(error), "reach") from error
        raise


def ranges_ignored(url: str) -> UnreachableError:
    """What a server is refused with that answers a request for a part of a file with the whole of it."""
    return UnreachableError(
        f"cannot read {url}: its server ignores requests for a range and sends the whole file",
        "Serve it with one that answers them, or copy it here.",
    )


def _said(error: BaseException | None) -> str:
    first = next(iter(str(error).splitlines()), "")
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


def _refused(url: str, cause: str, what: What) -> UnreachableError | StorageError:
    if what == "write":
        return StorageError(f"cannot write {url}: {cause}", "Check the permissions and that the bucket exists, or choose another --storage.")
    return UnreachableError(f"cannot {what} {url}: {cause}", _CHECK[what])


def _silent(url: str, cause: str, what: What) -> StorageUnreachableError:
    return StorageUnreachableError(f"cannot {what} {url}: {cause}", _CHECK[what])
