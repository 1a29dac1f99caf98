"""The learning rate is a function of the step."""

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from trainer.config import ScheduleConfig
from trainer.schedule import learning_rate


@st.composite
def schedules(draw: st.DrawFn) -> ScheduleConfig:
    steps = draw(st.integers(1, 5000))
    warmup_steps = draw(st.integers(0, steps))
    kind = draw(st.sampled_from(["linear", "cosine", "constant", "wsd"]))
    settings: dict[str, Any] = {"kind": kind, "steps": steps, "warmup_steps": warmup_steps, "final_ratio": draw(st.floats(0, 1))}
    if kind == "wsd":
        settings["decay_steps"] = draw(st.none() | st.integers(0, steps - warmup_steps))
        settings["decay_shape"] = draw(st.sampled_from(["sqrt", "linear"]))
    return ScheduleConfig(**settings)


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
        expected = 2.0 if schedule.kind == "constant" or schedule.decay_steps == 0 else 2.0 * schedule.final_ratio
        assert learning_rate(2.0, schedule, schedule.steps) == pytest.approx(expected, abs=1e-12)


def test_shapes() -> None:
    linear = ScheduleConfig(kind="linear", steps=110, warmup_steps=10, final_ratio=0.1)
    assert learning_rate(1.0, linear, 60) == pytest.approx(0.1 + 0.9 * 0.5)
    cosine = ScheduleConfig(kind="cosine", steps=110, warmup_steps=10)
    assert learning_rate(1.0, cosine, 35) == pytest.approx(0.5 * (1 + math.cos(math.pi / 4)))


@given(schedules(), st.integers(1, 5000), st.data())
def test_a_longer_run_has_the_same_warm_up_and_stable_part(schedule: ScheduleConfig, more: int, data: st.DataObject) -> None:
    """Of wsd, whatever its decay; the decay itself is the same, later, when its length is given."""
    wsd = schedule.model_copy(update={"kind": "wsd"})
    longer = wsd.model_copy(update={"steps": wsd.steps + more})
    assert longer.decay_from >= wsd.decay_from
    if wsd.decay_from > 0:
        step = data.draw(st.integers(0, wsd.decay_from - 1))
        assert learning_rate(2.0, longer, step) == learning_rate(2.0, wsd, step) == 2.0 * min(1.0, (step + 1) / max(1, wsd.warmup_steps))
    if wsd.decay_steps:
        step = data.draw(st.integers(wsd.decay_from, wsd.steps))
        assert learning_rate(2.0, longer, step + more) == learning_rate(2.0, wsd, step)


@pytest.mark.parametrize(("shape", "half_way"), [("sqrt", 1 - math.sqrt(0.5)), ("linear", 0.5)])
def test_wsd_stays_and_decays(shape: Any, half_way: float) -> None:
    wsd = ScheduleConfig(kind="wsd", steps=200, warmup_steps=10, final_ratio=0.1, decay_steps=40, decay_shape=shape)
    assert [learning_rate(1.0, wsd, step) for step in (9, 10, 100, 159, 160)] == pytest.approx([1.0] * 5)
    assert learning_rate(1.0, wsd, 180) == pytest.approx(0.1 + 0.9 * half_way)


@pytest.mark.parametrize(("steps", "warmup_steps", "expected"), [(1000, 10, 900), (1005, 10, 904), (10, 10, 10), (10, 0, 9), (1, 0, 0)])
def test_wsd_decays_over_a_tenth_by_default(steps: int, warmup_steps: int, expected: int) -> None:
    assert ScheduleConfig(kind="wsd", steps=steps, warmup_steps=warmup_steps).decay_from == expected


@pytest.mark.parametrize(
    ("settings", "cause"),
    [
        ({"kind": "wsd", "decay_steps": 91}, "warmup_steps 10 and decay_steps 91 together exceed steps 100"),
        ({"kind": "wsd", "decay_steps": -1}, "decay_steps"),
        ({"kind": "linear", "decay_steps": 5}, "decay_steps and decay_shape are for kind wsd, and kind is linear"),
        ({"kind": "cosine", "decay_shape": "linear"}, "decay_steps and decay_shape are for kind wsd, and kind is cosine"),
    ],
)
def test_a_decay_that_cannot_be_is_refused(settings: dict[str, Any], cause: str) -> None:
    with pytest.raises(ValidationError, match=cause):
        ScheduleConfig.model_validate({"steps": 100, "warmup_steps": 10, **settings})
