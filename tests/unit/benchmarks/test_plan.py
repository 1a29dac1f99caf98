"""The benchmarks of plans: every case has one, and what is measured is what they say."""

import json
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from benchmarks import plan_hours, plan_memory
from benchmarks.children import Contestant, run_child
from benchmarks.training import Network, Shape
from launcher.config import load_run_config


def test_every_case_of_memory_has_a_plan() -> None:
    assert len({case.name for case in plan_memory.CASES}) == len(plan_memory.CASES) >= 6
    for case in plan_memory.CASES:
        planned = plan_memory.planned_bytes(case)
        assert planned.peak_bytes > 12 * planned.parameters / case.world_size


def test_every_case_of_hours_is_a_run(tmp_path: Path) -> None:
    assert len(plan_hours.CASES) >= 3
    for case in (*plan_hours.CASES, *plan_hours.SHORT):
        folder = tmp_path / case.name
        folder.mkdir()
        plan_hours._write(case, folder)
        config = load_run_config(folder / "run.yaml", [f"schedule.steps={case.steps}", "schedule.warmup_steps=0", *case.changes])
        assert min(phase.num_micro_batches for phase in config.phases) >= case.world_size


def test_pretraining_lasts_from_its_workers_to_its_end(tmp_path: Path) -> None:
    events = [
        {"kind": "attempt_started", "stage": "pretrain", "time": 10.0},
        {"kind": "stage_finished", "stage": "prepare", "time": 11.0},
        {"kind": "stage_finished", "stage": "pretrain", "time": 40.0},
        {"kind": "attempt_started", "stage": "finetune", "time": 41.0},
    ]
    (tmp_path / "events.jsonl").write_text("".join(f"{json.dumps(event)}\n" for event in events))
    assert plan_hours.pretraining_s(tmp_path) == 30.0


@pytest.mark.full
@pytest.mark.timeout(400)
@pytest.mark.parametrize(("stage", "world_size"), [(0, 1), (2, 2), (3, 1)])
def test_a_rank_s_peak_is_at_least_its_state(stage: int, world_size: int) -> None:
    case = plan_memory.Case(Network(2, 128, 2, vocab_size=8192), Shape(4, 32), stage, world_size=world_size)
    given = {**asdict(case), "cores": [0]}
    found = run_child(Contestant("ours", sys.executable, "benchmarks.contestants.peaks:peak", given, is_ours=True), timeout_s=380)
    assert found["parameters"] == plan_memory.planned_bytes(case).parameters
    assert found["peak_bytes"] > 12 * found["parameters"] / world_size
