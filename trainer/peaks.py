"""What a device multiplies at most: as its maker states it, and as it is measured here."""

import time

import torch

from trainer.gpus import stated_flops

_PRECISIONS = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
_PEAK_SECONDS = 0.2
_FEWEST_PRODUCTS = 3
_SMALLEST_SIZE = 128
_LARGEST_SIZE = {"cuda": 8192, "cpu": 1024}


def device_name(device: torch.device) -> str:
    """What CUDA calls a GPU; `cpu` else."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def stated_peak(name: str, dtype: torch.dtype) -> float | None:
    """FLOP/s of dense matrix products that the maker of the device states; None where it is not in the table, as a CPU or a slice of a GPU (MIG)."""
    return stated_flops(name, _PRECISIONS.get(dtype, ""))


def measured_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a bare square matrix product on this rank, the best of some; a fraction of a second, also without instructions for `dtype`."""
    size = _SMALLEST_SIZE
    _product_seconds(size, device, dtype)  # loads what the first product needs
    deadline = time.monotonic() + _PEAK_SECONDS
    while size < _LARGEST_SIZE[device.type] and 8 * _product_seconds(size, device, dtype) < deadline - time.monotonic():
        size *= 2
    fastest = min(_product_seconds(size, device, dtype) for _ in range(_FEWEST_PRODUCTS))
    while time.monotonic() < deadline:
        fastest = min(fastest, _product_seconds(size, device, dtype))
    return 2.0 * size**3 / fastest


def _product_seconds(size: int, device: torch.device, dtype: torch.dtype) -> float:
    generator = torch.Generator(device).manual_seed(0)
    left = torch.randn(size, size, dtype=dtype, device=device, generator=generator)  # equal numbers take a GPU less power, and so less time
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started_at = time.perf_counter()
    torch.mm(left, left)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started_at
