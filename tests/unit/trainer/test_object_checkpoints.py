"""Checkpoints in a store: committed by a manifest that is written last, verified as they are copied out (a real S3 server; one process)."""

import asyncio
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from data_pipeline import remote
from data_pipeline.errors import ConflictError, MaskwrightError, NoCheckpointError, NotFoundError, StorageUnreachableError
from data_pipeline.index import CorpusIndex
from data_pipeline.prepare import Prepared
from data_pipeline.scratch import Scratch
from data_pipeline.storage import Location
from tests.support.checkpoints import GOLDEN_MODEL, golden_run, resign, run_config, save_request, snapshot_of
from tests.support.neighbours import Neighbours, Table
from tests.support.object_store import ALWAYS, Fault, ObjectStore, reachable_object_store
from trainer import node_copy
from trainer.background_save import Save
from trainer.checkpoint import Checkpoint, list_checkpoints, newest_usable, open_checkpoint
from trainer.checkpoint_store import checkpoints_of
from trainer.manifest import MANIFEST, Manifest, Problem
from trainer.node_copy import copy_to_nodes
from trainer.runlog import RunFolder
from trainer.verification import verify_checkpoint, verify_model

FILES = {
    0: {"zero/mp_rank_00_model_states.pt": b"weights" * 50, "zero/zero_pp_rank_0_mp_rank_00_optim_states.pt": b"zero" * 99, "state.json": b"{}"},
    1: {"zero/zero_pp_rank_1_mp_rank_00_optim_states.pt": b"one" * 99},
}
WEIGHTS = "zero/mp_rank_00_model_states.pt"


@pytest.fixture(scope="module")
def store() -> Iterator[ObjectStore]:
    with reachable_object_store() as running:
        yield running


@pytest.fixture
def run(store: ObjectStore, request: pytest.FixtureRequest) -> RunFolder:
    store.fail()
    return RunFolder(Location(f"s3://{store.bucket}/{re.sub(r'[^a-z0-9]', '-', request.node.name)}"))


def save(run: RunFolder, step: int, *, attempt: int = 1, **changes: object) -> None:
    saves = [Save(save_request(run, step, rank, 2, attempt, **changes), snapshot_of(FILES[rank])).start() for rank in (1, 0)]
    for each in saves:
        each.wait(60.0)


def newest(run: RunFolder, attempt: int = 2) -> Checkpoint | None:
    return newest_usable(run, rank=0, world_size=1, attempt=attempt, group=None)


def steps(run: RunFolder) -> list[int]:
    return [entry.step for entry in checkpoints_of(run).committed()]


def test_commit_and_copy_out(run: RunFolder) -> None:
    save(run, 5, validation_loss=1.5)
    assert (run.checkpoints / "step-00000005").children() == ["MANIFEST.json", "attempt-1"]
    assert verify_checkpoint(run.checkpoints / "step-00000005", lambda *_: None) == []
    found = newest(run)
    assert found is not None
    assert (found.step, found.manifest.validation_loss) == (5, 1.5)
    assert (found.zero_folder / "mp_rank_00_model_states.pt").read_bytes() == FILES[0][WEIGHTS]
    assert {path.relative_to(found.folder).as_posix() for path in found.folder.rglob("*") if path.is_file()} == {*FILES[0], *FILES[1]}
    found.discard_copy()
    assert not found.folder.exists()


def test_a_rank_copies_its_own_part_only(run: RunFolder) -> None:
    save(run, 5)
    found = newest_usable(run, rank=0, world_size=1, attempt=2, group=None, config=run_config(1))
    assert found is not None  # two ranks wrote it: this one reads for both
    assert len(list(found.zero_folder.iterdir())) == 3
    alone = save_request(run, 6, 0, 1)
    Save(alone, snapshot_of(FILES[0] | FILES[1])).start().wait(60.0)
    found = newest_usable(run, rank=0, world_size=1, attempt=2, group=None, config=run_config(1))
    assert found is not None
    assert {path.name for path in found.zero_folder.iterdir()} == {Path(name).name for name in FILES[0] if name.startswith("zero")}


def test_ranks_of_a_node_share_one_copy_and_the_last_removes_it(
    run: RunFolder, store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a change of the world size each of them needs everything."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    save(run, 5)
    manifest = checkpoints_of(run).read("step-00000005")
    assert isinstance(manifest, Manifest)
    store.fail()
    table = Table(3)

    def copy(rank: int) -> tuple[Scratch, list[list[Problem]]]:
        return copy_to_nodes(Neighbours(rank, table), run.checkpoints / "step-00000005", manifest, lambda _: manifest.files, lambda: None)

    with ThreadPoolExecutor(3) as threads:
        copies = list(threads.map(copy, range(3)))
    fetched = sorted(request.split()[1] for request in store.requests() if request.startswith("GET") and "/attempt-1/" in request)
    assert [name.rpartition("attempt-1/")[2] for name in fetched] == sorted([*FILES[0], *FILES[1]])
    assert {found.path for found, _ in copies} == set(tmp_path.iterdir())
    assert [problems for _, problems in copies] == [[[], [], []]] * 3
    for found, _ in copies:
        assert (found.path / WEIGHTS).read_bytes() == FILES[0][WEIGHTS]
        found.remove()
    assert not list(tmp_path.iterdir())


def test_without_a_manifest_nothing_is_selectable_and_it_goes(run: RunFolder) -> None:
    save(run, 5)
    Save(save_request(run, 6, 1, 2), snapshot_of(FILES[1])).start().wait(60.0)  # rank 0 was killed
    found = newest(run)
    assert found is not None
    assert found.step == 5
    assert run.checkpoints.children() == ["step-00000005"]


def test_damage_in_the_store_means_the_checkpoint_before(run: RunFolder) -> None:
    save(run, 5)
    save(run, 6)
    (run.checkpoints / "step-00000006/attempt-1" / WEIGHTS).write_bytes(b"other")
    found = newest(run)
    assert found is not None
    assert (found.step, steps(run)) == (5, [5])
    assert (run.checkpoints / "step-00000006").children() == ["MANIFEST.damaged-2.json", "attempt-1"]
    event = run.read_events()[-1]
    assert (event["kind"], event["cause"]) == ("checkpoint_damaged", f"attempt-1/{WEIGHTS}: has 5 bytes instead of 350")


def test_what_a_later_reading_finds_intact_is_not_damage(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here by the same rank; of several another one reads again."""
    save(run, 5)
    download, calls = node_copy.download, list[int]()

    def fails_first(*arguments: Any) -> list[Problem]:
        calls.append(1)
        return [Problem(f"attempt-1/{WEIGHTS}", "sha256 is other")] if len(calls) == 1 else download(*arguments)

    monkeypatch.setattr(node_copy, "download", fails_first)
    with pytest.raises(StorageUnreachableError, match=r"rank 0 finds .* damaged, and rank 0 finds it intact"):
        newest(run)
    assert steps(run) == [5]
    assert "checkpoint_damaged" not in [event["kind"] for event in run.read_events()]


def test_no_room_for_a_copy_is_no_damage(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    save(run, 5)
    monkeypatch.setattr(Path, "open", lambda *_: (_ for _ in ()).throw(FileNotFoundError("the folder was taken away")))
    with pytest.raises(MaskwrightError, match="the folder was taken away"):
        newest(run)
    assert steps(run) == [5]


def test_a_manifest_that_was_lost_is_said_and_the_files_stay(run: RunFolder) -> None:
    for step in (4, 5, 6):
        save(run, step, checkpoint={"keep_last": 2})
    (run.checkpoints / "step-00000006" / MANIFEST).remove()
    for attempt in (2, 3):
        found = newest(run, attempt)
        assert found is not None
        assert (found.step, steps(run)) == (5, [5])
        assert (run.checkpoints / "step-00000006").children() == ["MANIFEST.damaged-2.json", "attempt-1"]
    (event,) = [event for event in run.read_events() if event["kind"] == "checkpoint_damaged"]
    assert (event["step"], event["file"], event["cause"]) == (6, MANIFEST, "MANIFEST.json: missing")
    save(run, 6, attempt=3, checkpoint={"keep_last": 2})
    found = newest(run, 4)
    assert found is not None
    assert found.step == 6


def test_a_removal_that_was_killed_half_way_is_no_loss(run: RunFolder) -> None:
    for step in (4, 5, 6):
        save(run, step, checkpoint={"keep_last": 2})
    (run.checkpoints / "step-00000004/attempt-1" / WEIGHTS).write_bytes(b"left")
    found = newest(run)
    assert found is not None
    assert run.checkpoints.children() == ["step-00000005", "step-00000006"]
    assert {event["kind"] for event in run.read_events()} == {"checkpoint_committed"}


def test_a_store_that_was_emptied_is_not_a_fresh_start(run: RunFolder) -> None:
    save(run, 5)
    run.checkpoints.remove()
    with pytest.raises(NoCheckpointError, match="the newest at step 5"):
        newest(run)


def test_a_copy_that_fails_half_way_is_discarded(run: RunFolder, store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    save(run, 5)
    store.fail(Fault("403", ALWAYS, "rank_1_mp_rank_00_optim"))
    with pytest.raises(MaskwrightError):
        newest(run)
    with pytest.raises(MaskwrightError):
        open_checkpoint(run)
    assert list(tmp_path.iterdir()) == []


def test_going_back(run: RunFolder) -> None:
    for step in (5, 6):
        save(run, step)
    found = newest_usable(run, rank=0, world_size=1, attempt=2, group=None, before_step=5)
    assert found is not None
    assert (found.step, steps(run)) == (5, [5])
    assert [entry.kind for entry in checkpoints_of(run).entries() if entry.step == 6] == ["rewound", "partial"]


def test_a_checkpoint_in_a_store_is_exported_into_it(run: RunFolder, tmp_path: Path, tiny_corpus: Prepared) -> None:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from trainer.export import LINEAGE, export

    (checkpoint,) = list_checkpoints(golden_run(tmp_path, 1))
    resign(checkpoint.folder, train_state=replace(checkpoint.state, corpus_fingerprint=CorpusIndex.open(tiny_corpus.folder).fingerprint))
    fs, path = (run.checkpoints / "step-00000001").filesystem()
    fs.put(f"{checkpoint.folder}/", f"{path}/", recursive=True)
    config = run_config(1, model=GOLDEN_MODEL)
    model = export(run, config, tiny_corpus.folder)
    assert model == run.models / "final"
    assert verify_model(model, lambda *_: None) == []
    assert {"config.json", "model.safetensors", LINEAGE} <= set(model.children())
    written = (model / LINEAGE).read_bytes()
    assert export(run, config, tiny_corpus.folder) == model
    assert (model / LINEAGE).read_bytes() == written
    with pytest.raises(NotFoundError, match="has no checkpoint of step 7"):
        export(run, config, tiny_corpus.folder, step=7)
    assert not list(Path(tempfile.gettempdir()).glob("maskwright-model-*"))


def test_a_step_is_committed_again_and_a_superseded_attempt_s_is_not(run: RunFolder) -> None:
    save(run, 5)
    save(run, 5, attempt=2)
    assert (run.checkpoints / "step-00000005").children() == ["MANIFEST.json", "attempt-2"]
    with pytest.raises(ConflictError, match="attempt 2 has committed step 5; attempt 1 is superseded"):
        save(run, 5, attempt=1)
    assert verify_checkpoint(run.checkpoints / "step-00000005", lambda *_: None) == []


@pytest.mark.parametrize(("there", "look"), [([], "exists"), ([1], "cat")])
def test_an_attempt_that_is_superseded_in_the_middle_of_its_commit_does_not_commit(
    run: RunFolder, there: list[int], look: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A newer attempt commits the step between the last look at what is there and the write: the store itself refuses the write."""
    for attempt in there:
        save(run, 5, attempt=attempt)
    looked, overtaken = getattr(remote, look), list[str]()

    async def is_overtaken(store: remote.Store) -> Any:
        found = await looked(store)
        if store.path.endswith(MANIFEST) and not overtaken:
            overtaken.append(store.path)
            await asyncio.to_thread(save, run, 5, attempt=3)
        return found

    monkeypatch.setattr(remote, look, is_overtaken)
    with pytest.raises(ConflictError, match="attempt 3 has committed step 5; attempt 2 is superseded"):
        save(run, 5, attempt=2)
    manifest = checkpoints_of(run).read("step-00000005")
    assert isinstance(manifest, Manifest)
    assert (manifest.attempt, len(overtaken)) == (3, 1)
    assert verify_checkpoint(run.checkpoints / "step-00000005", lambda *_: None) == []


def test_old_ones_go(run: RunFolder) -> None:
    for step in (5, 6, 7):
        save(run, step, checkpoint={"keep_last": 2})
    assert steps(run) == [6, 7]
    assert run.checkpoints.children() == ["step-00000006", "step-00000007"]


def test_errors_that_pass_are_survived(run: RunFolder, store: ObjectStore) -> None:
    store.fail(
        Fault("500", 3, "optim_states", method="PUT"), Fault("503", 2, "MANIFEST.json", method="PUT"), Fault("reset", 1, "receipts", method="PUT")
    )
    save(run, 5)
    assert verify_checkpoint(run.checkpoints / "step-00000005", lambda *_: None) == []


@pytest.mark.parametrize(("times", "committed"), [(1, [5]), (ALWAYS, [])])
def test_a_truncated_upload_is_not_committed(
    run: RunFolder, store: ObjectStore, times: int, committed: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tenacity.wait.wait_random_exponential.__call__", lambda *_: 0.1)
    store.fail(Fault("truncated", times, "rank_1_mp_rank_00_optim", method="PUT"))
    outcome: Callable[[], None] = lambda: save(run, 5)  # noqa: E731
    if committed:
        outcome()
        assert verify_checkpoint(run.checkpoints / "step-00000005", lambda *_: None) == []
    else:
        with pytest.raises(MaskwrightError, match="rank 1 could not write its part"):
            outcome()
    assert steps(run) == committed
