"""What a device multiplies at most: as its maker states it, and as it is measured here."""

import re
import time

import torch

STATED_TFLOPS: tuple[tuple[str, dict[torch.dtype, float]], ...] = (
    (r"\bB200\b", {torch.bfloat16: 2250.0, torch.float16: 2250.0}),
    (r"\bH(100|200) NVL\b", {torch.bfloat16: 835.5, torch.float16: 835.5, torch.float32: 60.0}),
    (r"\bH100 PCIe\b", {torch.bfloat16: 756.0, torch.float16: 756.0, torch.float32: 51.0}),
    (r"\b(H100|H200|GH200)\b", {torch.bfloat16: 989.4, torch.float16: 989.4, torch.float32: 67.0}),
    (r"\bA100\b", {torch.bfloat16: 312.0, torch.float16: 312.0, torch.float32: 19.5}),
    (r"\bL40S\b", {torch.bfloat16: 362.05, torch.float16: 362.05, torch.float32: 91.6}),
    (r"\bL4\b", {torch.bfloat16: 121.0, torch.float16: 121.0, torch.float32: 30.3}),
    (r"\bA10\b", {torch.bfloat16: 125.0, torch.float16: 125.0, torch.float32: 31.2}),
    (r"\bV100-SXM2\b", {torch.float16: 125.0, torch.float32: 15.7}),
    (r"\bT4\b", {torch.float16: 65.0, torch.float32: 8.1}),
)
"""Dense TFLOP/s by the name that CUDA gives a device, the first that fits: from NVIDIA's data sheets, of which those that state it with sparsity
only (H100, H200, B200, L4) are halved; fp32 without tensor cores, as torch multiplies by default."""

_PEAK_SECONDS = 0.2
_PEAK_SIZE = 1024


def device_name(device: torch.device) -> str:
    """What CUDA calls a GPU; `cpu` else."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def stated_peak(name: str, dtype: torch.dtype) -> float | None:
    """FLOP/s of dense matrix products that the maker of the device states; None where it is not in the table, as a CPU or a slice of a GPU (MIG)."""
    if "MIG" in name.split():
        return None
    found = next((by_dtype for pattern, by_dtype in STATED_TFLOPS if re.search(pattern, name)), {})
    return found[dtype] * 1e12 if dtype in found else None


def measured_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a bare square matrix product on this rank, the best of some; takes a fraction of a second."""
    size = _PEAK_SIZE * (8 if device.type == "cuda" else 1)
    left = torch.ones(size, size, dtype=dtype, device=device)
    best, deadline = 0.0, time.monotonic() + _PEAK_SECONDS
    while best == 0.0 or time.monotonic() < deadline:
        started_at = time.perf_counter()
        torch.mm(left, left)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = max(best, 2.0 * size**3 / (time.perf_counter() - started_at))
    return best
