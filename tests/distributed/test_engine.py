"""The engine and the ranks' agreements: the batch decides the gradient, not how it is cut."""

from typing import Any

import pytest
import torch

from data_pipeline.errors import DataCorruptError, MaskwrightError, StorageError
from tests.support.batches import EMPTY, random_micro_batch, small_config, write_tokenizer
from tests.support.distributed import run_distributed
from trainer.config import RunConfig
from trainer.engine import Engine
from trainer.model import build_model
from trainer.passes import StepWork, forward_backward
from trainer.reading import StepPart, share_of
from trainer.totals import StepCounts, StepLosses, on_rank_zero, raise_together

MICRO_BATCHES = 4
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp("tokenizer"))
    write_tokenizer(folder)
    return folder


def part_of(rank: int, world_size: int, first: int = 0) -> StepPart:
    share = share_of(range(first, first + MICRO_BATCHES), rank, world_size)
    batches = [random_micro_batch(number) for number in share]
    return StepPart(batches, share.start - first, -(-MICRO_BATCHES // world_size), MICRO_BATCHES, 0.0)


def config_of(stage: int, *, dropout: float, split: int = 1, checkpointing: bool = False) -> RunConfig:
    base = small_config()
    model = base.model.model_dump() | {"dropout": dropout, "activation_checkpointing": checkpointing}
    return small_config(zero={"stage": stage}, model=model, batch=base.batch.model_dump() | {"split": split})


def two_steps(rank: int, world_size: int, tokenizer: str, configs: list[RunConfig]) -> list[dict[str, Any]]:
    """For each config: counts, losses and gradient norms of two steps."""
    found: list[dict[str, Any]] = []
    for config in configs:
        reentrant = config.zero.stage == 3
        model = build_model(config.model, tokenizer, seed=3, sequence_length=24, device=CPU, reentrant_checkpointing=reentrant)
        engine = Engine.build(model, config)
        steps: dict[str, Any] = {"digests": [], "losses": [], "norms": []}
        for first in (0, MICRO_BATCHES):
            part = part_of(rank, world_size, first)
            work = StepWork.of(part, EMPTY, config, CPU)
            counts = work.counts.total(CPU)
            sums = forward_backward(engine, work, counts, world_size)
            losses = StepLosses.total(sums, counts, CPU)
            steps["digests"].append(counts.digest)
            steps["losses"].append(losses.loss)
            steps["norms"].append(engine.step(1e-3).grad_norm)
        found.append(steps)
    return found


CONFIGS = [
    config_of(0, dropout=0.1),
    config_of(1, dropout=0.1),
    config_of(2, dropout=0.1),
    config_of(3, dropout=0.1),
    config_of(3, dropout=0.1, checkpointing=True),
]
SPLIT = [config_of(0, dropout=0.0), config_of(0, dropout=0.0, split=2), config_of(2, dropout=0.0, split=3), config_of(3, dropout=0.0, split=5)]


def test_loss_and_gradient_are_those_of_the_batch(tokenizer: str) -> None:
    """At 1, 2 and 3 ranks (at 3, two of them run an empty micro-step), at every stage, with dropout, and cut into parts."""
    results = {world_size: run_distributed(two_steps, world_size, (tokenizer, CONFIGS + SPLIT), timeout_s=90) for world_size in (1, 2, 3)}
    alone = results[1][0]
    for ranks in results.values():
        for found in ranks:
            for config, steps, same in zip(CONFIGS + SPLIT, found, [alone[0]] * len(CONFIGS) + [alone[len(CONFIGS)]] * len(SPLIT), strict=True):
                where = f"{len(ranks)} ranks, stage {config.zero.stage}, split {config.batch.split}"
                assert steps["digests"] == same["digests"], where
                assert steps["losses"] == pytest.approx(same["losses"], rel=2e-6), where
                assert steps["norms"] == pytest.approx(same["norms"], rel=2e-5), where
    assert alone[0]["losses"] != pytest.approx(alone[len(CONFIGS)]["losses"], rel=1e-4), "dropout does nothing"


def agreements(rank: int, world_size: int) -> dict[str, Any]:
    """What ranks hear when one of them is in trouble."""
    heard: dict[str, Any] = {}
    counts = StepCounts(masked=10, pairs=4, digest=2**64 - 1 - rank, stops=rank).total(CPU)
    heard["counts"] = (counts.masked, counts.digest, counts.stops)
    sums = torch.tensor([float("nan") if rank == 1 else 1.0, 1.0, 0.0, 0.0], dtype=torch.float64)
    heard["loss"] = StepLosses.total(sums, counts, CPU).loss
    heard["told"] = on_rank_zero("think", lambda: 10 + rank)
    try:
        on_rank_zero("write", refused)
    except MaskwrightError as error:
        heard["refused"] = error
    reason: Exception | None = DataCorruptError("shard 3 is damaged", "Restore it.") if rank == 1 else None
    try:
        raise_together(reason, "read the data of step 7")
    except MaskwrightError as error:
        heard["data"] = error
    try:
        raise_together(KeyError("x") if rank == 0 else None, "think")
    except MaskwrightError as error:
        heard["bug"] = error
    return heard


def refused() -> None:
    raise StorageError("the disk is full", "Make room.")


def test_trouble_on_one_rank_is_heard_by_all() -> None:
    for heard in run_distributed(agreements, 2, timeout_s=30):
        assert heard["counts"] == (20, (2**64 - 1 + 2**64 - 2) % 2**64, 1)
        assert heard["loss"] == float("inf")
        assert heard["told"] == 10
        assert isinstance(heard["refused"], StorageError)
        assert heard["refused"].cause == "rank 0 could not write: the disk is full"
        assert isinstance(heard["data"], DataCorruptError)
        assert heard["data"].cause == "rank 1 could not read the data of step 7: shard 3 is damaged"
        assert heard["data"].remedy == "Restore it."
        assert heard["bug"].cause == "rank 0 could not think: KeyError: 'x'"


def test_nothing_to_predict_is_no_loss() -> None:
    [heard] = run_distributed(losses_without_pairs, 1, timeout_s=30)
    assert heard.loss == heard.mlm_loss == 0.5
    assert heard.nsp_loss != heard.nsp_loss


def losses_without_pairs(rank: int, world_size: int) -> StepLosses:
    return StepLosses.total(torch.tensor([5.0, 0.0, 1.0, 0.0], dtype=torch.float64), StepCounts(masked=10), CPU)
