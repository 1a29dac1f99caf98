"""The mean step of a run, by phase."""

from typing import Any

import numpy as np
import pytest

from launcher.history import History
from launcher.step_phases import StepPhases

PARTS = {"data_wait_s": 0.5, "agree_s": 0.5, "forward_s": 2.0, "backward_s": 4.0, "reduce_s": 1.0, "optimizer_s": 1.0}


def records(num_steps: int = 4, **changes: Any) -> list[dict[str, Any]]:
    """Steps of ten seconds, of which one is between the phases; before the last, three for a checkpoint and five for validation."""
    found = [{"step": step, "attempt": 1, "step_s": 10.0, **PARTS, "checkpoint_stall_s": 0.0, "validation_s": 0.0} for step in range(num_steps)]
    found[-1] |= {"checkpoint_stall_s": 3.0, "validation_s": 5.0}
    return [record | changes for record in found]


def test_the_parts_add_up_to_the_step_with_its_share_of_what_lies_between_steps() -> None:
    found = StepPhases.of(History.of(records(), []))
    assert found is not None
    assert found.step_s == pytest.approx(12.0)
    assert {part.phase: part.seconds for part in found.parts} == pytest.approx(
        {"data_wait": 0.5, "agree": 0.5, "forward": 2, "backward": 4, "reduce": 1, "optimizer": 1, "checkpoint": 0.75, "validation": 1.25, "other": 1}
    )
    assert sum(part.share for part in found.parts) == pytest.approx(1.0)
    assert found.summary() == "a step takes 12,000.0 ms: backward 33%, forward 17%, validation 10%"


def test_a_reduction_that_cannot_be_told_is_null_and_said_to_be_in_the_backward_pass() -> None:
    found = StepPhases.of(History.of(records(reduce_s=None), []))
    assert found is not None
    assert found.to_json()["seconds"]["reduce"] is None
    assert found.to_json()["seconds"]["other"] == pytest.approx(2.0)
    assert [part.text for part in found.parts if part.phase == "backward"] == ["backward, reducing gradients included"]


def test_parts_that_are_longer_than_their_step_are_the_whole() -> None:
    """Clocks of a device and its host may differ in the last digits."""
    found = StepPhases.of(History.of(records(step_s=8.9), []))
    assert found is not None
    assert found.step_s == pytest.approx(11.0)
    assert "other" not in {part.phase for part in found.parts}


def test_records_of_an_older_release_have_no_time_line_and_do_not_dilute_a_newer_one() -> None:
    old = [{name: value for name, value in record.items() if name not in PARTS} for record in records(40)]
    assert StepPhases.of(History.of(old, [])) is None
    both = StepPhases.of(History.of([*old, *({**record, "step": record["step"] + 40} for record in records())], []))
    assert both is not None
    assert both.num_steps == 4
    assert both.step_s == pytest.approx(12.0)
    assert np.isclose(both.to_json()["seconds"]["forward"], 2.0)
