"""A run whose folder lies in a store: two ranks save, are killed while they do, and resume bit for bit (a real S3 server)."""

import os
from pathlib import Path
from typing import Any

import fsspec
import pytest

from data_pipeline.storage import Location
from tests.distributed.test_pretrain import config_of, exact
from tests.support.corpus import small_corpus
from tests.support.distributed import DistributedFailure, run_distributed
from tests.support.object_store import client_environment, object_store
from trainer.context import LocalContext
from trainer.pretrain import pretrain
from trainer.runlog import RunFolder

STEPS = 6


def train(rank: int, world_size: int, corpus: str, run: str, endpoint: str, attempt: int, dies: bool) -> None:
    """All steps; when it `dies`, rank 1 in the upload of step 4."""
    from trainer import background_save

    reach(endpoint)
    write = background_save.write_files

    def dies_in_step_4(snapshot: Any, part: Location, on_piece: Any) -> Any:
        if dies and rank == 1 and "step-00000004" in part.url:
            os._exit(9)
        return write(snapshot, part, on_piece)

    background_save.write_files = dies_in_step_4
    config = config_of(1, "bf16", schedule={"steps": STEPS, "warmup_steps": 2}, checkpoint={"every_steps": 2, "keep_last": 9})
    pretrain(config, corpus, run, LocalContext(rank, world_size), attempt)


def reach(endpoint: str) -> None:
    """What a user has in the environment and in fsspec's configuration."""
    os.environ |= client_environment(endpoint)
    fsspec.config.conf["s3"] = {"endpoint_url": endpoint}


def test_a_run_in_a_store_that_is_killed_in_a_save_resumes_bit_for_bit(tmp_path: Path) -> None:
    corpus = small_corpus(tmp_path / "corpus")
    with pytest.MonkeyPatch.context() as patch, object_store() as store:
        local, remote = str(tmp_path / "whole"), f"s3://{store.bucket}/run"
        run_distributed(train, 2, (corpus, local, store.endpoint, 1, False), timeout_s=60)
        with pytest.raises(DistributedFailure):
            run_distributed(train, 2, (corpus, remote, store.endpoint, 1, True), timeout_s=60)
        run_distributed(train, 2, (corpus, remote, store.endpoint, 2, False), timeout_s=60)
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "test")
        patch.setitem(fsspec.config.conf, "s3", {"endpoint_url": store.endpoint})
        whole, killed = RunFolder(Location.at(local)), RunFolder(Location(remote))
        found = killed.read_metrics()
        assert [exact(record) for record in found] == [exact(record) for record in whole.read_metrics()]
        assert [record["attempt"] for record in found] == [1, 1, 2, 2, 2, 2]
        assert killed.checkpoints.children() == [f"step-{step:08d}" for step in (2, 4, 6)]
        assert all(
            (killed.checkpoints / f"step-{step:08d}").children() == ["MANIFEST.json", f"attempt-{1 if step == 2 else 2}"] for step in (2, 4, 6)
        )
        (resumed,) = [event for event in killed.read_events() if event["kind"] == "resumed"]
        assert (resumed["step"], resumed["repeated"], resumed["skipped"], resumed["not_bit_exact_because"]) == (2, 0, 0, [])
