"""A rank's log: what its process says, in storage or on its node; and what of it outlives a rank that is killed (takes over stdout and stderr)."""

import hashlib
import io
import logging
import os
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

from data_pipeline.scratch import Scratch
from data_pipeline.storage import Location
from trainer.manifest import nothing
from trainer.redaction import without_hidden

MOST_LOGS = 16
"""In a larger group only rank 0 and ranks that fail leave a log in storage."""
_UPLOAD_S = 15.0
_UPLOAD_BYTES_PER_S = 256 << 10
"""A log is copied out as a whole, and the more seldom the longer it is: this much a second, at most."""
_FOLDER = "maskwright-log-"

_log = logging.getLogger(__name__)


def is_kept_only_if_failed(rank: int, world_size: int) -> bool:
    """Whether the log of a rank comes to storage only when the rank fails."""
    return rank > 0 and world_size > MOST_LOGS


def lies_on_node(log: Location, rank: int, world_size: int) -> bool:
    """Whether the log of a living rank is a file of its node, so that somebody has to copy it when the rank is killed."""
    return not log.is_local or is_kept_only_if_failed(rank, world_size)


class _Discreet(io.TextIOWrapper):
    """Leaves out the secrets that the process was given. What libraries of C++ print passes by."""

    def write(self, text: str, /) -> int:
        super().write(without_hidden(text))
        return len(text)


@contextmanager
def log_to(log: Location, *, only_if_failed: bool) -> Generator[Callable[[], object]]:
    """Send this process' stdout and stderr, of C++ libraries too, and its logging to the rank's log; yields what copies it to storage at once.

    On object stores, and `only_if_failed`, the log is a file of this machine, which goes with the block. It is copied out at the end:
    `only_if_failed` when the body raises, otherwise in any case, and now and then before. Of a process that is killed the file stays behind
    for `keep_logs_of_killed`, until another rank of this user begins on this machine.
    """
    scratch = None if log.is_local and not only_if_failed else Scratch.make(_FOLDER)
    path = log.path if scratch is None else scratch.path / _name(log)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as file:
        own = os.dup(file.fileno())
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os.dup2(own, 1)
        os.dup2(own, 2)
    # Line-buffered Python streams of our own: Ray's may be wrapped, and a killed process must not take its last lines along.
    sys.stdout, sys.stderr = (_Discreet(open(to, "wb", closefd=False), "utf-8", "replace", line_buffering=True) for to in (1, 2))  # noqa: SIM115
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", force=True)
    done = threading.Event()
    copier = threading.Thread(target=_copy_out, args=(own, log, done), daemon=True, name="log")
    if scratch is not None and not only_if_failed:
        copier.start()
    failed = True
    try:
        yield nothing if scratch is None else partial(_copy, own, log)
        failed = False
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        done.set()
        if copier.ident is not None:
            copier.join()
        elif only_if_failed and failed:
            _copy(own, log)
        os.close(own)
        if scratch is not None:
            scratch.remove()


def keep_logs_of_killed(logs: Iterable[Location]) -> None:
    """Copy to storage what killed ranks have left of these logs on this machine; of those that left nothing, nothing.

    Raises:
        StorageError, StorageUnreachableError: storage does not take them; they stay where they are.
    """
    for log in logs:
        for path in Path(tempfile.gettempdir()).glob(f"{_FOLDER}*/{_name(log)}"):
            with suppress(FileNotFoundError):  # another rank has begun here, and cleaned up
                if path.parent.stat().st_uid == os.getuid():
                    log.write_bytes(path.read_bytes())
                    shutil.rmtree(path.parent, ignore_errors=True)


def _name(log: Location) -> str:
    return hashlib.sha256(log.url.encode()).hexdigest()[:16]


def _copy_out(file: int, log: Location, done: threading.Event) -> None:
    """Copy what an open file holds to the log, again and again while it grows, and at the end."""
    copied, pause_s, finished = 0, _UPLOAD_S, False
    while not finished:
        finished = done.wait(pause_s)
        size = os.fstat(file).st_size
        if size > copied and _copy(file, log):
            copied, pause_s = size, max(_UPLOAD_S, size / _UPLOAD_BYTES_PER_S)


def _copy(file: int, log: Location) -> bool:
    try:
        log.write_bytes(os.pread(file, os.fstat(file).st_size, 0))
    except Exception as error:  # noqa: BLE001 - whatever it is, it must not be the end of the log
        _log.warning("the log could not be copied to %s: %s", log, error)
        return False
    return True
