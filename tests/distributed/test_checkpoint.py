"""Real DeepSpeed engines on two ranks: commit and resume at every stage, kills and full disks while saving, payloads on loading."""

import os
import resource
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from data_pipeline.errors import DataCorruptError, MaskwrightError, NumericTroubleError, StorageError, StorageUnreachableError
from tests.support.batches import write_tokenizer
from tests.support.checkpoints import build_engine, golden_run, plant_payload, run_config, run_folder, save_checkpoint, train_step
from tests.support.corpus import small_corpus
from tests.support.distributed import DistributedFailure, run_distributed
from trainer.agreement import Ranks, agreement_group
from trainer.checkpoint import list_checkpoints, newest_usable
from trainer.manifest import FileDigest
from trainer.receipts import Receipt
from trainer.runlog import RunFolder


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp("tokenizer"))
    write_tokenizer(folder)
    return folder


def masters(engine: Any, stage: int) -> dict[str, torch.Tensor]:
    """The optimizer's fp32 weights by name, asked of the live engine. Collective."""
    from deepspeed.utils import safe_get_full_fp32_param

    named = dict(engine.model.named_parameters())
    if stage > 0:
        return {name: safe_get_full_fp32_param(parameter).detach().clone() for name, parameter in named.items()}
    inner = engine._deepspeed.optimizer
    if not hasattr(inner, "fp32_groups"):
        return {name: parameter.detach().clone() for name, parameter in named.items()}
    by_id = {
        id(half): full for halves, fulls in zip(inner.fp16_groups, inner.fp32_groups, strict=True) for half, full in zip(halves, fulls, strict=True)
    }
    return {name: by_id[id(parameter)].detach().clone() for name, parameter in named.items()}


def train_save_resume(rank: int, world_size: int, root: str, tokenizer: str, stage: int, precision: str, kind: str) -> dict[str, Any]:
    """Train, commit, train on; then resume in a fresh engine and train the same steps again."""
    config, run, group = run_config(stage, precision, optimizer={"kind": kind, "weight_decay": 0.1}), run_folder(root), agreement_group(world_size)
    engine = build_engine(config, tokenizer)
    for step in range(2):
        train_step(engine, rank, world_size, step)
    stall_s = save_checkpoint(root, engine, config, rank, world_size, 2, group)
    saved = masters(engine, stage)
    first = [train_step(engine, rank, world_size, step) for step in (2, 3)]
    after_first = masters(engine, stage)

    engine = build_engine(config, tokenizer)
    found = newest_usable(run, rank=rank, world_size=world_size, attempt=2, group=group)
    assert found is not None
    engine.load(found.zero_folder)
    second = [train_step(engine, rank, world_size, step) for step in (2, 3)]
    return {"first": first, "second": second, "saved": saved, "after": (after_first, masters(engine, stage)), "step": found.step, "stall_s": stall_s}


@pytest.mark.parametrize(
    ("stage", "precision", "kind"),
    [
        *((stage, "bf16", "adamw") for stage in (0, 1, 2, 3)),
        (2, "bf16", "lamb"),
        *(pytest.param(stage, "bf16", "lamb", marks=pytest.mark.full) for stage in (0, 1, 3)),
        *(pytest.param(stage, "fp32", "adamw", marks=pytest.mark.full) for stage in (0, 1, 2, 3)),
    ],
)
def test_commit_and_resume_bit_for_bit(tmp_path: Path, tokenizer: str, stage: int, precision: str, kind: str) -> None:
    ranks = run_distributed(train_save_resume, args=(str(tmp_path), tokenizer, stage, precision, kind), timeout_s=90)
    for result in ranks:
        assert result["step"] == 2
        assert result["first"] == result["second"]
        before, after = result["after"]
        assert all(torch.equal(before[name], after[name]) for name in before)
    (checkpoint,) = list_checkpoints(run_folder(tmp_path))
    assert not [path for path in checkpoint.folder.rglob("*") if path.suffix == ".py" or path.name == "latest"]
    require_consolidated(checkpoint.zero_folder, ranks[0]["saved"])
    require_probe_reproduced(checkpoint, precision)


def require_consolidated(zero_folder: Path, expected: dict[str, torch.Tensor]) -> None:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from trainer.zero_state import consolidate

    weights = consolidate(zero_folder)
    assert expected.keys() <= weights.keys()
    for name, value in expected.items():
        assert torch.equal(weights[name], value), name
    assert torch.equal(weights["cls.predictions.decoder.weight"], weights["bert.embeddings.word_embeddings.weight"])


def require_probe_reproduced(checkpoint: Any, precision: str) -> None:
    """Our network with the consolidated weights, in the engine's precision, gives the engine's logits."""
    from safetensors.torch import load_file

    from trainer.export import load_trained
    from trainer.export_check import PROBE_TOLERANCE

    probe = load_file(checkpoint.probe)
    model = load_trained(checkpoint).to({"bf16": torch.bfloat16, "fp32": torch.float32}[precision])
    with torch.no_grad():
        mlm_logits = model.logits(probe["input_ids"], probe["token_type_ids"], probe["attention_mask"])["mlm_logits"]
    assert float((mlm_logits - probe["mlm_logits"]).square().mean().sqrt() / probe["mlm_logits"].square().mean().sqrt()) <= PROBE_TOLERANCE[precision]


def spoil_a_weight_and_save(rank: int, world_size: int, root: str, tokenizer: str) -> None:
    """Commit step 1; then a weight of rank 1 goes bad between two steps."""
    config, group = run_config(1), agreement_group(world_size)
    engine = build_engine(config, tokenizer)
    train_step(engine, rank, world_size, 0)
    save_checkpoint(root, engine, config, rank, world_size, 1, group)
    if rank == 1:
        with torch.no_grad():
            next(engine.model.parameters())[0, 0] = float("nan")
    save_checkpoint(root, engine, config, rank, world_size, 2, group)


def test_weights_that_went_bad_are_not_saved(tmp_path: Path, tokenizer: str) -> None:
    with pytest.raises(DistributedFailure) as failure:
        run_distributed(spoil_a_weight_and_save, args=(str(tmp_path), tokenizer), timeout_s=60)
    assert all(isinstance(error, NumericTroubleError) and "after 2 steps are not finite" in error.cause for error in failure.value.errors)
    assert [checkpoint.step for checkpoint in list_checkpoints(run_folder(tmp_path))] == [1]


def die_inside_deepspeed(rank: int, world_size: int, root: str, tokenizer: str) -> None:
    """Commit step 1 with a real engine, then kill rank 1 in the middle of the snapshot of step 2."""
    from trainer import zero_files

    config, group = run_config(2), agreement_group(world_size)
    engine = build_engine(config, tokenizer)
    train_step(engine, rank, world_size, 0)
    save_checkpoint(root, engine, config, rank, world_size, 1, group)
    if rank == 1:
        zero_files.SafeFiles.save = lambda *_: os._exit(9)
    save_checkpoint(root, engine, config, rank, world_size, 2, group)


def test_a_rank_killed_inside_deepspeed_does_not_hold_up_the_other(tmp_path: Path, tokenizer: str) -> None:
    with pytest.raises(DistributedFailure) as failure:
        run_distributed(die_inside_deepspeed, args=(str(tmp_path), tokenizer), timeout_s=60)
    (survivor,) = [error for error in failure.value.errors if error is not None]
    assert isinstance(survivor, MaskwrightError)  # within the grace period after the first death, or it would have been killed
    assert [checkpoint.step for checkpoint in list_checkpoints(run_folder(tmp_path))] == [1]


def save_on_a_full_disk(
    rank: int, world_size: int, root: str, tokenizer: str, file_bytes: int | None = None, ballast_bytes: int = 0
) -> tuple[str, str, float]:
    """Commit with a real engine where rank 1 may write no more than `file_bytes` in a file, or where others fill the disk during the save."""
    config, group = run_config(1, model={"num_layers": 2, "hidden_size": 64, "num_heads": 2, "max_positions": 64}), agreement_group(world_size)
    engine = build_engine(config, tokenizer)
    train_step(engine, rank, world_size, 0)
    if rank == 1 and file_bytes is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, resource.RLIM_INFINITY))
    take_snapshot = engine.snapshot

    def fill_the_disk(into: Any) -> None:  # after the look at what is free, before anything is written
        take_snapshot(into)
        if rank == 0:
            Path(root, "ballast").write_bytes(b"x" * ballast_bytes)

    engine.snapshot = fill_the_disk
    started_at = time.monotonic()
    try:
        save_checkpoint(root, engine, config, rank, world_size, 1, group)
    except MaskwrightError as error:
        return type(error).__name__, error.cause, time.monotonic() - started_at
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    return "nothing", "", 0.0


def require_told_to_all(outcomes: list[tuple[str, str, float]], run: RunFolder, cause: str) -> None:
    for kind, text, seconds in outcomes:
        assert kind == StorageError.__name__
        assert cause in text
        assert seconds < 10
    assert outcomes[0][1] == outcomes[1][1]
    assert run.checkpoints.children() == []


def test_one_rank_that_cannot_write_fails_both_in_seconds(tmp_path: Path, tokenizer: str) -> None:
    outcomes = run_distributed(save_on_a_full_disk, args=(str(tmp_path), tokenizer, 20_000), timeout_s=60)
    require_told_to_all(outcomes, run_folder(tmp_path), "rank 1 could not write its part of the checkpoint: [Errno 27] File too large")


@pytest.fixture
def small_disk(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A file system of so many bytes."""
    if os.geteuid() != 0:
        pytest.skip("a small disk needs root to mount a tmpfs")
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={request.param}", "tmpfs", str(disk)], capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.skip(f"a tmpfs cannot be mounted here: {mounted.stderr.strip()}")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("small_disk", ["1m"], indirect=True)
def test_a_save_that_does_not_fit_is_not_begun(small_disk: Path, tokenizer: str) -> None:
    outcomes = run_distributed(save_on_a_full_disk, args=(str(small_disk), tokenizer), timeout_s=60)
    require_told_to_all(outcomes, run_folder(small_disk), "and 1,048,576 are free in")


@pytest.mark.parametrize("small_disk", ["3m"], indirect=True)
def test_a_disk_that_fills_up_during_a_save_is_named_on_both_ranks(small_disk: Path, tokenizer: str) -> None:
    outcomes = run_distributed(save_on_a_full_disk, args=(str(small_disk), tokenizer, None, 2_500_000), timeout_s=60)
    require_told_to_all(outcomes, run_folder(small_disk), "no space left while writing")


def resume_together(rank: int, world_size: int, root: str) -> tuple[int, str]:
    found = newest_usable(run_folder(root), rank=rank, world_size=world_size, attempt=2, group=agreement_group(world_size), timeout_s=20.0)
    assert found is not None
    return found.step, found.manifest.digest


def test_damage_that_one_rank_finds_moves_both_to_the_checkpoint_before(tmp_path: Path) -> None:
    run = golden_run(tmp_path, 1, 2, 3)
    damaged = ["zero/mp_rank_00_model_states.pt", "zero/bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"]
    for step, file in zip((2, 3), damaged, strict=True):
        path = run.checkpoints.path / f"step-{step:08d}" / file
        path.write_bytes(path.read_bytes()[:-100])
    first, second = run_distributed(resume_together, args=(str(tmp_path),), timeout_s=45)
    assert first == second
    assert first[0] == 1
    assert [(event["step"], event["file"]) for event in run.read_events()] == [(3, damaged[1]), (2, damaged[0])]
    assert run.checkpoints.children() == ["step-00000001", "step-00000002.damaged-2", "step-00000003.damaged-2"]


def resume_where_rank_1_reads_badly(rank: int, world_size: int, root: str) -> str:
    if rank == 1:
        setattr(FileDigest, "of", lambda path, on_piece: FileDigest(path.stat().st_size, "0" * 64))  # noqa: B010
    with pytest.raises(StorageUnreachableError) as caught:
        resume_together(rank, world_size, root)
    return caught.value.cause


def test_a_rank_that_reads_badly_is_named_and_costs_no_checkpoint(tmp_path: Path) -> None:
    run = golden_run(tmp_path, 1)
    first, second = run_distributed(resume_where_rank_1_reads_badly, args=(str(tmp_path),), timeout_s=45)
    assert first == second
    assert first.startswith("rank 1 finds ")
    assert first.endswith(" damaged, and rank 0 finds it intact")
    assert (run.checkpoints.children(), run.read_events()) == (["step-00000001"], [])


def read_payloads(rank: int, world_size: int, root: str, tokenizer: str, stage: int) -> dict[str, list[str]]:
    """Commit with a real engine, plant payloads in its files, one kind of file after the other (so that every rank meets one), and read them in
    each of the ways there are; what was refused."""
    import torch.distributed as dist

    from trainer.zero_state import consolidate

    config, group = run_config(stage, "fp32"), agreement_group(world_size)
    engine = build_engine(config, tokenizer)
    train_step(engine, rank, world_size, 0)
    save_checkpoint(root, engine, config, rank, world_size, 1, group)
    (checkpoint,) = list_checkpoints(run_folder(root))
    ways = {"load": engine.load, "load_from_other_layout": engine.load_from_other_layout, "consolidate": consolidate}
    refused: dict[str, list[str]] = {way: [] for way in ways}
    for kind in KINDS:
        folder = checkpoint.folder / f"with-{kind}"
        if rank == 0:
            shutil.copytree(checkpoint.zero_folder, folder)
            for file in folder.glob(f"*{kind}.pt"):
                plant_payload(file, Path(root, "witness"))
        dist.barrier()
        for way, read in ways.items():
            try:
                read(folder)
            except DataCorruptError as error:
                refused[way].append(error.cause)
            dist.barrier()
    return refused


KINDS = ("model_states", "optim_states")
"""Of DeepSpeed's files; stage 0 has no files of the second."""


@pytest.mark.parametrize("stage", [0, pytest.param(1, marks=pytest.mark.full), pytest.param(2, marks=pytest.mark.full), 3])
def test_a_payload_does_not_run_however_a_checkpoint_is_read(tmp_path: Path, tokenizer: str, stage: int) -> None:
    by_rank = run_distributed(read_payloads, args=(str(tmp_path), tokenizer, stage), timeout_s=60)
    kinds = KINDS if stage else KINDS[:1]
    for refused in by_rank:
        for causes in refused.values():
            assert len(causes) == len(kinds)
            assert all(f"{kind}.pt is not a plain" in cause for kind, cause in zip(kinds, causes, strict=True))
    assert not (tmp_path / "witness").exists()


def open_on_storage_of_its_own(rank: int, world_size: int, root: str, is_shared: bool) -> tuple[str, str, list[str]]:
    from trainer.refusals import require_shared

    folder = run_folder(root if is_shared else f"{root}/{rank}").checkpoints
    try:
        require_shared(folder, Ranks(rank, world_size, agreement_group(world_size), timeout_s=20.0), timeout_s=1.0)
    except MaskwrightError as error:
        return type(error).__name__, error.cause, folder.children()
    return "", "", folder.children()


def test_storage_that_is_not_shared_is_refused_and_the_host_named(tmp_path: Path) -> None:
    outcomes = run_distributed(open_on_storage_of_its_own, args=(str(tmp_path), False), timeout_s=45)
    for kind, cause, _ in outcomes:
        assert kind == StorageError.__name__
        assert cause.startswith(f"rank 1 could not read the run folder: host {socket.gethostname()} does not see in")
    assert run_distributed(open_on_storage_of_its_own, args=(str(tmp_path), True), timeout_s=45) == [("", "", [])] * 2


def meet_with_other_software(rank: int, world_size: int, releases: tuple[str, ...]) -> tuple[str, str]:
    from trainer.refusals import require_same_software

    try:
        require_same_software(
            Ranks(rank, world_size, agreement_group(world_size), timeout_s=20.0), {"torch": releases[rank], "ray": "2.60.0", "maskwright": "5e"}
        )
    except MaskwrightError as error:
        return type(error).__name__, error.cause
    return "", ""


def test_other_software_on_a_rank_is_refused_and_named_on_all(tmp_path: Path) -> None:
    host = socket.gethostname()
    told = f"the machines of the run have other software: torch 2.13.0 on {host} and 2.12.1 on {host}"
    outcomes = run_distributed(meet_with_other_software, args=(("2.13.0", "2.12.1"),), timeout_s=45)
    assert outcomes == [("EnvironmentMismatchError", told)] * 2
    assert run_distributed(meet_with_other_software, args=(("2.13.0", "2.13.0"),), timeout_s=45) == [("", "")] * 2


def arrive_late(rank: int, world_size: int) -> tuple[str, float]:
    ranks = Ranks(rank, world_size, agreement_group(world_size), timeout_s=2.0)
    started_at = time.monotonic()
    if rank == 1:
        time.sleep(5)
    try:
        ranks.all_do("meet", lambda: None)
    except MaskwrightError as error:
        return error.cause, time.monotonic() - started_at
    return "", 0.0


def test_a_rank_that_does_not_answer_is_named_in_time() -> None:
    (cause, seconds), _ = run_distributed(arrive_late, timeout_s=45)
    assert "waited 2 s for every rank to meet" in cause
    assert "Ranks 1 failed to pass monitoredBarrier" in cause
    assert seconds < 4


def train_where_rank_1_cannot_write(rank: int, world_size: int, corpus: str, run: str) -> tuple[str, str, int]:
    """The whole loop with saves every two steps; rank 1 may write no more than a few bytes once step 2 is committed, rank 0 is slow to record it."""
    from tests.distributed.test_pretrain import config_of
    from trainer.background_save import Save
    from trainer.context import LocalContext
    from trainer.pretrain import pretrain

    def record_slowly(save: Save, receipt: Receipt, record: Any = Save._record_failure) -> None:  # pyright: ignore[reportPrivateUsage]
        time.sleep(1.0)
        record(save, receipt)

    Save._record_failure = record_slowly  # pyright: ignore[reportPrivateUsage]

    class Context(LocalContext):
        step = 0

        def heartbeat(self, step: int, phase: str) -> None:
            self.step = step
            if self.rank == 1 and step == 3:
                resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))

    config = config_of(1, "bf16", schedule={"steps": 1000, "warmup_steps": 2}, checkpoint={"every_steps": 2})
    context = Context(rank, world_size)
    try:
        pretrain(config, corpus, run, context, 1)
    except MaskwrightError as error:
        return type(error).__name__, error.cause, context.step
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    return "nothing", "", context.step


def test_a_save_that_fails_beside_training_ends_both_ranks_at_the_next_step(tmp_path: Path) -> None:
    corpus, run = small_corpus(tmp_path / "corpus"), run_folder(tmp_path / "run")
    first, second = run_distributed(train_where_rank_1_cannot_write, args=(corpus, run.root.url), timeout_s=60)
    assert first == second
    kind, cause, step = first
    assert kind == StorageError.__name__
    assert cause.startswith("rank 1 could not write its part of the checkpoint: [Errno 27] File too large")
    assert 4 <= step <= 8  # step 4 is saved while the next ones are taken; the next save would have waited for it
    committed = [name for name in run.checkpoints.children() if "." not in name]  # a rank may end before it has removed its part of the other
    assert committed == ["step-00000002"]
    assert "checkpoint_failed" in [event["kind"] for event in run.read_events()]
