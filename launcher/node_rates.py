"""How fast a node multiplies, and exchanges data with others, when doctor asks (runs on the nodes; imports torch)."""

import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from launcher.interfaces import choose_interface, interface_of
from launcher.measurements import Rate

_c10d: Any = dist  # what lies below process groups is not in its stubs

SECONDS = 1.0
_SIZE = 1024
_GPU_SIZE = 8192
_MOST_REPEATS = 20
_BYTES = {"gloo": 8 << 20, "nccl": 256 << 20}
"""Of an all-reduce: enough for the rate to count and not the latency, little enough for 10 Mbit/s in the time there is."""


def multiply(threads: int, num_gpus: int, seconds: float = SECONDS) -> Rate:
    """Products of square matrices for some seconds of wall clock: in bf16 on each GPU in turn, where there is none in fp32 on `threads` threads.

    The mean and not the best of them: a processor that others use half of the time is half as fast.

    Raises:
        RuntimeError: there are fewer GPUs than Ray gives ranks.
    """
    if num_gpus:
        seen = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if seen < num_gpus:
            raise RuntimeError(f"Ray gives {num_gpus} GPUs there, of which torch sees {seen or 'none'}")
        return min((_gpu_rate(torch.device("cuda", number), seconds) for number in range(seen)), key=lambda rate: rate.flops)
    torch.set_num_threads(threads)
    left = torch.ones(_SIZE, _SIZE)
    return Rate(_processor(), threads, _products(lambda: torch.mm(left, left), _SIZE, seconds))


def _gpu_rate(device: torch.device, seconds: float) -> Rate:
    left = torch.ones(_GPU_SIZE, _GPU_SIZE, dtype=torch.bfloat16, device=device)

    def product() -> None:
        torch.mm(left, left)
        torch.cuda.synchronize(device)

    return Rate(torch.cuda.get_device_name(device), 0, _products(product, _GPU_SIZE, seconds))


def _products(product: Callable[[], Any], size: int, seconds: float) -> float:
    product()  # starts threads, loads kernels
    started_at, count = time.perf_counter(), 0
    while (elapsed_s := time.perf_counter() - started_at) < seconds or not count:
        product()
        count += 1
    return 2.0 * size**3 * count / elapsed_s


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


@dataclass(frozen=True)
class Meeting:
    """Where the ranks of one exchange find each other, one rank on each node."""

    host: str
    port: int
    """Of a store, see `open_store`."""
    name: str
    size: int
    backend: str
    """`gloo`, or `nccl` between GPUs."""
    within_s: float


def open_store(host: str) -> Any:
    """A store on this machine, on a port of the system's choice, for as long as it is referred to."""
    return _c10d.TCPStore(host, 0, None, is_master=True, timeout=timedelta(seconds=60), wait_for_workers=False)


def exchange(meeting: Meeting, rank: int, address: str) -> float:
    """All-reduces with the other ranks of the meeting for about a second; bytes that this rank sent a second, in the fastest of them.

    Takes no part in any process group of this process. Every wait is bounded.

    Raises:
        RuntimeError: somebody did not come, or was not heard of in time.
    """
    interface = interface_of(address)
    if interface:
        choose_interface(interface)
    limit = timedelta(seconds=meeting.within_s)
    shared = _c10d.TCPStore(meeting.host, meeting.port, None, is_master=False, timeout=limit, wait_for_workers=False)
    group = _group(_c10d.PrefixStore(meeting.name, shared), rank, meeting, limit)
    device = torch.device("cuda", 0) if meeting.backend == "nccl" else torch.device("cpu")
    data = torch.zeros(_BYTES[meeting.backend] // 4, device=device)
    first_s = torch.tensor([_all_reduce_s(group, data, limit)], device=device)  # with the time to connect
    _all_reduce_s(group, first_s, limit)  # now the same sum everywhere, so that all make as many
    repeats = min(_MOST_REPEATS, 1 + int(SECONDS * meeting.size / float(first_s)))
    best_s = min(_all_reduce_s(group, data, limit) for _ in range(repeats))
    return 2.0 * (meeting.size - 1) / meeting.size * data.nbytes / best_s


def _all_reduce_s(group: Any, data: torch.Tensor, limit: timedelta) -> float:
    started_at = time.perf_counter()
    group.allreduce([data]).wait(limit)
    if data.device.type == "cuda":
        torch.cuda.synchronize(data.device)
    return time.perf_counter() - started_at


def _group(store: Any, rank: int, meeting: Meeting, limit: timedelta) -> Any:
    if meeting.backend == "gloo":
        return _c10d.ProcessGroupGloo(store, rank, meeting.size, limit)
    os.environ["TORCH_NCCL_BLOCKING_WAIT"] = "1"  # an error after the limit, instead of the end of the process
    options = _c10d.ProcessGroupNCCL.Options()
    options._timeout = limit
    return _c10d.ProcessGroupNCCL(store, rank, meeting.size, options)
