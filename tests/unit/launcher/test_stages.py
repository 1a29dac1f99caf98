"""What a person is told when pretraining begins."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from data_pipeline.config import BatchConfig
from data_pipeline.mixture import Mixture
from data_pipeline.storage import Location
from data_pipeline.volume import epochs, tokens
from launcher.cluster_config import ClusterConfig
from launcher.clusters.local import Machine, Workers
from launcher.job import Job
from launcher.lease import Lease
from launcher.progress import TrainingProgress
from launcher.stages import say_extent
from launcher.supervision import RayOnDemand
from tests.support.corpus import small_corpus
from trainer.config import RunConfig
from trainer.runlog import RunFolder


@pytest.mark.parametrize(("steps", "warned"), [(20, False), (4000, True)])
def test_extent_and_a_warning_for_many_epochs(tmp_path: Path, steps: int, warned: bool) -> None:
    corpus = Location.at(small_corpus(tmp_path))
    mixture, batch = Mixture.open(corpus), BatchConfig(global_batch_size=16, micro_batch_size=8, sequence_length=32)
    expected = steps * 16 / mixture.num_samples("train", 32)
    (rounds,) = epochs(mixture, batch.phases_until(steps))
    assert rounds == pytest.approx(expected)
    per_epoch = int(mixture.indexes[0].blocks("train")["tokens"].sum())
    assert tokens(mixture, [rounds]) == pytest.approx(per_epoch * expected)

    run, out = RunFolder(Location.at(tmp_path / "runs" / "run")), io.StringIO()
    run.append_event("stage_finished", attempt=0, stage="prepare", elapsed_s=1.0, corpus=corpus.url)
    config = RunConfig.model_validate({"name": "run", "batch": batch.model_dump(), "schedule": {"steps": steps, "warmup_steps": 0}})
    console = Console(file=out, width=200)
    progress = TrainingProgress(console, steps)
    ray = RayOnDemand(ClusterConfig(), Workers(1, 1, False), Machine(1, 0))
    say_extent(Job(config, run, Lease.acquire(run), ray, console, progress, run.models / "final", resumed=False))
    first, *more = out.getvalue().splitlines()
    assert first.startswith(f"  {steps:,} steps, about ")
    assert f"{expected:,.1f} epochs of {corpus.name}" in first
    assert bool(more) == warned
