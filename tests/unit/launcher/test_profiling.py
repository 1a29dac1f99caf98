"""What may be profiled, what is said when it fails, and how it is shown; how steps are profiled: tests/distributed/test_profiling.py."""

from pathlib import Path
from typing import Any

import pytest

from data_pipeline.errors import ConflictError, ExitCode, NotFoundError, UsageError
from data_pipeline.storage import Location
from launcher import cli
from launcher.cluster_config import LocalCluster
from launcher.config import dump_yaml
from launcher.lease import PROFILE_FOLDER, Lease
from launcher.policy import Failure, FailureKind
from launcher.profiling import PROFILE, RESULT, profile_run, with_own_remedy
from launcher.verbs_profile import cost_rows, show
from launcher.worker_process import resolve
from trainer import profiling
from trainer.config import RunConfig
from trainer.runlog import RunFolder

CONFIG = RunConfig.model_validate({"name": "made", "schedule": {"steps": 10, "warmup_steps": 1}})


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """A run of ten steps, whose corpus is gone."""
    run = RunFolder(Location.at(tmp_path / "made"))
    run.config.write_bytes(dump_yaml(CONFIG))
    run.append_event("stage_finished", attempt=0, stage="prepare", elapsed_s=1.0, corpus=str(tmp_path / "corpora" / "gone"))
    return run


def profiled(run: RunFolder, steps: int = 3) -> dict[str, Any]:
    return profile_run(run, CONFIG, LocalCluster(), steps, lambda _: None)


def test_a_run_that_is_at_work_is_refused_and_not_disturbed(run: RunFolder) -> None:
    with Lease.acquire(run) as lease:
        with pytest.raises(ConflictError, match="run made is running") as caught:
            profiled(run)
        assert caught.value.exit_code == ExitCode.CONFLICT
        lease.require_held()
    assert not (run.root / PROFILE_FOLDER).exists()


def test_two_profiles_of_a_run_are_one_too_many_and_neither_claims_the_run(run: RunFolder) -> None:
    with Lease.acquire(RunFolder(run.root / PROFILE_FOLDER)):
        with pytest.raises(ConflictError, match="run made is being profiled by another command"):
            profiled(run)
        Lease.acquire(run)


def test_more_steps_than_the_run_has_and_a_run_without_a_corpus(run: RunFolder, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        profiled(run, 10)
    assert caught.value.remedy == "Give at most 9."
    with pytest.raises(NotFoundError, match="has no corpus yet"):
        profiled(RunFolder(Location.at(tmp_path / "new")), 9)


def test_the_entry_is_there_and_both_sides_name_the_same_file() -> None:
    assert resolve(PROFILE) is profiling.profile_steps
    assert profiling.RESULT == RESULT


@pytest.mark.parametrize(
    ("kind", "said"),
    [(FailureKind.BUG, "See /runs/a/profile/logs/attempt-0002/rank-00003.log, and run it again."), (FailureKind.KNOWN, "Free space.")],
)
def test_a_failure_leads_to_the_log_of_the_profile(kind: FailureKind, said: str) -> None:
    failure = Failure(kind, "rank 3: it failed", "Free space.", ExitCode.FAILED, rank=3)
    assert with_own_remedy(failure, RunFolder(Location.at("/runs/a/profile")), 2).remedy == said


def costs(number: int) -> list[dict[str, Any]]:
    return [{"name": f"aten::op{place}", "calls": 10, "seconds": 0.5, "share": 1 / number} for place in range(number)]


def test_ten_costs_are_shown_and_the_others_are_not_forgotten() -> None:
    rows = cost_rows(costs(20), num_steps=5)
    assert len(rows) == 11
    assert rows[0] == ("aten::op0", "2", "100.00", "5.0%")
    assert rows[-1] == ("10 others", "20", "1,000.00", "50.0%")
    assert len(cost_rows(costs(10), 5)) == 10
    long = cost_rows([{**costs(1)[0], "name": "void " + 40 * "at::native::"}], 5)[0][0]
    assert (len(long), long[-1]) == (40, "…")


def test_what_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    phases = [{"phase": "forward", "seconds": 0.25, "share": 1.0}, {"phase": "reduce", "seconds": None, "share": None}]
    about = {"run": "a", "checkpoint_step": 40, "first_step": 41, "num_steps": 5, "world_size": 2, "zero_stage": 3, "precision": "bf16"}
    show({**about, "device": "cpu", "step_s": 0.25, "phases": phases, "costs_of": "cpu", "costs": costs(2), "trace": "/runs/a/profile/trace.json"})
    said = capsys.readouterr().out
    assert "5 steps from step 41 on with the weights of step 40: 2 ranks, ZeRO 3, bf16 on cpu; 250.00 ms a step" in said
    assert [line.split() for line in said.splitlines() if line.startswith(("forward", "reduce"))] == [
        ["forward", "250.00", "100.0%"],
        ["reduce", "in", "backward"],
    ]
    assert "/runs/a/profile/trace.json (open it in Perfetto" in said


def test_the_verb_ends_with_the_code_of_the_error(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    with Lease.acquire(run):
        assert cli.run(["profile", str(run.root), "--json"], debug=False) == ExitCode.CONFLICT
    assert capsys.readouterr().out == ""
