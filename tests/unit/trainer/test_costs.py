"""Costs out of what torch.profiler says."""

import threading
from dataclasses import dataclass

import pytest
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, record_function

from trainer.context import LocalContext
from trainer.costs import LABEL, Cost, costs_of
from trainer.profiling import Labels


@dataclass
class Average:
    """The fields of `torch.autograd.profiler_util.FunctionEventAvg` that are read, times in microseconds."""

    key: str
    count: int
    self_cpu_time_total: float = 0.0
    self_device_time_total: float = 0.0
    device_type: DeviceType = DeviceType.CPU
    is_user_annotation: bool = False


def test_of_a_cpu_operators_and_what_lies_between_them() -> None:
    averages = [
        Average("aten::bmm", 8, 3_000_000),
        Average(f"{LABEL}agree", 2, 1_000_000),
        Average("ProfilerStep*", 1, 500_000),
        Average("aten::mm", 4, 3_500_000),
        Average("aten::t", 4, 0),
    ]
    assert costs_of(averages, on_gpu=False) == [
        Cost("aten::mm", 4, 3.5, 3.5 / 8),
        Cost("aten::bmm", 8, 3.0, 3.0 / 8),
        Cost("Python and waiting in agree", 2, 1.0, 1.0 / 8),
        Cost("Python between phases", 1, 0.5, 0.5 / 8),
    ]


def test_of_a_gpu_kernels_only() -> None:
    """An operator's row has the time of its kernels too, and a label on the device that of all within it: neither is counted again."""
    averages = [
        Average("aten::mm", 4, 100, 2_000_000),
        Average("sm90_gemm", 4, 0, 2_000_000, DeviceType.CUDA),
        Average("Memcpy HtoD", 2, 0, 6_000_000, DeviceType.CUDA),
        Average(f"{LABEL}forward", 2, 0, 8_000_000, DeviceType.CUDA, is_user_annotation=True),
    ]
    assert costs_of(averages, on_gpu=True) == [Cost("Memcpy HtoD", 2, 6.0, 0.75), Cost("sm90_gemm", 4, 2.0, 0.25)]


def test_nothing_that_took_time_is_no_cost() -> None:
    assert costs_of([Average("aten::t", 4)], on_gpu=False) == []


def profiled() -> torch.profiler.profile:
    """A backward pass in whose midst, and at whose end, gradients are reduced."""
    labels = Labels(LocalContext())
    weights = torch.ones(64, 64, requires_grad=True)

    def reduce(gradient: torch.Tensor) -> None:
        labels.heartbeat(0, "reduce")
        torch.cumsum(gradient, 0)
        labels.heartbeat(0, "backward")

    with torch.profiler.profile(activities=[ProfilerActivity.CPU]) as profiler:
        labels.heartbeat(0, "forward")
        loss = (weights @ weights).tanh().sum()
        labels.heartbeat(0, "backward")
        removal = weights.register_hook(reduce)
        loss.backward()
        removal.remove()
        labels.heartbeat(0, "reduce")
        torch.cumsum(weights.detach(), 0)
        labels.heartbeat(0, "backward")
        labels.heartbeat(0, "optimizer")
        labels.close()
    return profiler


def test_the_labels_of_phases_lie_as_the_phases_do() -> None:
    """In a thread that is not the main one, as under Ray."""
    found = list[torch.profiler.profile]()
    thread = threading.Thread(target=lambda: found.append(profiled()))
    thread.start()
    thread.join(60)
    (profiler,) = found
    events = [event for event in profiler.events() or [] if event.name.startswith(LABEL)]
    stretches = {
        name: [(e.time_range.start, e.time_range.end) for e in events if e.name == f"{LABEL}{name}"]
        for name in ("forward", "backward", "reduce", "optimizer")
    }
    assert {name: len(each) for name, each in stretches.items()} == {"forward": 1, "backward": 1, "reduce": 2, "optimizer": 1}
    (backward,) = stretches["backward"]
    assert all(backward[0] <= start <= end <= backward[1] for start, end in stretches["reduce"])
    assert stretches["forward"][0][1] <= backward[0] <= backward[1] <= stretches["optimizer"][0][0]
    costs = costs_of(profiler.key_averages(), on_gpu=False)
    assert {"aten::mm", "aten::cumsum", "Python and waiting in backward"} <= {cost.name for cost in costs}
    assert sum(cost.share for cost in costs) == pytest.approx(1.0)


def test_a_label_that_is_profiled_is_profiled_by_its_name() -> None:
    with torch.profiler.profile(activities=[ProfilerActivity.CPU]) as profiler, record_function(f"{LABEL}data"):
        pass
    assert [cost.name for cost in costs_of(profiler.key_averages(), on_gpu=False)] == ["Python and waiting in data"]
