"""Vectors that the ranks of one machine read where another rank has them, instead of being sent a copy.

Each lies in shared memory of its own, which has no name, and ends with the last process that has it open, whatever that one died of.
"""

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_log = logging.getLogger(__name__)
_BOOT, _PROCESSES = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")


def vectors_of_ranks(flat: Tensor, ranks: Any) -> list[Tensor] | None:
    """The `flat` of each rank, in their order; None on all of them unless they are on one machine whose shared memory has room.

    `flat` moves to shared memory, and with it whatever else is a view of its memory. Collective, over gloo.
    """
    if len(set(_gathered(_machine(), ranks))) > 1:
        return None
    files = _gathered(_shared(flat), ranks)
    vectors = _opened(files, flat)
    if all(_gathered(vectors is not None, ranks)):
        return vectors
    if dist.get_rank(ranks) == 0:
        _log.warning("shared memory has no room for %d MB of each rank: they send gradients instead", flat.nbytes >> 20)
    return None


def _machine() -> tuple[str, int]:
    """The same for processes that see each other in /proc."""
    try:
        return _BOOT.read_text(), _PROCESSES.stat().st_ino
    except OSError:
        return "none", os.getpid()


def _shared(flat: Tensor) -> str | None:
    """Where other processes of the machine find it, once it has moved to shared memory; None if there is no room."""
    try:
        descriptor, _ = flat.share_memory_().untyped_storage()._share_fd_cpu_()  # pyright: ignore[reportPrivateUsage]
    except RuntimeError:
        return None
    return f"/proc/{os.getpid()}/fd/{descriptor}"


def _opened(files: Sequence[str | None], like: Tensor) -> list[Tensor] | None:
    try:
        return [torch.from_file(file, shared=True, size=like.numel(), dtype=like.dtype) for file in files if file] if all(files) else None
    except RuntimeError:
        return None


def _gathered(value: Any, ranks: Any) -> list[Any]:
    values: list[Any] = [None] * dist.get_world_size(ranks)
    dist.all_gather_object(values, value, group=ranks)
    return values
