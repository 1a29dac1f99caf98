"""Runs whose layers are compiled: they resume bit for bit, at every ZeRO stage that allows it."""

from pathlib import Path

import pytest

from data_pipeline.errors import InterruptedRunError
from tests.support.batches import small_config
from tests.support.checkpoints import run_folder
from tests.support.contexts import StoppingContext
from tests.support.corpus import small_corpus
from tests.support.distributed import run_distributed
from trainer.context import LocalContext
from trainer.pretrain import pretrain


def plain_whole_and_halves(rank: int, world_size: int, corpus: str, root: str, stage: int) -> None:
    """Not compiled; compiled and uninterrupted; compiled, stopped before step 3 and resumed."""
    model = {"num_layers": 2, "hidden_size": 32, "num_heads": 2, "max_positions": 64, "dropout": 0.1}
    plain, compiled = (
        small_config(
            model={**model, "compile": compiles},
            zero={"stage": stage},
            batch={"global_batch_size": 16, "micro_batch_size": 4, "sequence_length": 32},
            schedule={"steps": 5, "warmup_steps": 2},
            validation={"every_steps": 4, "micro_batches": 3},
        )
        for compiles in (False, True)
    )
    pretrain(plain, corpus, f"{root}/plain", LocalContext(rank, world_size), 1)
    pretrain(compiled, corpus, f"{root}/whole", LocalContext(rank, world_size), 1)
    with pytest.raises(InterruptedRunError):
        pretrain(compiled, corpus, f"{root}/halves", StoppingContext(rank, world_size, at=3), 1)
    pretrain(compiled, corpus, f"{root}/halves", LocalContext(rank, world_size), 2)


@pytest.mark.full
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_compiled_run_resumes_bit_for_bit(tmp_path: Path, stage: int) -> None:
    run_distributed(plain_whole_and_halves, args=(small_corpus(tmp_path), str(tmp_path), stage), timeout_s=400)
    plain, whole, halves = (run_folder(tmp_path / name) for name in ("plain", "whole", "halves"))
    names = ("step", "loss", "grad_norm", "batch_digest")
    expected, records, resumed = ([[record[name] for name in names] for record in run.read_metrics()] for run in (plain, whole, halves))
    assert len(records) == 5
    assert resumed == records
    assert [record[1] for record in records] == pytest.approx([record[1] for record in expected], rel=1e-5)
    told = [event["kind"] for event in halves.read_events()]
    assert (told.count("compiling"), told.count("compiled")) == (2, 2)  # once in each attempt, by rank 0 alone
    assert next(event for event in halves.read_events() if event["kind"] == "resumed")["not_bit_exact_because"] == []
