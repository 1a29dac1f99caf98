"""The whole loop on two ranks and a real corpus: stops, resumes, refuses, fails together."""

import re
import shutil
import time
import urllib.request
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest

from data_pipeline.config import DataConfig
from data_pipeline.errors import ConfigError, DataCorruptError, DivergedError, InterruptedRunError, MaskwrightError, StorageError, UnreachableError
from data_pipeline.storage import Location
from tests.support.batches import small_config
from tests.support.contexts import StoppingContext
from tests.support.corpus import small_corpus
from tests.support.distributed import run_distributed
from tests.support.object_store import ALWAYS, Fault, ObjectStore, object_store
from trainer import saving
from trainer.checkpoint import list_checkpoints
from trainer.config import RunConfig
from trainer.context import LocalContext
from trainer.engine import Engine
from trainer.pretrain import pretrain
from trainer.runlog import RunFolder

STEPS = 6


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    return small_corpus(tmp_path_factory.mktemp("corpus"))


def config_of(stage: int, precision: str, **sections: Any) -> RunConfig:
    defaults: dict[str, Any] = {
        "zero": {"stage": stage},
        "precision": precision,
        "model": {"num_layers": 2, "hidden_size": 32, "num_heads": 2, "max_positions": 64, "dropout": 0.1},
        "batch": {"global_batch_size": 16, "micro_batch_size": 4, "sequence_length": 32},
        "schedule": {"steps": STEPS, "warmup_steps": 2},
        "checkpoint": {"every_steps": 100},
        "validation": {"every_steps": 4, "micro_batches": 3},
    }
    return small_config(**(defaults | sections))


def folder_of(root: str, config: RunConfig, name: str) -> str:
    return f"{root}/{config.zero.stage}-{config.precision}-{name}"


def whole_and_halves(rank: int, world_size: int, configs: list[RunConfig], corpus: str, root: str) -> None:
    """Each config uninterrupted, and stopped before step 3 and resumed; these two read data ahead, as hosts of GPUs do."""
    for config in configs:
        pretrain(config, corpus, folder_of(root, config, "whole"), LocalContext(rank, world_size), 1)
        halves = folder_of(root, config, "halves")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Engine, "computes_behind", True)
            with pytest.raises(InterruptedRunError):
                pretrain(config, corpus, halves, StoppingContext(rank, world_size, at=3), 1)
            pretrain(config, corpus, halves, LocalContext(rank, world_size), 2)


def exact(record: dict[str, Any]) -> dict[str, Any]:
    """What must not depend on time or attempt."""
    names = ("step", "loss", "mlm_loss", "nsp_loss", "mlm_accuracy", "nsp_accuracy", "grad_norm", "lr", "batch_digest")
    return {name: record[name] for name in names}


SAMPLE = [(1, "bf16"), (3, "bf16"), (0, "fp32")]
REST = [(0, "bf16"), (2, "bf16"), (1, "fp32"), (2, "fp32"), (3, "fp32")]


@pytest.mark.parametrize("variants", [pytest.param(SAMPLE, id="sample"), pytest.param(REST, id="rest", marks=pytest.mark.full)])
def test_a_stopped_run_resumes_bit_for_bit(corpus: str, tmp_path: Path, variants: list[tuple[int, str]]) -> None:
    configs = [config_of(stage, precision) for stage, precision in variants]
    run_distributed(whole_and_halves, 2, (configs, corpus, str(tmp_path)), timeout_s=100)
    for config in configs:
        whole, halves = (RunFolder(Location.at(folder_of(str(tmp_path), config, name))) for name in ("whole", "halves"))
        records = whole.read_metrics()
        assert [record["step"] for record in records] == list(range(STEPS))
        assert [exact(record) for record in halves.read_metrics()] == [exact(record) for record in records]
        assert [record["attempt"] for record in halves.read_metrics()] == [1, 1, 1, 2, 2, 2]
        assert list((tmp_path / folder_of("", config, "whole").lstrip("/") / "tensorboard").iterdir())

        events = halves.read_events()
        stopped, resumed = (next(event for event in events if event["kind"] == kind) for kind in ("stopped", "resumed"))
        assert stopped["step"] == resumed["step"] == 3
        assert (resumed["repeated"], resumed["skipped"], resumed["steps_lost"]) == (0, 0, 0)
        assert (resumed["not_bit_exact_because"], resumed["blocks_left_out"], resumed["rewound_from"]) == ([], [], None)
        continued = next(event for event in events if event["kind"] == "continued")
        assert (continued["step"], continued["loss"], continued["same_step"]) == (3, records[3]["loss"], False)
        assert continued["loss_before"] == records[2]["loss"]
        held_out = [[event for event in run.read_events() if event["kind"] == "validation"] for run in (whole, halves)]
        assert [event["step"] for event in held_out[0]] == [4, 6]
        assert [event["mlm_loss"] for event in held_out[0]] == [event["mlm_loss"] for event in held_out[1]]
        assert held_out[0][0]["unigram_entropy"] > 1


def train(rank: int, world_size: int, config: RunConfig, corpus: str, run: str) -> None:
    pretrain(config, corpus, run, LocalContext(rank, world_size), 1)


def test_the_number_of_ranks_does_not_matter(corpus: str, tmp_path: Path) -> None:
    config = config_of(0, "fp32")
    runs = {world_size: RunFolder(Location.at(tmp_path / str(world_size))) for world_size in (1, 2, 3)}
    for world_size, run in runs.items():
        run_distributed(train, world_size, (config, corpus, str(run.root)), timeout_s=60)
    alone = runs[1].read_metrics()
    for run in runs.values():
        records = run.read_metrics()
        assert [record["batch_digest"] for record in records] == [record["batch_digest"] for record in alone]
        assert [record["loss"] for record in records] == pytest.approx([record["loss"] for record in alone], rel=1e-5)
        assert [record["grad_norm"] for record in records] == pytest.approx([record["grad_norm"] for record in alone], rel=1e-4)
        losses = [[event["mlm_loss"] for event in found.read_events() if event["kind"] == "validation"] for found in (run, runs[1])]
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert len({record["batch_digest"] for record in alone}) == STEPS


def test_a_checkpoint_has_the_validation_loss_of_its_own_step(corpus: str, tmp_path: Path) -> None:
    config = config_of(1, "fp32", checkpoint={"every_steps": 2, "keep_last": 9}, validation={"every_steps": 3, "micro_batches": 1})
    run_distributed(train, 1, (config, corpus, str(tmp_path)), timeout_s=60)
    run = RunFolder(Location.at(tmp_path))
    assert [event["step"] for event in run.read_events() if event["kind"] == "validation"] == [3, 6]
    losses = {checkpoint.step: checkpoint.manifest.validation_loss for checkpoint in list_checkpoints(run)}
    assert {step: loss is not None for step, loss in losses.items()} == {2: False, 4: False, 6: True}


def train_apart(rank: int, world_size: int, corpus: str, root: str) -> MaskwrightError | None:
    """Rank 1 is on a host that has neither the run folder nor the corpus."""
    saving.require_shared = partial(saving.require_shared, timeout_s=1.0)
    folder = root if rank == 0 else f"{root}/elsewhere"
    return caught(lambda: pretrain(config_of(1, "fp32"), corpus if rank == 0 else f"{folder}/corpus", folder, LocalContext(rank, world_size), 1))[0]


def test_a_host_without_the_shared_storage_is_told_so_before_it_misses_the_corpus(corpus: str, tmp_path: Path) -> None:
    for error in run_distributed(train_apart, 2, (corpus, str(tmp_path)), timeout_s=60):
        assert isinstance(error, StorageError)
        assert "the storage is not shared" in error.cause


def test_packed_rows_and_a_growing_batch_train_the_same_model(corpus: str, tmp_path: Path) -> None:
    """A batch that grows from 2 to 4 to 6 micro-batches on three ranks, one of them idle at first; rows packed or padded."""
    batch: dict[str, Any] = {"global_batch_size": 16, "micro_batch_size": 8, "sequence_length": 32}
    batch["phases"] = [{"from_step": 2, "global_batch_size": 32}, {"from_step": 4, "global_batch_size": 48}]
    model = {"num_layers": 2, "hidden_size": 32, "num_heads": 2, "max_positions": 64, "dropout": 0.0}
    records = []
    for packing in ("none", "rows"):
        run = RunFolder(Location.at(tmp_path / packing))
        config = config_of(1, "fp32", model=model, batch=batch | {"packing": packing})
        run_distributed(train, 3, (config, corpus, str(run.root)), timeout_s=60)
        records.append(run.read_metrics())
    padded, packed = records
    assert len(padded) == STEPS
    assert [record["batch_digest"] for record in packed] == [record["batch_digest"] for record in padded]
    for name in ("mlm_loss", "nsp_loss", "grad_norm"):
        assert [record[name] for record in packed] == pytest.approx([record[name] for record in padded], rel=1e-4)


def from_a_store(rank: int, world_size: int, corpus: str, url: str, root: str) -> dict[str, tuple[MaskwrightError | None, float]]:
    """The corpus on a disk, in a store that stumbles, and in one that answers no more after the first step."""
    patient, hasty = ({"cache_bytes": 0, "read_timeout_s": 2.0, "total_timeout_s": total_s} for total_s in (60.0, 3.0))
    config = config_of(1, "bf16")
    store = ObjectStore(int(url.split(":")[2].split("/", maxsplit=1)[0]), cast(Any, None))
    pretrain(config, corpus, f"{root}/disk", LocalContext(rank, world_size), 1)
    if rank == 0:
        store.fail(Fault("500", 3), Fault("truncated", 2, path=".tar"), Fault("wrong", 1, path=".tar"))
    pretrain(config.model_copy(update={"data": DataConfig.model_validate(patient)}), url, f"{root}/store", LocalContext(rank, world_size), 1)
    long = config_of(1, "bf16", schedule={"steps": 500, "warmup_steps": 2}, data=hasty)
    return {"silent": caught(lambda: pretrain(long, url, f"{root}/silent", FailingStoreContext(rank, world_size, store), 1))}


class FailingStoreContext(LocalContext):
    """The store stops answering when the first step has begun."""

    def __init__(self, rank: int, world_size: int, store: ObjectStore) -> None:
        super().__init__(rank, world_size)
        self.store: ObjectStore | None = store

    def heartbeat(self, step: int, phase: str) -> None:
        if self.rank == 0 and phase == "forward" and self.store is not None:
            self.store.fail(Fault("slow", ALWAYS, path=".tar"))
            self.store = None


def test_training_from_a_store_that_stumbles_and_from_one_that_falls_silent(corpus: str, tmp_path: Path) -> None:
    with object_store() as store:
        url = f"{store.endpoint}/{store.bucket}/corpus"
        for path in Path(corpus).rglob("*"):
            if path.is_file():
                target = f"{url}/{path.relative_to(corpus).as_posix()}"
                headers = {"x-amz-acl": "public-read", "Content-Type": "application/octet-stream"}
                request = urllib.request.Request(target, data=path.read_bytes(), method="PUT", headers=headers)
                urllib.request.urlopen(request, timeout=10).close()
        heard = run_distributed(from_a_store, 2, (corpus, url, str(tmp_path)), timeout_s=100)
    disk, stumbling = (RunFolder(Location.at(tmp_path / name)).read_metrics() for name in ("disk", "store"))
    assert [exact(record) for record in stumbling] == [exact(record) for record in disk]
    for rank in heard:
        error, elapsed_s = rank["silent"]
        assert isinstance(error, UnreachableError)
        assert re.search("could not read the (data of step|validation data)", error.cause)
        assert elapsed_s < 40


def caught(action: Callable[[], None]) -> tuple[MaskwrightError | None, float]:
    started_at = time.monotonic()
    try:
        action()
    except MaskwrightError as error:
        return error, time.monotonic() - started_at
    return None, time.monotonic() - started_at


def troubles(rank: int, world_size: int, corpus: str, damaged: str, other: str, root: str) -> dict[str, tuple[MaskwrightError | None, float]]:
    """What each rank is told when a run cannot go on."""
    context = LocalContext(rank, world_size)
    config = config_of(1, "bf16")
    skipping, strict = (config_of(1, "bf16", data={"on_damage": "skip", "skip_budget": budget}) for budget in (99, 0))
    wild = config_of(1, "fp32", optimizer={"lr": 1e30, "clip_norm": 1e30}, schedule={"steps": STEPS, "warmup_steps": 0}, numerics={"policy": "stop"})
    pretrain(config, corpus, f"{root}/good", context, 1)
    return {
        "data": caught(lambda: pretrain(config, damaged if rank == 1 else corpus, f"{root}/data", context, 1)),
        "skipped": caught(lambda: pretrain(skipping, damaged, f"{root}/skipped", context, 1)),
        "budget": caught(lambda: pretrain(strict, damaged, f"{root}/budget", context, 1)),
        "diverged": caught(lambda: pretrain(wild, corpus, f"{root}/wild", context, 1)),
        "corpus": caught(lambda: pretrain(config, other, f"{root}/good", context, 2)),
        "fp16": caught(lambda: pretrain(config_of(1, "fp16"), corpus, f"{root}/fp16", context, 1)),
        "finished": caught(lambda: pretrain(config, corpus, f"{root}/good", context, 3)),
    }


def test_all_ranks_fail_together_with_the_cause(corpus: str, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(corpus, damaged)
    for split in ("train", "validation"):
        shard = damaged / f"{split}-000000.tar"
        data = bytearray(shard.read_bytes())
        data[600] ^= 1  # the first block's token ids
        shard.write_bytes(data)
    other = small_corpus(tmp_path / "other", seed=1)
    for heard in run_distributed(troubles, 2, (corpus, str(damaged), other, str(tmp_path)), timeout_s=100):
        expected = {
            "data": DataCorruptError,
            "skipped": type(None),
            "budget": DataCorruptError,
            "diverged": DivergedError,
            "corpus": ConfigError,
            "fp16": ConfigError,
            "finished": type(None),
        }
        assert {name: type(error) for name, (error, _) in heard.items()} == expected
        error, elapsed_s = heard["data"]
        assert error is not None
        assert error.cause.startswith("rank 1 could not read the data of step 0: ")
        assert elapsed_s < 20
        assert "was trained on corpus" in str(heard["corpus"][0])
        assert "bf16" in str(heard["fp16"][0])
        assert "1 damaged blocks, data.skip_budget is 0" in str(heard["budget"][0])
    skipped = RunFolder(Location.at(tmp_path / "skipped"))
    events = [event for event in skipped.read_events() if event["kind"] == "data_skipped"]
    assert [(event["shard"], event["block"]) for event in events] == [("train-000000.tar", 0), ("validation-000000.tar", 0)]
    assert len(skipped.read_metrics()) == STEPS
    assert len(RunFolder(Location.at(tmp_path / "good")).read_metrics()) == STEPS
