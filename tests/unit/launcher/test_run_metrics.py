"""What a run tells Prometheus: from its records to values."""

import math
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.storage import Location
from launcher.progress import RecordsTail
from launcher.ray_metrics import RayMetrics
from launcher.run_metrics import OF_RUN, OF_STEP, PREFIX, TOTALS, Vitals
from trainer.metrics import StepRecord
from trainer.runlog import RunFolder, event_line


def record(step: int, **values: object) -> dict[str, object]:
    return {"step": step, "attempt": 1, "loss": 2.0, "mlm_loss": 2.0, "nsp_loss": None, "data_wait_s": 0.25, "checkpoint_stall_s": 0.0, **values}


def test_the_newest_step_counts_and_totals_miss_none() -> None:
    vitals = Vitals()
    vitals.take_steps([record(0), record(1, checkpoint_stall_s=1.5), record(2, loss=1.0)])
    assert (vitals.gauges["step"], vitals.gauges["loss"]) == (3.0, 1.0)
    assert math.isnan(vitals.gauges["nsp_loss"]), "a loss that there is not is no old value"
    assert vitals.totals == {"data_wait_s": 0.75, "checkpoint_stall_s": 1.5}
    vitals.take_steps([])
    assert vitals.gauges["step"] == 3.0
    vitals.take_steps([record(1)])
    assert vitals.gauges["step"] == 2.0, "where training is after a resume, not where it was"
    assert vitals.totals["data_wait_s"] == 1.0


def test_events_of_earlier_commands_count() -> None:
    vitals = Vitals()
    assert vitals.gauges == {"attempts": 0.0, "failures": 0.0}
    vitals.take_events(
        [
            {"kind": "attempt_started", "stage": "pretrain"},
            {"kind": "checkpoint_committed", "step": 500},
            {"kind": "worker_failed"},
            {"kind": "attempt_started", "stage": "pretrain"},
            {"kind": "attempt_started", "stage": "finetune"},
        ]
    )
    vitals.take_events([{"kind": "checkpoint_committed", "step": 1000}, {"kind": "validation", "loss": 1.0}])
    assert vitals.gauges == {"attempts": 2.0, "failures": 1.0, "last_checkpoint": 1000.0}


@pytest.mark.parametrize("line", ["17", "[]", "null", '{"kind": 1'])
def test_a_line_that_is_no_record_is_passed_over(line: str, tmp_path: Path) -> None:
    """Of what a crash has cut a number may be left, which is JSON, too."""
    run = RunFolder(Location.at(tmp_path / "run"))
    tail = RecordsTail(run.events)
    run.events.append_line(line)
    assert tail.read() == []


def test_a_line_that_storage_has_twice_counts_once(tmp_path: Path) -> None:
    """Its answer was lost, so it was written again; the rest of the driver reads events so, too."""
    run = RunFolder(Location.at(tmp_path / "run"))
    tail, vitals = RecordsTail(run.events), Vitals()
    twin, other = (event_line("attempt_started", attempt=number, stage="pretrain") for number in (1, 2))
    for lines in ((twin,), (twin, other, other)):
        run.events.append_line(*lines)
        vitals.take_events(tail.read())
    assert vitals.gauges["attempts"] == len(run.read_events()) == 2


@pytest.mark.parametrize(("events", "steps"), [([{"kind": "checkpoint_committed"}], []), ([], [{"loss": 1.0}]), ([{}], [])])
def test_a_record_of_another_shape_ends_no_run(events: list[dict[str, Any]], steps: list[dict[str, Any]]) -> None:
    said: list[str] = []
    metrics = RayMetrics("run", Vitals(), lambda: False, said.append)
    metrics.update(events, steps)
    metrics.update(events, steps)
    assert ["not published any more" in text for text in said] == [True]


def test_a_resumed_run_begins_with_what_was_recorded() -> None:
    vitals = Vitals.of([{"kind": "attempt_started", "stage": "pretrain"}], steps=500)
    assert (vitals.gauges["attempts"], vitals.gauges["steps"]) == (1.0, 500.0)


def test_what_is_passed_on_is_recorded() -> None:
    assert {*OF_STEP, *TOTALS} <= set(StepRecord.__dataclass_fields__)


def test_every_metric_is_documented() -> None:
    page = (Path(__file__).parents[3] / "docs/watching.md").read_text()
    names = [f"`ray_{PREFIX}{name}`" for name in (*OF_RUN, *OF_STEP)] + [f"`ray_{PREFIX}{name}_total`" for name in TOTALS]
    assert [name for name in names if name not in page] == []
