"""LAMB on parameters that are cut over ranks: norms are those of whole parameters, padding belongs to none, and a resume may cut them otherwise."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.distributed.test_elastic import values_of
from tests.distributed.test_first_steps import batches_of, engine_step
from tests.support.batches import small_config, write_tokenizer
from tests.support.checkpoints import write_engine
from tests.support.distributed import run_distributed
from trainer.config import RunConfig
from trainer.engine import Engine
from trainer.lamb import Lamb, Partition
from trainer.model import build_model
from trainer.zero_state import stretches

SHAPES = {"a": (3, 5), "b": (4,), "c": (2, 11), "d": (1,)}
LENGTH = 30
"""Of each rank's vector: of three ranks, the second has the end of `c`, `d` and padding, the third nothing but padding."""
SETTINGS: dict[str, Any] = {"lr": 0.1, "weight_decay": 0.3}
STEPS = 3


def values(name: str, step: int) -> Tensor:
    """A parameter's gradient; before step 0, its first value."""
    generator = torch.Generator().manual_seed(1000 * step + ord(name))
    return torch.randn(SHAPES[name], generator=generator).mul(ord(name) - 90)


def on_vectors(rank: int, world_size: int) -> Tensor:
    """The parameters one after the other, cut into equal vectors: this rank's after STEPS steps."""
    sizes = {name: values(name, 0).numel() for name in SHAPES}
    places = list(stretches(sizes, [0] * len(sizes), rank * LENGTH, (rank + 1) * LENGTH))

    def vector_at(step: int) -> Tensor:
        vector = torch.full((LENGTH,), 7.0 if step < 0 else 0.0)
        for name, first, at, length in places:
            vector[at : at + length] = values(name, step).view(-1)[first : first + length]
        return vector

    vector, numbers = vector_at(-1), {name: number for number, name in enumerate(SHAPES)}
    optimizer = Lamb([vector], **SETTINGS)
    parameters = torch.tensor([numbers[name] for name, *_ in places], dtype=torch.int64)
    optimizer.partitions = {vector: Partition([(at, length) for _, _, at, length in places], parameters, len(SHAPES), dist.group.WORLD)}
    for step in range(STEPS):
        vector.grad = vector_at(step)
        optimizer.step()
    return vector


def test_vectors_of_several_ranks_move_as_whole_parameters_do() -> None:
    weights = {name: values(name, -1) for name in SHAPES}
    optimizer = Lamb(list(weights.values()), **SETTINGS)
    for step in range(STEPS):
        for name, weight in weights.items():
            weight.grad = values(name, step)
        optimizer.step()
    expected = torch.cat([weight.view(-1) for weight in weights.values()])
    found = torch.cat(run_distributed(on_vectors, 3, timeout_s=45))
    torch.testing.assert_close(found[: len(expected)], expected)
    assert torch.equal(found[len(expected) :], torch.full((3 * LENGTH - len(expected),), 7.0)), "padding has moved"


LAYOUTS: dict[str, tuple[int, int, dict[str, Any]]] = {
    "plain": (2, 1, {}),
    "sub-groups": (1, 3, {"sub_group_size": 3000, "stage3_param_persistence_threshold": 0}),
    "round-robin": (2, 2, {"round_robin_gradients": True}),
}
"""World size, ZeRO stage and settings of DeepSpeed's."""


def layout_config(name: str) -> RunConfig:
    _, stage, settings = LAYOUTS[name]
    zero = {"stage": stage, "deepspeed": {"zero_optimization": settings}}
    return small_config(zero=zero, optimizer={"kind": "lamb", "lr": 1e-2, "weight_decay": 0.1})


def train(rank: int, world_size: int, tokenizer: str, root: str, name: str, source: str | None, steps: list[int]) -> None:
    """Load what `source` is, save that, take steps, save again."""
    config = layout_config(name)
    engine = Engine.build(
        build_model(config.model, tokenizer, seed=3 if source is None else 99, sequence_length=24, device=torch.device("cpu")), config
    )
    if source:
        engine.load_from_other_layout(Path(root) / source)
        write_engine(engine, Path(root) / f"{name}-loaded")
    for step in steps:
        engine_step(engine, config, batches_of(step), step, rank, world_size)
        write_engine(engine, Path(root) / f"{name}-{step}")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two ranks at stage 1 save after each of three steps."""
    root = tmp_path_factory.mktemp("lamb")
    write_tokenizer(str(root / "tokenizer"))
    run_distributed(train, 2, (str(root / "tokenizer"), str(root), "plain", None, [0, 1, 2]), timeout_s=90)
    return root


@pytest.mark.parametrize("name", ["sub-groups", "round-robin"])
def test_other_ranks_and_stages_take_the_same_next_step(root: Path, name: str) -> None:
    run_distributed(train, LAYOUTS[name][0], (str(root / "tokenizer"), str(root), name, "plain-1", [2]), timeout_s=90)
    saved, loaded = values_of(root / "plain-1"), values_of(root / f"{name}-loaded")
    assert saved.keys() == loaded.keys()
    assert all(torch.equal(loaded[key], value) for key, value in saved.items())
    expected, found = values_of(root / "plain-2"), values_of(root / f"{name}-2")
    assert found["step"] == 3
    for key, value in expected.items():
        if "key.bias" not in key:  # its gradient is rounding noise
            assert float((found[key] - value).norm() / value.norm()) < 1e-4, key
