"""A claim file: one writer per corpus folder; a claim whose process is dead is taken over."""

import json
import os
import socket
import uuid
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from data_pipeline.errors import ConflictError, NotFoundError
from data_pipeline.storage import Location


@contextmanager
def claimed(path: Location, what: str) -> Generator[None]:
    """Hold the claim file `path` while the body runs.

    Raises:
        ConflictError: a living process, or one on another host, holds it.
    """
    token = {"host": socket.gethostname(), "pid": os.getpid(), "started": _start_time(os.getpid()), "id": uuid.uuid4().hex}
    data = json.dumps(token, sort_keys=True).encode()
    if not path.claim(data):
        _set_aside_if_stale(path)
        if not path.claim(data):
            raise _conflict(path, what)
    try:
        yield
    finally:
        if _read(path) == token:
            path.remove()


def is_claimed(path: Location) -> bool:
    """Whether somebody who may be alive holds the claim file `path`."""
    holder = _read(path)
    return holder is not None and not _is_dead(holder)


def _set_aside_if_stale(path: Location) -> None:
    """Rename a dead process' claim away: of several callers that find it, the rename succeeds for one."""
    holder = _read(path)
    if holder is None or not path.is_local or not _is_dead(holder):
        return
    aside = path.parent / f".{path.name}.{uuid.uuid4().hex[:8]}"
    try:
        path.path.rename(aside.path)
    except FileNotFoundError:
        return
    if _read(aside) != holder:  # somebody was faster and the claim we moved is theirs: put it back
        aside.path.rename(path.path)
        return
    aside.remove()


def _is_dead(holder: dict[str, Any]) -> bool:
    if holder.get("host") != socket.gethostname():
        return False
    started = _start_time(int(holder["pid"]))
    return started is None or started != holder.get("started")


def _start_time(pid: int) -> str | None:
    """When a process of this host started, None if there is none: tells a process from a later one with its number."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
    except OSError:
        return _alive_without_proc(pid)
    state, *fields = status.rpartition(")")[2].split()
    return None if state in "ZX" else fields[18]


def _alive_without_proc(pid: int) -> str | None:
    if Path("/proc/self/stat").exists():
        return None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:  # somebody else's process, and alive
        pass
    return "alive"


def _read(path: Location) -> dict[str, Any] | None:
    try:
        return path.read_json()
    except (NotFoundError, ValueError):
        return None


def _conflict(path: Location, what: str) -> ConflictError:
    holder = _read(path) or {}
    who = f"process {holder.get('pid', '?')} on {holder.get('host', '?')}"
    return ConflictError(f"{what} is being written by {who}", f"Wait for it. If that process is gone, remove {path}.")
