"""Vectors that the ranks of one machine read where another rank has them, instead of being sent a copy.

Each lies in shared memory of its own, which loses its name as soon as it is made, and ends with the last process that has it open, whatever that
died of.
"""

import logging
import os
import socket
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_SHARED_MEMORY = "/dev/shm"
_BOOT, _PROCESSES = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
_log = logging.getLogger(__name__)

_File = tuple[str, str]
"""Where another process finds a vector, and the random name that this must have."""


def vectors_of_ranks(flats: Sequence[Tensor], ranks: Any) -> list[list[Tensor]] | None:
    """Of each of `flats` those of all ranks, in their order; None on all of them unless they are on one machine whose shared memory has room for
    twice as much.

    `flats` move to shared memory, and with them whatever else is a view of their memory. The other half is for Ray, whose objects find their place
    in it only when they are written. Collective, over gloo.
    """
    machines, rooms = zip(*_gathered((_machine(), _room()), ranks), strict=True)
    if len(set(machines)) > 1:
        return None
    needed, room = 2 * sum(flat.nbytes for flat in flats) * len(rooms), min(rooms)
    if room < needed:
        _say(ranks, "that takes %d MB of %s, where %d MB are free", needed >> 20, _SHARED_MEMORY, room >> 20)
        return None
    vectors = _opened(list(zip(*_gathered([_shared(flat) for flat in flats], ranks), strict=True)), flats)
    if not all(_gathered(vectors is not None, ranks)):
        _say(ranks, "they cannot open each other's files in %s", _SHARED_MEMORY)
        return None
    return vectors


def _say(ranks: Any, why: str, *values: object) -> None:
    """Why the ranks of one machine are slower than they could be: once for all of them."""
    if dist.get_rank(ranks) == 0:
        _log.warning("ranks send each other what they could read in shared memory: " + why, *values)


def _machine() -> tuple[str, str, int]:
    """The same for processes that see each other in /proc."""
    try:
        return socket.gethostname(), _BOOT.read_text(), _PROCESSES.stat().st_ino
    except OSError:
        return socket.gethostname(), uuid.uuid4().hex, 0


def _room() -> int:
    """Bytes of shared memory that nobody has yet."""
    try:
        found = os.statvfs(_SHARED_MEMORY)
    except OSError:
        return 0
    return found.f_bavail * found.f_frsize


def _shared(flat: Tensor) -> _File | None:
    """Move it to shared memory; None if that has no room, or this process is not shown its own files."""
    try:
        descriptor, _ = flat.share_memory_().untyped_storage()._share_fd_cpu_()  # pyright: ignore[reportPrivateUsage]
        path = f"/proc/{os.getpid()}/fd/{descriptor}"
        return path, os.readlink(path)
    except (OSError, RuntimeError):
        return None


def _opened(files: Sequence[Sequence[_File | None]], flats: Sequence[Tensor]) -> list[list[Tensor]] | None:
    """Of each of `flats` the vectors in the files of all ranks; None unless each file is what its rank says."""
    try:
        return [[_open(file, flat) for file in of_ranks] for of_ranks, flat in zip(files, flats, strict=True)]
    except (OSError, RuntimeError):
        return None


def _open(file: _File | None, like: Tensor) -> Tensor:
    """Raises OSError or RuntimeError."""
    if file is None or os.readlink(file[0]) != file[1]:
        raise FileNotFoundError("not what a rank has shared")
    return torch.from_file(file[0], shared=True, size=like.numel(), dtype=like.dtype)


def _gathered(value: Any, ranks: Any) -> list[Any]:
    values: list[Any] = [None] * dist.get_world_size(ranks)
    dist.all_gather_object(values, value, group=ranks)
    return values
