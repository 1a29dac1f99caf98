"""A step that is refused, at every ZeRO stage: all ranks refuse it, and the next is as if it had never been."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.batches import EMPTY, random_micro_batch, small_config, write_tokenizer
from tests.support.checkpoints import run_config, write_engine
from tests.support.distributed import run_distributed
from trainer.config import RunConfig
from trainer.engine import Engine, StepOutcome
from trainer.model import build_model
from trainer.passes import StepWork, forward_backward
from trainer.reading import StepPart, share_of

MICRO_BATCHES, STEPS = 4, 5
REFUSED = {1: "nan", 2: "dropped"}
CPU = torch.device("cpu")
BF16 = [run_config(stage) for stage in range(4)]
FP32 = [small_config(zero={"stage": stage}) for stage in range(4)]  # at stage 3 the smallest parameters stay whole
Trace = list[tuple[float, bool]]


def passed(engine: Engine, config: RunConfig, rank: int, world_size: int, step: int) -> None:
    """Forward and backward of this rank's part of a step."""
    share = share_of(range(step * MICRO_BATCHES, (step + 1) * MICRO_BATCHES), rank, world_size)
    part = StepPart([random_micro_batch(number) for number in share], 0, -(-MICRO_BATCHES // world_size), MICRO_BATCHES, 0.0)
    work = StepWork.of(part, EMPTY, config, CPU)
    forward_backward(engine, work, work.counts.total(CPU), world_size)


def stepped(engine: Engine, config: RunConfig, rank: int, world_size: int, step: int, how: str) -> StepOutcome:
    """One step: `plain`, with a NaN in one place of one gradient of the last rank, or with its gradients `dropped`."""
    if how == "nan" and rank == world_size - 1:
        with_nan = engine.model.get_parameter("bert.encoder.layer.0.output.dense.weight").register_hook(spoiled)
        passed(engine, config, rank, world_size, step)
        with_nan.remove()
    else:
        passed(engine, config, rank, world_size, step)
    return engine.drop() if how == "dropped" else engine.step(1e-3)


def spoiled(gradient: Tensor) -> Tensor:
    copy = gradient.clone()
    copy.view(-1)[3] = math.nan
    return copy


def traces(rank: int, world_size: int, tokenizer: str, folder: str, configs: list[RunConfig]) -> list[dict[str, Trace]]:
    """By config, with the steps REFUSED or without them: norms and outcomes of all steps; what is saved in the end lies in `folder`."""
    found: list[dict[str, Trace]] = []
    for number, config in enumerate(configs):
        found.append({})
        for name in ("without", "refused"):
            engine = Engine.build(build_model(config.model, tokenizer, seed=3, sequence_length=24, device=CPU), config)
            trace: Trace = []
            for step in range(STEPS):
                if step not in REFUSED or name == "refused":
                    outcome = stepped(engine, config, rank, world_size, step, REFUSED.get(step, "plain"))
                    trace.append((outcome.grad_norm, outcome.applied))
            write_engine(engine, Path(folder) / f"{number}-{name}")
            found[-1][name] = trace
    return found


@pytest.mark.parametrize("configs", [pytest.param(BF16, id="bf16"), pytest.param(FP32, id="fp32", marks=pytest.mark.full)])
def test_a_refused_step_leaves_no_trace(tmp_path: Path, configs: list[RunConfig]) -> None:
    write_tokenizer(str(tmp_path / "tokenizer"))
    ranks = run_distributed(traces, 2, (str(tmp_path / "tokenizer"), str(tmp_path), configs), timeout_s=120)
    for number, config in enumerate(configs):
        where = f"stage {config.zero.stage}, {config.precision}"
        for found in ranks:
            refused = found[number]["refused"]
            assert [applied for _, applied in refused] == [step not in REFUSED for step in range(STEPS)], where
            assert [entry for entry in refused if entry[1]] == ranks[0][number]["without"], where
            assert not any(math.isfinite(norm) for norm, applied in refused if not applied)
        assert_same_tensors(tmp_path / f"{number}-without", tmp_path / f"{number}-refused", where)


def assert_same_tensors(one: Path, other: Path, where: str) -> None:
    """Every tensor in every file is the same bit for bit; counters of DeepSpeed's that nothing reads may differ."""
    names = sorted(path.relative_to(one) for path in one.rglob("*.pt"))
    assert names, where
    assert names == sorted(path.relative_to(other) for path in other.rglob("*.pt"))
    for name in names:
        ours, theirs = (dict(tensors(torch.load(folder / name, weights_only=False))) for folder in (one, other))
        assert ours.keys() == theirs.keys()
        for key, value in ours.items():
            assert torch.equal(value, theirs[key]), f"{where}: {name} {key}"


def tensors(value: Any, path: str = "") -> Any:
    """Every tensor inside a value, by path."""
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, dict):
        for key, child in value.items():
            yield from tensors(child, f"{path}/{key}")
    elif isinstance(value, list | tuple):
        for key, child in enumerate(value):
            yield from tensors(child, f"{path}/{key}")
