"""What is measured before step 1 is the same on all ranks, and in every later attempt, whatever machine that one gets."""

from pathlib import Path

import pytest
import torch

from data_pipeline.errors import InterruptedRunError
from data_pipeline.storage import Location
from tests.support.batches import small_config, write_tokenizer
from tests.support.checkpoints import GOLDEN_MODEL, golden_run, run_folder
from tests.support.contexts import StoppingContext
from tests.support.corpus import small_corpus
from tests.support.distributed import run_distributed
from trainer import choices
from trainer.attention import Table
from trainer.checkpoint import list_checkpoints
from trainer.choices import looked_up_kernels, settled, settled_kernels
from trainer.context import LocalContext
from trainer.model import build_model
from trainer.networks import PretrainingBert
from trainer.pretrain import pretrain
from trainer.runlog import RunFolder

CPU = torch.device("cpu")
OTHER = {"eager": "sdpa", "sdpa": "eager"}


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


def choose_beside_one_that_emulates(rank: int, world_size: int, root: str) -> str:
    setattr(choices, "fastest_precision", lambda device, everywhere: "bf16" if everywhere else "fp32")  # noqa: B010
    setattr(choices, "computes_bf16", lambda device: rank == 0)  # noqa: B010
    return settled(small_config(precision="auto"), run_folder(root), CPU, attempt=1).precision


def test_no_rank_is_to_compute_in_what_its_device_emulates(tmp_path: Path) -> None:
    assert run_distributed(choose_beside_one_that_emulates, args=(str(tmp_path),), timeout_s=60) == ["fp32", "fp32"]


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


def kernels_of(root: str, choice: str, attempt: int, *, looks: bool = False) -> Table:
    config = small_config(model={**GOLDEN_MODEL, "attention": choice})
    network = build_model(config.model, f"{root}/tokenizer", seed=3, sequence_length=24, device=CPU)
    run = run_folder(root)
    return looked_up_kernels(config, run, network, CPU) if looks else settled_kernels(config, run, network, CPU, attempt)


def choose_kernels_twice(rank: int, world_size: int, root: str) -> list[Table]:
    """As a look and a first attempt find them, a second one after the choice was the other kernel, whatever is faster here, and one of a person's."""
    looked_up, first, run = kernels_of(root, "auto", 1, looks=True), kernels_of(root, "auto", 1), run_folder(root)
    if rank == 0:
        assert set(looked_up) == set(first)
        run.choices.write_json(run.choices.read_json() | {"attention": {length: OTHER[kernel] for length, kernel in first.items()}})
    return [first, kernels_of(root, "auto", 2), kernels_of(root, "auto", 2, looks=True), kernels_of(root, "sdpa", 3)]


def test_all_ranks_and_attempts_attend_with_what_was_chosen_first(tmp_path: Path) -> None:
    write_tokenizer(str(tmp_path / "tokenizer"))
    ranks = run_distributed(choose_kernels_twice, args=(str(tmp_path),), timeout_s=60)
    first, second, looked_up, chosen = ranks[0]
    assert ranks[1] == ranks[0]
    assert second == looked_up == {length: OTHER[kernel] for length, kernel in first.items()}
    assert chosen == {"24": "sdpa"}
    told = [(event["kind"], event["kernels"], event["device"]) for event in run_folder(str(tmp_path)).read_events()]
    assert told == [("attention_chosen", first["24"], "cpu")]
    assert run_folder(str(tmp_path)).choices.read_json() == {"device": "cpu", "attention": second}


def choose_on_unequal_devices(rank: int, world_size: int, root: str) -> Table:
    """Rank 1's device lacks a kernel that rank 0's is faster with."""
    setattr(choices, "fastest_kernels", lambda config, network, candidates, device: {"24": candidates[-1]})  # noqa: B010
    setattr(PretrainingBert, "candidate_kernels", lambda network: ["eager", "sdpa"][: 2 - rank])  # noqa: B010
    return kernels_of(root, "auto", 1)


def test_no_rank_is_to_attend_with_what_its_device_lacks(tmp_path: Path) -> None:
    write_tokenizer(str(tmp_path / "tokenizer"))
    assert run_distributed(choose_on_unequal_devices, args=(str(tmp_path),), timeout_s=60) == [{"24": "eager"}] * 2


def kernels_after_a_checkpoint(rank: int, world_size: int, root: str) -> Table:
    setattr(choices, "fastest_kernels", None)  # noqa: B010  # nothing is measured
    return kernels_of(root, "auto", 2)


def test_a_run_that_chose_no_kernel_goes_on_with_that_of_its_checkpoint(tmp_path: Path) -> None:
    """It began with an earlier release, which took plain products on a CPU."""
    golden_run(tmp_path, 1)
    write_tokenizer(str(tmp_path / "tokenizer"))
    assert list_checkpoints(run_folder(str(tmp_path)))[-1].manifest.circumstances.attention == {}
    assert run_distributed(kernels_after_a_checkpoint, args=(str(tmp_path),), timeout_s=60) == [{"24": "eager"}] * 2


TABLE = {"32": "sdpa", "64": "eager"}


def whole_and_halves(rank: int, world_size: int, corpus: str, root: str) -> None:
    """A run that chose another kernel for each of its phases; uninterrupted, and stopped before step 3 and resumed."""
    config = small_config(
        model={"num_layers": 2, "hidden_size": 32, "num_heads": 2, "max_positions": 64, "dropout": 0.1, "attention": "auto"},
        batch={"global_batch_size": 16, "micro_batch_size": 4, "sequence_length": 32, "phases": [{"from_step": 2, "sequence_length": 64}]},
        schedule={"steps": 5, "warmup_steps": 2},
        validation={"every_steps": 4, "micro_batches": 3},
    )
    for name in ("whole", "halves"):
        run_folder(f"{root}/{name}").choices.write_json({"device": "cpu", "attention": TABLE})
    pretrain(config, corpus, f"{root}/whole", LocalContext(rank, world_size), 1)
    with pytest.raises(InterruptedRunError):
        pretrain(config, corpus, f"{root}/halves", StoppingContext(rank, world_size, at=3), 1)
    pretrain(config, corpus, f"{root}/halves", LocalContext(rank, world_size), 2)


def test_a_run_that_switches_kernels_resumes_bit_for_bit(tmp_path: Path) -> None:
    run_distributed(whole_and_halves, args=(small_corpus(tmp_path, sequence_lengths=(32, 64)), str(tmp_path)), timeout_s=100)
    whole, halves = (run_folder(tmp_path / name) for name in ("whole", "halves"))
    names = ("step", "loss", "grad_norm", "batch_digest")
    records, resumed = ([[record[name] for name in names] for record in run.read_metrics()] for run in (whole, halves))
    assert len(records) == 5
    assert resumed == records
    assert next(event for event in halves.read_events() if event["kind"] == "resumed")["not_bit_exact_because"] == []
    assert list_checkpoints(halves)[-1].manifest.circumstances.attention == TABLE
