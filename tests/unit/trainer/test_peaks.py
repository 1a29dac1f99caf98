"""What makers state of their devices."""

import time

import pytest
import torch

from trainer import peaks
from trainer.gpus import memory_bytes
from trainer.peaks import device_name, measured_peak, stated_peak


@pytest.mark.parametrize(
    ("name", "dtype", "teraflops"),
    [
        ("NVIDIA H100 80GB HBM3", torch.bfloat16, 989.4),
        ("NVIDIA H100 PCIe", torch.bfloat16, 756.0),
        ("NVIDIA H100 NVL", torch.float16, 835.5),
        ("NVIDIA H200", torch.bfloat16, 989.4),
        ("NVIDIA H200 NVL", torch.bfloat16, 835.5),
        ("NVIDIA A100-SXM4-80GB", torch.bfloat16, 312.0),
        ("NVIDIA A100 80GB PCIe", torch.float32, 19.5),
        ("NVIDIA L40S", torch.bfloat16, 362.05),
        ("NVIDIA L4", torch.bfloat16, 121.0),
        ("Tesla T4", torch.float16, 65.0),
    ],
)
def test_a_device_is_found_by_its_name(name: str, dtype: torch.dtype, teraflops: float) -> None:
    assert stated_peak(name, dtype) == pytest.approx(teraflops * 1e12)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("cpu", torch.float32),
        ("NVIDIA L40", torch.bfloat16),
        ("NVIDIA A100X", torch.bfloat16),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", torch.bfloat16),
        ("Tesla T4", torch.bfloat16),
    ],
)
def test_what_is_not_known_is_not_guessed(name: str, dtype: torch.dtype) -> None:
    """Neighbours by name, a seventh of a card, and a precision that a card has no instructions for."""
    assert stated_peak(name, dtype) is None


def test_the_peak_of_a_cpu_is_measured() -> None:
    device = torch.device("cpu")
    assert device_name(device) == "cpu"
    assert 1e8 < measured_peak(device, torch.float32) < 1e14


def test_a_slow_first_product_is_not_the_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    """It loads libraries and kernels."""
    real, sizes = peaks._product_seconds, list[int]()

    def slow_at_first(size: int, device: torch.device, dtype: torch.dtype) -> float:
        sizes.append(size)
        if len(sizes) == 1:
            time.sleep(0.5)
        return 0.5 if len(sizes) == 1 else real(size, device, dtype)

    monkeypatch.setattr(peaks, "_product_seconds", slow_at_first)
    assert measured_peak(torch.device("cpu"), torch.float32) > 1e8
    assert sizes.count(sizes[-1]) >= 3


def test_measuring_a_peak_takes_no_longer_where_there_are_no_instructions_for_it() -> None:
    """A product of the full size in bf16 takes seconds on such a CPU; this counts its time alone."""
    started_at = time.process_time()
    assert measured_peak(torch.device("cpu"), torch.bfloat16) > 0
    assert time.process_time() - started_at < 1.0 * torch.get_num_threads()


@pytest.mark.parametrize(
    ("name", "gigabytes"),
    [
        ("H100", 80),
        ("NVIDIA H100 NVL", 94),
        ("NVIDIA H200", 141),
        ("NVIDIA A100-SXM4-80GB", 80),
        ("A100 40GB", 40),
        ("A100", None),
        ("RTX 3090", None),
    ],
)
def test_memory_is_told_by_name(name: str, gigabytes: float | None) -> None:
    assert memory_bytes(name) == (None if gigabytes is None else gigabytes * 1e9)
