"""Other ranks, other ZeRO stages (R4): the same weights and moments in other parts, the same run going on."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from data_pipeline.errors import InterruptedRunError
from data_pipeline.storage import Location
from tests.distributed.test_pretrain import config_of
from tests.support.batches import random_micro_batch, small_config, write_tokenizer
from tests.support.checkpoints import write_engine
from tests.support.contexts import StoppingContext
from tests.support.corpus import small_corpus
from tests.support.distributed import run_distributed

os.environ.setdefault("DS_ACCELERATOR", "cpu")

from trainer import zero_state
from trainer.batch import tensor_batches
from trainer.engine import Engine
from trainer.model import build_model
from trainer.objectives import LossWeights
from trainer.pretrain import pretrain
from trainer.runlog import RunFolder
from trainer.zero_state import MASTER, MOMENTS, consolidate, open_state

STAGES = (0, 1, 2, 3)
CPU = torch.device("cpu")


def _engine(tokenizer: str, stage: int, precision: str, seed: int = 1, **zero_optimization: Any) -> Engine:
    config = small_config(zero={"stage": stage, "deepspeed": {"zero_optimization": zero_optimization}}, precision=precision)
    return Engine.build(build_model(config.model, tokenizer, seed=seed, sequence_length=24, device=CPU), config)


def save_each_stage(rank: int, world_size: int, tokenizer: str, root: str, precision: str) -> None:
    """Two steps at every stage, then a save."""
    for stage in STAGES:
        engine = _engine(tokenizer, stage, precision)
        _two_steps(engine, rank, world_size)
        write_engine(engine, Path(root) / f"saved-{stage}")


def _two_steps(engine: Engine, rank: int, world_size: int) -> None:
    for step in range(2):
        batch = random_micro_batch(10 * step + rank)
        weights = LossWeights.for_step(num_masked=2 * batch.num_masked, num_pairs=4, world_size=world_size)
        engine.accumulate(tensor_batches(batch)[0], weights, last=True)
        engine.step(1e-3)


def load_each_pair(rank: int, world_size: int, tokenizer: str, root: str, precision: str) -> dict[tuple[int, int], list[torch.Tensor]]:
    """Every stage's save into an engine of every stage, saved again; returns the logits of both engines for one input."""
    ids = torch.arange(20).view(2, 10) + 5
    found = {}
    for before in STAGES:
        for after in STAGES:
            engine = _engine(tokenizer, after, precision, seed=99)
            engine.load_from_other_layout(Path(root) / f"saved-{before}")
            write_engine(engine, Path(root) / f"loaded-{before}-{after}-{world_size}")
            found[before, after] = list(engine.logits(ids, torch.zeros_like(ids), torch.ones_like(ids)).values())
    return found


def values_of(folder: Path) -> dict[str, torch.Tensor]:
    state = open_state(folder)
    values = {f"{name} {kind}": state.read(name, kind) for name in state.shapes for kind in (MASTER, *MOMENTS)}
    return values | {"step": torch.tensor(state.step)}


@pytest.mark.full
@pytest.mark.parametrize(
    ("world_size", "precision"), [(3, "bf16"), pytest.param(1, "bf16", marks=pytest.mark.full), pytest.param(3, "fp32", marks=pytest.mark.full)]
)
def test_all_pairs_of_stages_carry_every_bit_over(tmp_path: Path, world_size: int, precision: str) -> None:
    write_tokenizer(str(tmp_path / "tokenizer"))
    arguments = (str(tmp_path / "tokenizer"), str(tmp_path), precision)
    run_distributed(save_each_stage, 2, arguments, timeout_s=100)
    logits = run_distributed(load_each_pair, world_size, arguments, timeout_s=100)[0]
    for before in STAGES:
        saved = values_of(tmp_path / f"saved-{before}")
        assert saved["step"] == 2
        for after in STAGES:
            loaded = values_of(tmp_path / f"loaded-{before}-{after}-{world_size}")
            assert loaded.keys() == saved.keys()
            assert all(torch.equal(loaded[name], value) for name, value in saved.items()), (before, after)
            for one, other in zip(logits[before, after], logits[before, before], strict=True):  # bf16 products depend on alignment
                torch.testing.assert_close(one, other, rtol=0, atol=5e-3)


def test_a_rank_opens_only_the_files_of_what_it_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At a thousand ranks, all of them would otherwise open a million files."""
    write_tokenizer(str(tmp_path / "tokenizer"))
    run_distributed(save_each_stage, 3, (str(tmp_path / "tokenizer"), str(tmp_path), "bf16"), timeout_s=100)
    opened: list[str] = []
    read_file = zero_state.read_file
    monkeypatch.setattr(zero_state, "read_file", lambda path, **options: opened.append(path.name) or read_file(path, **options))
    for stage in (1, 2, 3):
        opened.clear()
        state = open_state(tmp_path / f"saved-{stage}")
        for name, pieces in state.pieces.items():
            for piece in pieces:
                if piece.rank == 2:
                    state.read(name, MASTER, piece.start, piece.stop)
        ranks = sorted(int(name.partition("_pp_rank_")[2].partition("_")[0]) for name in opened if "optim" in name)
        assert ranks == [0, 2]  # the first says where everything is


ORDERS: dict[str, tuple[int, dict[str, Any]]] = {
    "plain": (1, {}),
    "round-robin-1": (1, {"round_robin_gradients": True}),
    "round-robin-2": (2, {"round_robin_gradients": True}),
    "sub-groups": (3, {"sub_group_size": 3000, "stage3_param_persistence_threshold": 0}),
}
"""What moves parameters within the files: a ZeRO stage and settings of DeepSpeed's."""


def save_and_load_each_order(rank: int, world_size: int, tokenizer: str, root: str) -> None:
    for name, (stage, settings) in ORDERS.items():
        engine = _engine(tokenizer, stage, "fp32", **settings)
        _two_steps(engine, rank, world_size)
        write_engine(engine, Path(root) / name)
        torch.distributed.barrier()
        for source in (name, "plain"):
            again = _engine(tokenizer, stage, "fp32", seed=99, **settings)
            again.load_from_other_layout(Path(root) / source)
            write_engine(again, Path(root) / f"{name}-from-{source}")


def test_settings_that_move_parameters_within_the_files_lose_none(tmp_path: Path) -> None:
    """DeepSpeed itself saves wrong addresses under `round_robin_gradients`, and reads them back without a word in another order."""
    write_tokenizer(str(tmp_path / "tokenizer"))
    run_distributed(save_and_load_each_order, 2, (str(tmp_path / "tokenizer"), str(tmp_path)), timeout_s=100)
    plain = values_of(tmp_path / "plain")
    for name in ORDERS:
        consolidate(tmp_path / name)  # compares with the weights that the network computed with
        own = values_of(tmp_path / name)
        assert own.keys() == plain.keys()
        for key, value in plain.items():
            torch.testing.assert_close(own[key], value)
        for source, expected in ((name, own), ("plain", plain)):
            found = values_of(tmp_path / f"{name}-from-{source}")
            assert all(torch.equal(found[key], value) for key, value in expected.items()), (name, source)


SHORT = [(3, 2, 1), (6, 1, 3), (9, 3, 2), (12, 2, 0)]
LONG = [(50, 2, 1), (100, 1, 3), (150, 3, 2), (200, 2, 2)]
"""(steps done at the end, world size, ZeRO stage) of each attempt."""


def one_leg(rank: int, world_size: int, corpus: str, run: str, stage: int, precision: str, until: int, steps: int, attempt: int) -> None:
    schedule, validation = {"steps": steps, "warmup_steps": 2}, {"every_steps": 100, "micro_batches": 1}
    config = config_of(stage, precision, schedule=schedule, validation=validation)
    try:
        pretrain(config, corpus, run, StoppingContext(rank, world_size, until), attempt)
    except InterruptedRunError:
        assert until < steps


@pytest.mark.parametrize(
    ("legs", "precision", "tolerance"),
    [
        pytest.param(SHORT, "bf16", 1e-3, marks=pytest.mark.full),
        (SHORT, "fp32", 1e-5),
        pytest.param(LONG, "fp32", 1e-3, marks=[pytest.mark.full, pytest.mark.timeout(400)]),
    ],
)
def test_a_run_that_changes_ranks_and_stages_is_the_run_that_does_not(
    tmp_path: Path, legs: list[tuple[int, int, int]], precision: str, tolerance: float
) -> None:
    """With dropout."""
    corpus, steps = small_corpus(tmp_path / "corpus"), legs[-1][0]
    run_distributed(one_leg, 2, (corpus, str(tmp_path / "whole"), 1, precision, steps, steps, 1), timeout_s=100)
    for attempt, (until, world_size, stage) in enumerate(legs, 1):
        run_distributed(one_leg, world_size, (corpus, str(tmp_path / "changing"), stage, precision, until, steps, attempt), timeout_s=100)
    whole, changing = (RunFolder(Location.at(tmp_path / name)) for name in ("whole", "changing"))
    expected, found = whole.read_metrics(), changing.read_metrics()
    assert [record["attempt"] for record in found] == [attempt for attempt in (1, 2, 3, 4) for _ in range(steps // 4)]
    assert [record["batch_digest"] for record in found] == [record["batch_digest"] for record in expected]
    for name in ("loss", "mlm_loss"):
        assert [record[name] for record in found] == pytest.approx([record[name] for record in expected], rel=tolerance)
    resumed = [event for event in changing.read_events() if event["kind"] == "resumed"]
    assert [event["step"] for event in resumed] == [until for until, _, _ in legs[:-1]]
    assert all(any("world size" in reason or "ZeRO" in reason or "zero" in reason for reason in event["not_bit_exact_because"]) for event in resumed)
