"""The learning rate is a function of the step."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.config import ScheduleConfig
from trainer.schedule import learning_rate


@st.composite
def schedules(draw: st.DrawFn) -> ScheduleConfig:
    steps = draw(st.integers(1, 5000))
    return ScheduleConfig(
        kind=draw(st.sampled_from(["linear", "cosine", "constant"])),
        steps=steps,
        warmup_steps=draw(st.integers(0, steps)),
        final_ratio=draw(st.floats(0, 1)),
    )


@given(schedules(), st.data())
def test_rate_rises_then_never_rises_again(schedule: ScheduleConfig, data: st.DataObject) -> None:
    step = data.draw(st.integers(0, schedule.steps - 1))
    now, after = (learning_rate(2.0, schedule, s) for s in (step, step + 1))
    assert 0 < now <= 2.0 or schedule.final_ratio == 0
    if step + 1 < schedule.warmup_steps:
        assert after > now
    elif step >= schedule.warmup_steps:
        assert after <= now + 1e-12


@given(schedules())
def test_ends(schedule: ScheduleConfig) -> None:
    if schedule.warmup_steps:
        assert learning_rate(2.0, schedule, schedule.warmup_steps - 1) == pytest.approx(2.0)
        assert learning_rate(2.0, schedule, 0) == pytest.approx(2.0 / schedule.warmup_steps)
    if schedule.warmup_steps < schedule.steps:
        expected = 2.0 if schedule.kind == "constant" else 2.0 * schedule.final_ratio
        assert learning_rate(2.0, schedule, schedule.steps) == pytest.approx(expected, abs=1e-12)


def test_shapes() -> None:
    linear = ScheduleConfig(kind="linear", steps=110, warmup_steps=10, final_ratio=0.1)
    assert learning_rate(1.0, linear, 60) == pytest.approx(0.1 + 0.9 * 0.5)
    cosine = ScheduleConfig(kind="cosine", steps=110, warmup_steps=10)
    assert learning_rate(1.0, cosine, 35) == pytest.approx(0.5 * (1 + math.cos(math.pi / 4)))
