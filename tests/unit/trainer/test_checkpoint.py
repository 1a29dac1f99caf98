"""Only an intact checkpoint is ever resumed from, and a save is selectable at once or not at all (one rank; see also tests/distributed)."""

import errno
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.errors import ConfigError, EnvironmentMismatchError, NoCheckpointError, NotFoundError, StorageUnreachableError
from tests.support.checkpoints import GOLDEN, golden_run, run_config, run_folder, save_request, snapshot_of
from trainer.background_save import Save
from trainer.checkpoint import Checkpoint, has_same_layout, list_checkpoints, newest_usable, verify, why_not_exact
from trainer.manifest import MANIFEST, Circumstances, FileDigest, Manifest, read_manifest
from trainer.runlog import RunFolder
from trainer.state import TrainState

FILES = sorted(path.relative_to(GOLDEN).as_posix() for path in GOLDEN.rglob("*") if path.is_file())


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def newest(run: RunFolder, attempt: int = 2) -> Checkpoint | None:
    return newest_usable(run, rank=0, world_size=1, attempt=attempt, group=None)


def save(run: RunFolder, step: int, *, attempt: int = 1, content: bytes = b"weights", loss: float | None = None, **kept: Any) -> None:
    files = {"zero/mp_rank_00_model_states.pt": content, "state.json": b"{}", "probe.safetensors": b""}
    Save(save_request(run, step, attempt=attempt, validation_loss=loss, checkpoint=kept), snapshot_of(files)).start().wait(10.0)


def names(run: RunFolder) -> list[str]:
    return run.checkpoints.children()


def test_the_golden_checkpoint_is_still_read() -> None:
    assert verify(GOLDEN) == []
    manifest = read_manifest(GOLDEN)
    assert isinstance(manifest, Manifest)
    assert (manifest.step, manifest.circumstances.world_size, manifest.circumstances.zero_stage) == (2, 2, 1)


@pytest.mark.parametrize("damage", [truncate, flip, Path.unlink])
@pytest.mark.parametrize("file", FILES)
def test_a_damaged_file_means_the_checkpoint_before(tmp_path: Path, file: str, damage: Callable[[Path], None]) -> None:
    run = golden_run(tmp_path, 1, 2)
    damage(run.checkpoints.path / "step-00000002" / file)
    found = newest(run)
    assert found is not None
    assert found.step == found.state.step == 1
    assert names(run) == ["step-00000001", "step-00000002.damaged-2"]
    (event,) = run.read_events()
    assert (event["kind"], event["step"], event["file"]) == ("checkpoint_damaged", 2, file)
    assert event["cause"].startswith(f"{file}: ")


def test_a_checkpoint_under_another_step_s_name_is_damaged(tmp_path: Path) -> None:
    run = golden_run(tmp_path, 1)
    shutil.copytree(run.checkpoints.path / "step-00000001", run.checkpoints.path / "step-00000009")
    found = newest(run)
    assert found is not None
    assert found.step == 1
    assert run.read_events()[0]["cause"] == "MANIFEST.json: is of step 1"


def test_a_run_without_checkpoints_has_none(tmp_path: Path) -> None:
    assert newest(run_folder(tmp_path)) is None
    assert list_checkpoints(run_folder(tmp_path)) == []


def test_no_intact_checkpoint_is_an_error_also_the_next_time(tmp_path: Path) -> None:
    run = golden_run(tmp_path, 1, 2)
    for step in (1, 2):
        truncate(run.checkpoints.path / f"step-{step:08d}" / "state.json")
    for attempt in (2, 3):
        with pytest.raises(NoCheckpointError):
            newest(run, attempt)
    assert names(run) == ["step-00000001.damaged-2", "step-00000002.damaged-2"]


def test_checkpoints_that_vanished_are_not_a_fresh_start(tmp_path: Path) -> None:
    run = run_folder(tmp_path)
    for step in (5, 6):
        save(run, step)
    shutil.rmtree(run.checkpoints.path)
    for attempt in (2, 3):
        with pytest.raises(NoCheckpointError, match=r"although by .*events.jsonl some were committed, the newest at step 6") as error:
            newest(run, attempt)
        assert f"to start this run over, remove {run.root} first" in error.value.remedy
    assert newest_usable(run, rank=0, world_size=1, attempt=4, group=None, before_step=0) is None  # a rewind to the start


def test_a_newest_checkpoint_that_was_moved_away_is_not_missed(tmp_path: Path) -> None:
    run = run_folder(tmp_path)
    for step in (5, 6):
        save(run, step)
    shutil.move(run.checkpoints.path / "step-00000006", tmp_path / "elsewhere")
    found = newest(run)
    assert found is not None
    assert (found.step, names(run)) == (5, ["step-00000005"])
    assert {event["kind"] for event in run.read_events()} == {"checkpoint_committed"}


def test_a_rank_that_still_writes_into_what_is_removed_does_not_end_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, rmdir = golden_run(tmp_path, 1), os.rmdir
    shutil.copytree(GOLDEN, run.checkpoints.path / "step-00000002.partial-1")

    def writes_first(path: Any, **options: Any) -> None:
        if "partial" in str(path):
            raise OSError(errno.ENOTEMPTY, "Directory not empty")
        rmdir(path, **options)

    monkeypatch.setattr(os, "rmdir", writes_first)
    found = newest(run)
    assert found is not None
    assert found.step == 1


def test_a_newer_format_is_refused_and_left_alone(tmp_path: Path) -> None:
    run = golden_run(tmp_path, 1, 2)
    path = run.checkpoints.path / "step-00000002" / MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format_version": 2}))
    with pytest.raises(EnvironmentMismatchError, match="format_version 2"):
        newest(run)
    assert names(run) == ["step-00000001", "step-00000002"]


def test_commit_then_resume(tmp_path: Path) -> None:
    run = run_folder(tmp_path)
    save(run, 5)
    found = newest(run)
    assert found is not None
    assert found.state == TrainState(step=5)
    assert (found.zero_folder / "mp_rank_00_model_states.pt").read_bytes() == b"weights"
    assert found.probe.exists()
    assert verify(found.folder) == []
    (event,) = run.read_events()
    assert (event["kind"], event["step"], event["bytes"]) == ("checkpoint_committed", 5, found.manifest.num_bytes)


@pytest.mark.parametrize("keep_last", [1, 2])
def test_only_the_last_are_kept(tmp_path: Path, keep_last: int) -> None:
    run = run_folder(tmp_path)
    for step in (1, 2, 3, 4):
        save(run, step, keep_last=keep_last)
    assert [checkpoint.step for checkpoint in list_checkpoints(run)] == [1, 2, 3, 4][-keep_last:]
    assert len(names(run)) == keep_last


def test_the_oldest_goes_when_step_numbers_grow_longer(tmp_path: Path) -> None:
    run = run_folder(tmp_path)
    for step in (99_999_998, 99_999_999, 100_000_000, 100_000_001):
        save(run, step, keep_last=2)
    assert [checkpoint.step for checkpoint in list_checkpoints(run)] == [100_000_000, 100_000_001]


def test_every_piece_that_is_read_is_progress(tmp_path: Path) -> None:
    run, pieces = golden_run(tmp_path, 1), list[int]()
    found = newest_usable(run, rank=0, world_size=1, attempt=2, group=None, on_piece=lambda: pieces.append(1))
    assert found is not None
    assert len(pieces) >= len(found.manifest.files)


def test_a_checkpoint_that_cannot_be_read_now_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = golden_run(tmp_path, 1, 2)

    def fails(path: Path, on_piece: Any) -> FileDigest:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(FileDigest, "of", fails)
    with pytest.raises(StorageUnreachableError, match="Input/output error"):
        newest(run)
    assert names(run) == ["step-00000001", "step-00000002"]


def test_the_one_just_committed_is_kept_although_later_ones_exist(tmp_path: Path) -> None:
    run = run_folder(tmp_path)
    for step in (10, 20):
        save(run, step)
    save(run, 5, keep_last=1)
    assert names(run) == ["step-00000005"]


def test_a_step_is_committed_again(tmp_path: Path) -> None:
    run = run_folder(tmp_path)
    save(run, 5, content=b"old")
    save(run, 5, content=b"new", attempt=2)
    found = newest(run)
    assert found is not None
    assert (found.zero_folder / "mp_rank_00_model_states.pt").read_bytes() == b"new"
    assert (found.manifest.attempt, names(run)) == (2, ["step-00000005"])


def test_a_replacement_that_was_killed_half_way_is_undone(tmp_path: Path) -> None:
    run = golden_run(tmp_path, 1)
    folder = run.checkpoints.path / "step-00000001"
    folder.rename(folder.with_name("step-00000001.replaced-1"))
    found = newest(run)
    assert found is not None
    assert names(run) == ["step-00000001"]


def test_going_back_sets_the_later_checkpoints_aside(tmp_path: Path) -> None:
    run = golden_run(tmp_path, 1, 2, 3, 4)
    flip(run.checkpoints.path / "step-00000003/state.json")
    found = newest_usable(run, rank=0, world_size=1, attempt=2, group=None, before_step=3)
    assert found is not None
    assert found.step == 2
    assert names(run) == ["step-00000001", "step-00000002", "step-00000003.damaged-2", "step-00000004.rewound-2"]
    again = newest(run, attempt=3)
    assert again is not None
    assert again.step == 2


def test_with_nothing_to_go_back_to_everything_stays(tmp_path: Path) -> None:
    run = golden_run(tmp_path, 3, 4)
    with pytest.raises(NoCheckpointError, match="of step 2 or before to go back to; the oldest is step-00000003"):
        newest_usable(run, rank=0, world_size=1, attempt=2, group=None, before_step=2)
    assert names(run) == ["step-00000003", "step-00000004"]


def test_leftovers_of_dead_attempts_go_and_a_later_attempt_is_left_alone(tmp_path: Path) -> None:
    run = golden_run(tmp_path, 1)
    for name in ("step-00000002.partial-1", "step-00000003.partial-2", "step-00000004.partial-3"):
        shutil.copytree(GOLDEN, run.checkpoints.path / name)
    found = newest(run, attempt=2)
    assert found is not None
    assert found.step == 1
    assert names(run) == ["step-00000001", "step-00000004.partial-3"]


def test_verify_names_every_problem(tmp_path: Path) -> None:
    run = golden_run(tmp_path, 1)
    folder = run.checkpoints.path / "step-00000001"
    truncate(folder / "state.json")
    flip(folder / "zero/config.json")
    assert {problem.file for problem in verify(folder)} == {"state.json", "zero/config.json"}
    with pytest.raises(NotFoundError):
        verify(folder / "nothing")


@pytest.mark.parametrize(("world_size", "stage", "same"), [(2, 1, True), (4, 1, False), (2, 3, False)])
def test_another_layout_is_noticed(world_size: int, stage: int, same: bool) -> None:
    manifest = read_manifest(GOLDEN)
    assert isinstance(manifest, Manifest)
    assert has_same_layout(manifest, run_config(stage), world_size) is same


def test_what_moves_parameters_within_the_files_is_another_layout() -> None:
    manifest = read_manifest(GOLDEN)
    assert isinstance(manifest, Manifest)
    overrides = {"zero_optimization": {"round_robin_gradients": True}}
    turned = run_config(1, zero={"stage": 1, "deepspeed": overrides})
    assert not has_same_layout(manifest, turned, 2)
    assert has_same_layout(replace(manifest, config=turned.model_dump(mode="json")), turned, 2)


def test_a_state_that_is_offloaded_is_another_layout_and_a_bucket_is_not() -> None:
    manifest = read_manifest(GOLDEN)  # of a release that knew neither
    assert isinstance(manifest, Manifest)
    assert not has_same_layout(manifest, run_config(1, zero={"stage": 1, "offload_optimizer": "cpu"}), 2)
    assert has_same_layout(manifest, run_config(1, zero={"stage": 1, "bucket_elements": 7}), 2)


def test_another_precision_is_refused() -> None:
    manifest = read_manifest(GOLDEN)
    assert isinstance(manifest, Manifest)
    with pytest.raises(ConfigError, match="the checkpoint of step 2 was written in bf16, this attempt has fp32"):
        has_same_layout(manifest, run_config(1, "fp32"), 2)


def test_what_breaks_exactness_is_said() -> None:
    manifest = read_manifest(GOLDEN)
    assert isinstance(manifest, Manifest)
    assert why_not_exact(manifest, manifest.circumstances) == []
    assert why_not_exact(manifest, replace(manifest.circumstances, threads_per_rank=7)) == ["threads per rank: 1, now 7"]


def test_what_may_change_the_last_bits_is_said() -> None:
    config = run_config(1)
    manifest = Manifest(1, Circumstances(1, 1, "bf16", 1, "cpu", {}), {}, TrainState(), config.model_dump(mode="json"))
    assert why_not_exact(manifest, manifest.circumstances, config) == []
    split = config.model_copy(update={"batch": config.batch.model_copy(update={"split": 2})})
    assert why_not_exact(manifest, manifest.circumstances, split) == ["batch.split: 1, now 2 (dropout is drawn for each part)"]
    overridden = config.model_copy(update={"zero": config.zero.model_copy(update={"deepspeed": {"zero_optimization": {"overlap_comm": True}}})})
    assert why_not_exact(manifest, manifest.circumstances, overridden) == ["zero.deepspeed differs"]
    compiled = config.model_copy(update={"model": config.model.model_copy(update={"compile": True})})
    assert why_not_exact(manifest, manifest.circumstances, compiled) == ["model.compile differs"]
    smaller = config.model_copy(update={"zero": config.zero.model_copy(update={"bucket_elements": 7})})
    assert why_not_exact(manifest, manifest.circumstances, smaller) == ["zero.bucket_elements differs"]
    on_gpu = replace(manifest.circumstances, device="cuda X")
    assert why_not_exact(replace(manifest, circumstances=on_gpu), on_gpu, config) == ["GPU kernels may add in another order each time"]
