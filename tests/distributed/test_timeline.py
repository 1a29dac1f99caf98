"""The time line of real steps on two ranks: where a rank waits for another, it says so; what DeepSpeed reduces is told apart where it can be."""

import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.storage import Location
from data_pipeline.stream import MicroBatchStream
from tests.support.batches import small_config
from tests.support.corpus import small_corpus
from tests.support.distributed import run_distributed
from trainer.config import RunConfig
from trainer.context import LocalContext
from trainer.engine import Engine
from trainer.pretrain import pretrain
from trainer.runlog import RunFolder

pytestmark = pytest.mark.full

STEPS = 5
SLOW_S = 1.0
SLOW_AT = {2: "agree", 3: "backward"}
"""What rank 1 is late for, by step: rank 0 waits for its counts, and for its gradients."""
PARTS = ("data_wait_s", "agree_s", "forward_s", "backward_s", "reduce_s", "optimizer_s")


class LateContext(LocalContext):
    """Rank 1 is late; every rank keeps what it has said in each step."""

    def __init__(self, rank: int, world_size: int) -> None:
        super().__init__(rank, world_size)
        self.late: set[int] = set()
        self.said: list[tuple[int, str]] = []

    def heartbeat(self, step: int, phase: str) -> None:
        self.said.append((step, phase))
        if self.rank == 1 and SLOW_AT.get(step) == phase and step not in self.late:
            self.late.add(step)
            time.sleep(SLOW_S)


def config_of(stage: int, **zero: Any) -> RunConfig:
    return small_config(
        zero={"stage": stage, **zero},
        batch={"global_batch_size": 16, "micro_batch_size": 4, "sequence_length": 32},
        schedule={"steps": STEPS, "warmup_steps": 2},
        checkpoint={"every_steps": 2},
        validation={"every_steps": 3, "micro_batches": 2},
    )


CONFIGS = {
    "0": config_of(0),
    "1": config_of(1),
    "2": config_of(2, deepspeed={"zero_optimization": {"reduce_bucket_size": 5000}}),  # full several times in a backward pass
    "3": config_of(3),
    "1-overlap": config_of(1, deepspeed={"zero_optimization": {"overlap_comm": True}}),
}


def train(rank: int, world_size: int, corpus: str, root: str) -> dict[str, list[tuple[int, str]]]:
    said: dict[str, list[tuple[int, str]]] = {}
    for name, config in CONFIGS.items():
        context = LateContext(rank, world_size)
        pretrain(config, corpus, f"{root}/{name}", context, 1)
        said[name] = context.said
    return said


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, list[tuple[int, str]]]]]:
    root = tmp_path_factory.mktemp("timeline")
    return root, run_distributed(train, 2, (small_corpus(root), str(root)), timeout_s=110)


def records_of(root: Path, name: str) -> list[dict[str, Any]]:
    return RunFolder(Location.at(root / name)).read_metrics()


@pytest.mark.parametrize("name", CONFIGS)
def test_the_phases_are_parts_of_the_step(trained: tuple[Path, Any], name: str) -> None:
    records = records_of(trained[0], name)
    whole_s = sum(record["step_s"] for record in records)
    assert 0.5 * whole_s < sum(record[part] or 0.0 for record in records for part in PARTS) <= 1.1 * whole_s
    for record in records:
        assert all((record[part] or 0.0) >= 0 for part in PARTS)
        assert record["forward_s"] > 0
        assert record["backward_s"] > 0
        assert (record["reduce_s"] is None) == (name in {"3", "1-overlap"})
        assert record["mfu_stated"] is None
        assert (record["validation_s"] > 0) == (record["step"] == 3)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_rank_that_is_late_is_waited_for_where_it_is(trained: tuple[Path, Any], name: str) -> None:
    records = records_of(trained[0], name)
    assert records[2]["agree_s"] > 0.5 * SLOW_S > records[3]["agree_s"]
    if name in {"0", "1", "2"}:
        assert records[3]["reduce_s"] > 0.5 * SLOW_S > records[3]["backward_s"]
    else:
        assert records[3]["forward_s"] + records[3]["backward_s"] > 0.5 * SLOW_S


def train_on_slow_data(rank: int, world_size: int, corpus: str, root: str) -> None:
    """The first micro-batch of step 3 takes long to read; hosts of GPUs read it in step 2."""
    read = MicroBatchStream.__getitem__

    def read_slowly(stream: MicroBatchStream, number: int) -> Any:
        time.sleep(SLOW_S if number == 12 else 0.0)
        return read(stream, number)

    MicroBatchStream.__getitem__ = read_slowly
    for is_ahead in (False, True):
        Engine.computes_behind = is_ahead  # pyright: ignore[reportAttributeAccessIssue]
        pretrain(config_of(1), corpus, f"{root}/{is_ahead}", LocalContext(rank, world_size), 1)


def test_data_that_is_waited_for_is_told_in_the_step_that_waits(tmp_path: Path) -> None:
    run_distributed(train_on_slow_data, 1, (small_corpus(tmp_path), str(tmp_path)), timeout_s=60)
    for name, slow_step in (("False", 3), ("True", 2)):
        records = records_of(tmp_path, name)
        assert [record["data_wait_s"] > 0.5 * SLOW_S for record in records] == [step == slow_step for step in range(STEPS)]
        assert records[slow_step]["step_s"] > SLOW_S


def test_all_ranks_say_the_same_in_the_same_order(trained: tuple[Path, list[dict[str, list[tuple[int, str]]]]]) -> None:
    first, second = trained[1]
    for name in CONFIGS:
        assert first[name] == second[name]
    reductions = {name: Counter(step for step, phase in said if phase == "reduce") for name, said in first.items()}
    assert reductions["0"] == reductions["1"] == dict.fromkeys(range(STEPS), 1), "once, at the boundary"
    assert min(reductions["2"].values()) > 4, "in each of two backward passes more than once"
    assert not reductions["3"]
    assert not reductions["1-overlap"]
