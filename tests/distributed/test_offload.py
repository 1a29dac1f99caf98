"""State and parameters in main memory (`zero.offload_*`): the same steps, checkpoints that load with and without it, exact resumes, refused steps."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.test_elastic import values_of
from tests.support.batches import random_micro_batch, small_config, write_tokenizer
from tests.support.checkpoints import build_engine, write_engine
from tests.support.distributed import run_distributed
from trainer.batch import tensor_batches
from trainer.config import RunConfig
from trainer.engine import Engine, StepOutcome
from trainer.objectives import LossWeights

OFFLOADED: dict[tuple[int, str], dict[str, Any]] = {
    (1, "bf16"): {"offload_optimizer": "cpu"},  # DeepSpeed then has another optimizer, with other files
    (2, "fp32"): {"offload_optimizer": "cpu", "bucket_elements": 5000},
    (3, "bf16"): {"offload_optimizer": "cpu", "offload_parameters": "cpu", "overlap": False},
}
SAVED_AFTER, STEPS = 2, 4


def config_of(case: tuple[int, str], offloaded: bool) -> RunConfig:
    stage, precision = case
    return small_config(zero={"stage": stage} | (OFFLOADED[case] if offloaded else {}), precision=precision)


def step_of(engine: Engine, rank: int, world_size: int, step: int, *, dropped: bool = False) -> StepOutcome:
    """A step of two micro-batches."""
    batches = [random_micro_batch(100 * step + 10 * place + rank) for place in range(2)]
    weights = LossWeights.for_step(num_masked=4 * world_size, num_pairs=8 * world_size, world_size=world_size)
    for place, batch in enumerate(batches):
        engine.accumulate(tensor_batches(batch)[0], weights, last=place == 1)
    return engine.drop() if dropped else engine.step(1e-3)


def with_and_without(rank: int, world_size: int, tokenizer: str, root: str) -> dict[tuple[int, str], dict[str, list[float]]]:
    """Norms of all steps by case, and what is saved: after SAVED_AFTER, and what an engine of the other kind makes of that."""
    found: dict[tuple[int, str], dict[str, list[float]]] = {}
    for case in OFFLOADED:
        folder = Path(root) / f"{case[0]}-{case[1]}"
        found[case] = {}
        for name, other in (("plain", "offloaded"), ("offloaded", "plain")):
            engine = build_engine(config_of(case, name == "offloaded"), tokenizer)
            assert not step_of(engine, rank, world_size, 99, dropped=True).applied
            norms = [step_of(engine, rank, world_size, step).grad_norm for step in range(SAVED_AFTER)]
            write_engine(engine, folder / name)
            torch.distributed.barrier()
            again = build_engine(config_of(case, name == "offloaded"), tokenizer)
            again.load(folder / name)
            for each, into in ((engine, name), (again, f"{name}, resumed")):
                found[case][into] = norms + [step_of(each, rank, world_size, step).grad_norm for step in range(SAVED_AFTER, STEPS)]
            turned = build_engine(config_of(case, other == "offloaded"), tokenizer)
            turned.load_from_other_layout(folder / name)
            write_engine(turned, folder / f"{name}-into-{other}")
            found[case][f"{name}, turned"] = norms + [step_of(turned, rank, world_size, step).grad_norm for step in range(SAVED_AFTER, STEPS)]
    return found


@pytest.mark.full
@pytest.mark.parametrize("world_size", [2, 1])
def test_where_the_state_lies_changes_nothing(tmp_path: Path, world_size: int) -> None:
    write_tokenizer(str(tmp_path / "tokenizer"))
    ranks = run_distributed(with_and_without, world_size, (str(tmp_path / "tokenizer"), str(tmp_path)), timeout_s=100)
    for case, found in ranks[0].items():
        assert all(rank[case] == found for rank in ranks)
        assert found["plain, resumed"] == found["plain"]
        assert found["offloaded, resumed"] == found["offloaded"]
        for name, norms in found.items():
            assert norms == pytest.approx(found["plain"], rel=1e-5 if case[1] == "fp32" else 1e-3), (case, name)
        folder = tmp_path / f"{case[0]}-{case[1]}"
        for name, other in (("plain", "offloaded"), ("offloaded", "plain")):
            saved, loaded = values_of(folder / name), values_of(folder / f"{name}-into-{other}")
            assert saved["step"] == SAVED_AFTER
            assert saved.keys() == loaded.keys()
            assert all(torch.equal(loaded[key], value) for key, value in saved.items()), (case, name)
