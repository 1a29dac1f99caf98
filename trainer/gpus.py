"""What makers state of their GPUs: memory, and the rate of dense matrix products (pure, without torch)."""

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """A model of GPU."""

    pattern: str
    """Of the name that CUDA gives it."""
    memory_gb: float | None
    """Memory in units of 10^9 bytes; None where there are several sizes, and the name says which (`A100-SXM4-80GB`)."""
    tflops: dict[str, float]
    """Dense TFLOP/s by precision; fp32 without tensor cores, as torch multiplies by default."""


GPUS = (
    Gpu(r"\bB200\b", 180.0, {"bf16": 2250.0, "fp16": 2250.0, "fp32": 75.0}),
    Gpu(r"\bH200 NVL\b", 141.0, {"bf16": 835.5, "fp16": 835.5, "fp32": 60.0}),
    Gpu(r"\bH100 NVL\b", 94.0, {"bf16": 835.5, "fp16": 835.5, "fp32": 60.0}),
    Gpu(r"\bH100 PCIe\b", 80.0, {"bf16": 756.0, "fp16": 756.0, "fp32": 51.0}),
    Gpu(r"\bGH200\b", 96.0, {"bf16": 989.4, "fp16": 989.4, "fp32": 67.0}),
    Gpu(r"\bH200\b", 141.0, {"bf16": 989.4, "fp16": 989.4, "fp32": 67.0}),
    Gpu(r"\bH100\b", 80.0, {"bf16": 989.4, "fp16": 989.4, "fp32": 67.0}),
    Gpu(r"\bA100\b", None, {"bf16": 312.0, "fp16": 312.0, "fp32": 19.5}),
    Gpu(r"\bL40S\b", 48.0, {"bf16": 362.05, "fp16": 362.05, "fp32": 91.6}),
    Gpu(r"\bL4\b", 24.0, {"bf16": 121.0, "fp16": 121.0, "fp32": 30.3}),
    Gpu(r"\bA10\b", 24.0, {"bf16": 125.0, "fp16": 125.0, "fp32": 31.2}),
    Gpu(r"\bV100-SXM2\b", None, {"fp16": 125.0, "fp32": 15.7}),
    Gpu(r"\bT4\b", 16.0, {"fp16": 65.0, "fp32": 8.1}),
)
"""The first that fits counts. From NVIDIA's data sheets, of which those that state rates with sparsity only (H100, H200, B200, L4) are halved. What a
card has of its stated memory is a few per cent more than so many 10^9 bytes; of two sizes that share a name (GH200) the smaller one."""


def find_gpu(name: str) -> Gpu | None:
    """The GPU of a name such as CUDA gives it, as `NVIDIA H100 80GB HBM3`, or `H100`. None for what is not in the table, as a slice of one (MIG)."""
    if "MIG" in name.split():
        return None
    return next((gpu for gpu in GPUS if re.search(gpu.pattern, name)), None)


def memory_bytes(name: str) -> int | None:
    """Memory of the GPU of a name; None where it is not known, or comes in sizes of which the name says none."""
    gpu = find_gpu(name)
    stated = re.search(r"\b(\d+)\s?GB\b", name)
    gigabytes = None if gpu is None else gpu.memory_gb or (float(stated[1]) if stated else None)
    return None if gigabytes is None else int(gigabytes * 1e9)


def stated_flops(name: str, precision: str) -> float | None:
    """FLOP/s of dense matrix products in `bf16`, `fp16` or `fp32` that the maker states; None where it is not in the table."""
    gpu = find_gpu(name)
    return gpu.tflops[precision] * 1e12 if gpu is not None and precision in gpu.tflops else None
