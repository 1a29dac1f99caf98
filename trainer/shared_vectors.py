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


def vectors_of_ranks(flat: Tensor, ranks: Any) -> list[Tensor] | None:
    """The `flat` of each rank, in their order; None on all of them unless they are on one machine whose shared memory has room for twice as much.

    `flat` moves to shared memory, and with it whatever else is a view of its memory. The other half is for Ray, whose objects find their place in
    it only when they are written. Collective, over gloo.
    """
    machines, rooms = zip(*_gathered((_machine(), _room()), ranks), strict=True)
    if len(set(machines)) > 1:
        return None
    if min(rooms) >= 2 * flat.nbytes * len(rooms):
        vectors = _opened(_gathered(_shared(flat), ranks), flat)
        if all(_gathered(vectors is not None, ranks)):
            return vectors
    if dist.get_rank(ranks) == 0:
        needed = 2 * flat.nbytes * len(rooms) >> 20
        _log.warning("ranks send each other what they could read in shared memory, if %s were theirs and had %d MB more", _SHARED_MEMORY, needed)
    return None


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
    """Move it to shared memory; None if that has no room."""
    try:
        descriptor, _ = flat.share_memory_().untyped_storage()._share_fd_cpu_()  # pyright: ignore[reportPrivateUsage]
    except RuntimeError:
        return None
    path = f"/proc/{os.getpid()}/fd/{descriptor}"
    return path, os.readlink(path)


def _opened(files: Sequence[_File | None], like: Tensor) -> list[Tensor] | None:
    """The vectors of `files`; None unless each is what its rank says."""
    try:
        if any(file is None or os.readlink(file[0]) != file[1] for file in files):
            return None
        return [torch.from_file(file[0], shared=True, size=like.numel(), dtype=like.dtype) for file in files if file is not None]
    except (OSError, RuntimeError):
        return None


def _gathered(value: Any, ranks: Any) -> list[Any]:
    values: list[Any] = [None] * dist.get_world_size(ranks)
    dist.all_gather_object(values, value, group=ranks)
    return values
