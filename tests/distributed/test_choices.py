"""What is measured before step 1 is the same on all ranks, and in every later attempt, whatever machine that one gets."""

from pathlib import Path

import torch

from data_pipeline.storage import Location
from tests.support.batches import small_config
from tests.support.checkpoints import golden_run, run_folder
from tests.support.distributed import run_distributed
from trainer import choices
from trainer.choices import settled
from trainer.runlog import RunFolder

CPU = torch.device("cpu")


def choose_twice(rank: int, world_size: int, root: str) -> tuple[str, str, str]:
    """The choice of a first attempt, of a second after the choice was fp32 or bf16 whatever is faster here, and of a person."""
    run, auto = RunFolder(Location.at(root)), small_config(precision="auto")
    first = settled(auto, run, CPU, attempt=1).precision
    other = {"bf16": "fp32", "fp32": "bf16"}[first]
    if rank == 0:
        run.choices.write_json({**run.choices.read_json(), "precision": other})
    return first, settled(auto, run, CPU, attempt=2).precision, settled(small_config(precision="bf16"), run, CPU, attempt=1).precision


def choose_after_a_checkpoint(rank: int, world_size: int, root: str) -> str:
    setattr(choices, "fastest_precision", None)  # noqa: B010  # nothing is measured
    return settled(small_config(precision="auto"), run_folder(root), CPU, attempt=2).precision


def test_a_run_that_made_no_choice_goes_on_in_what_its_checkpoint_was_computed_in(tmp_path: Path) -> None:
    """It began with an earlier release, or its choices were lost."""
    golden_run(tmp_path, 1)
    assert run_distributed(choose_after_a_checkpoint, args=(str(tmp_path),), timeout_s=60) == ["bf16", "bf16"]


def test_all_ranks_and_attempts_compute_in_what_was_chosen_first(tmp_path: Path) -> None:
    ranks = run_distributed(choose_twice, args=(str(tmp_path),), timeout_s=60)
    (first, second, chosen), *others = ranks
    assert others == [ranks[0]]
    assert {first, second} == {"bf16", "fp32"}
    assert chosen == "bf16"
    told = [(event["kind"], event["precision"]) for event in RunFolder(Location.at(str(tmp_path))).read_events()]
    assert told[0] == ("precision_chosen", first)
    assert told[1:] in ([], [("slow_precision", "bf16")])
