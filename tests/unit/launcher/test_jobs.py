"""A driver that has lost its run to another: it starts nothing more, and does not speak for the run. What one looks for before it begins."""

import io
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from rich.console import Console

from data_pipeline.errors import ConfigError, ConflictError, ExitCode, InterruptedRunError, MaskwrightError, StorageError
from data_pipeline.storage import Location
from launcher.attempts import driver_log, last_attempt
from launcher.cluster_config import ClusterConfig, LocalCluster, RayCluster
from launcher.clusters.local import Machine, Workers
from launcher.config import dump_yaml
from launcher.job import Job
from launcher.jobs import record_end, record_finish
from launcher.lease import STALE_AFTER_S, Lease
from launcher.progress import TrainingProgress
from launcher.retries import run_with_retries
from launcher.run_status import read_status
from launcher.supervision import RayOnDemand
from launcher.verbs_run import require_trackers
from trainer.config import RunConfig
from trainer.runlog import RunFolder
from trainer.tracking_config import TrackingConfig


class RayIsUp(RayOnDemand):
    """Ray, as if it ran already."""

    def scratch(self) -> Path:
        return Path("unused")


@pytest.fixture
def job(tmp_path: Path) -> Job:
    run = RunFolder(Location.at(tmp_path / "run"))
    console = Console(file=io.StringIO())
    progress = TrainingProgress(console, 10)
    ray = RayIsUp(ClusterConfig(), Workers(1, 1, False), Machine(1, 0))
    return Job(RunConfig(name="run"), run, Lease.acquire(run), ray, console, progress, run.models / "final", resumed=False)


@pytest.fixture
def taken(job: Job) -> Job:
    """The same after another command has taken the run, because this one was not heard of for long."""
    job.run.lease.write_json(asdict(replace(job.lease.state, time=time.time() - 2 * STALE_AFTER_S)))
    Lease.acquire(job.run)
    return job


def test_the_log_of_commands_holds_no_secrets(job: Job) -> None:
    record_end(job, MaskwrightError("cannot read s3://key:hidden@bucket/text", "Look at it."))
    log = driver_log(job.run).read_bytes().decode()
    assert "s3://(redacted)@bucket/text" in log
    assert "hidden" not in log


def never() -> bool:
    return False


def test_a_superseded_driver_claims_no_attempt(taken: Job) -> None:
    """A newer attempt would end the workers of the driver that has the run now."""
    with pytest.raises(ConflictError, match="taken over"):
        run_with_retries(taken, "nowhere:nothing", {}, done=never)
    assert last_attempt(taken.run) == 0


@pytest.mark.parametrize(("workers", "said"), [(Workers(2, 1, False), "starting 2 workers ..."), (None, "waiting for the cluster")])
def test_what_is_waited_for_is_said_before_ray_starts(job: Job, workers: Workers | None, said: str) -> None:
    out = io.StringIO()
    job.console, job.ray = Console(file=out), RayOnDemand(ClusterConfig(), workers, Machine(2, 0))
    job.ray.close()  # as when the command ends meanwhile
    with pytest.raises(InterruptedRunError):
        run_with_retries(job, "nowhere:nothing", {}, done=never)
    assert said in out.getvalue()


@pytest.mark.parametrize(
    ("fixture", "told"),
    [("job", ["failed"]), ("taken", [])],
)
def test_only_who_has_the_run_says_how_it_ended(fixture: str, told: list[str], request: pytest.FixtureRequest) -> None:
    job: Job = request.getfixturevalue(fixture)
    record_end(job, StorageError("full", "free some"))
    assert [event["kind"] for event in job.run.read_events()] == told
    assert "full" in driver_log(job.run).read_bytes().decode()


def test_fine_tuning_a_run_whose_pretraining_was_stopped_does_not_finish_it(job: Job) -> None:
    (job.run.checkpoints / "step-00000500" / "MANIFEST.json").write_json({})
    record_finish(job)
    job.run.config.write_bytes(dump_yaml(job.config))
    with job.lease:
        pass
    status = read_status(job.run)
    assert (status.state, status.exit_code) == ("stopped", ExitCode.INTERRUPTED)
    assert "pretraining is at step 500 of 1000000" in status.cause
    (job.run.checkpoints / f"step-{job.config.schedule.steps:08d}" / "MANIFEST.json").write_json({})
    record_finish(job)
    assert read_status(job.run).state == "finished"


def test_the_end_says_its_code(job: Job) -> None:
    record_end(job, StorageError("full", "free some"))
    (event,) = job.run.read_events()
    assert (event["exit_code"], event["cause"], event["remedy"]) == (ExitCode.STORAGE, "full", "free some")


def test_the_driver_looks_for_trackers_only_where_rank_0_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a cluster the machine of the driver need not have what those of ranks have."""
    monkeypatch.setitem(sys.modules, "wandb", None)
    config = RunConfig(name="run", tracking=TrackingConfig(trackers=("wandb",)))
    require_trackers(config, RayCluster(kind="ray"))
    with pytest.raises(ConfigError):
        require_trackers(config, LocalCluster())
