"""`clean`: what it lists, what it removes, and what it must never touch."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from data_pipeline.block_cache import BlockCache
from data_pipeline.claims import claimed
from data_pipeline.errors import ConflictError, ExitCode
from data_pipeline.storage import Location
from launcher import cli
from launcher.cleaning import find_in_run, find_in_storage, remove
from launcher.config import dump_yaml
from launcher.lease import PROFILE_FOLDER, Lease
from tests.support.checkpoints import save_request, snapshot_of
from tests.support.object_store import ObjectStore, reachable_object_store
from trainer.background_save import Save
from trainer.checkpoint_store import checkpoints_of
from trainer.config import RunConfig
from trainer.runlog import RunFolder
from trainer.verification import verify_checkpoint


@pytest.fixture(autouse=True)
def storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Location:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MASKWRIGHT_STORAGE", raising=False)
    monkeypatch.setattr("data_pipeline.block_cache.default_folder", lambda: str(tmp_path / "cache"))
    return Location.at(tmp_path / "runs")


def write_checkpoint(run: RunFolder, name: str, *, manifest: bool = True) -> Location:
    folder = run.checkpoints / name
    (folder / "zero" / "state.pt").write_bytes(b"x" * 100)
    if manifest:
        (folder / "MANIFEST.json").write_bytes(b"{}")
    return folder


def write_run(storage: Location, name: str, corpus: str | None = None) -> RunFolder:
    run = RunFolder(storage / name)
    run.config.write_bytes(dump_yaml(RunConfig(name=name)))
    if corpus:
        run.append_event("stage_finished", attempt=0, stage="prepare", elapsed_s=1.0, corpus=(storage / "corpora" / corpus).url)
    return run


def write_corpus(storage: Location, name: str) -> Location:
    folder = storage / "corpora" / name
    (folder / "train-000000.tar").write_bytes(b"x" * 1000)
    (folder / "corpus.json").write_bytes(b"{}")
    return folder


def kinds(run: RunFolder) -> dict[str, str]:
    return {each.location.name: each.kind for each in find_in_run(run)}


def test_what_was_set_aside_or_torn_goes_and_committed_checkpoints_stay(storage: Location) -> None:
    run = write_run(storage, "a")
    for name in ("step-00000010", "step-00000020"):
        write_checkpoint(run, name)
    for name in ("step-00000020.replaced-3", "step-00000030.damaged-2", "step-00000040.rewound-4"):
        write_checkpoint(run, name)
    write_checkpoint(run, "step-00000050.partial-1", manifest=False)
    write_checkpoint(run, "notes", manifest=False)
    (run.models / "final.partial" / "model.safetensors").write_bytes(b"x")
    (run.models / "final" / "model.safetensors").write_bytes(b"x")
    (run.root / ".status.json.0123abcd.tmp").write_bytes(b"x")
    found = find_in_run(run)
    assert {each.location.name: (each.kind, each.bytes) for each in found} == {
        "step-00000020.replaced-3": ("replaced", 102),
        "step-00000030.damaged-2": ("damaged", 102),
        "step-00000040.rewound-4": ("rewound", 102),
        "step-00000050.partial-1": ("partial", 100),
        "final.partial": ("partial", 1),
        ".status.json.0123abcd.tmp": ("temporary", 1),
    }
    for leftover in found:
        remove(leftover, storage)
    assert find_in_run(run) == []
    assert run.checkpoints.children() == ["notes", "step-00000010", "step-00000020"]
    assert run.models.children() == ["final"]


def test_the_last_good_state_stays_whatever_it_is_called(storage: Location) -> None:
    run = write_run(storage, "a")
    write_checkpoint(run, "step-00000010.replaced-2")  # killed between two renames: the next resume gives it its name back
    write_checkpoint(run, "step-00000020.damaged-2")
    write_checkpoint(run, "step-00000020", manifest=False)  # not committed
    write_checkpoint(run, "step-00000030.partial-2", manifest=False)
    assert kinds(run) == {"step-00000030.partial-2": "partial"}


@pytest.fixture(scope="module")
def store() -> Iterator[ObjectStore]:
    with reachable_object_store() as running:
        yield running


@pytest.mark.parametrize("resumed", [False, True])
def test_in_a_store_a_checkpoint_whose_manifest_was_lost_goes_once_there_is_another(store: ObjectStore, *, resumed: bool) -> None:
    """Also after the next resume, which has set an empty manifest aside in its place."""
    storage = Location(f"s3://{store.bucket}/lost-{resumed}")
    run = write_run(storage, "a")

    def save(step: int) -> None:
        Save(save_request(run, step, 0, 1, 1), snapshot_of({"state.json": b"{}"})).start().wait(60.0)

    save(20)
    (run.checkpoints / "step-00000020" / "MANIFEST.json").remove()
    if resumed:
        checkpoints_of(run).set_aside("step-00000020", "damaged", 2)
        run.append_event("checkpoint_damaged", attempt=2, step=20)
    assert find_in_run(run) == [], "it may be all that is left"
    save(30)
    found = find_in_run(run)
    assert {each.location.name: each.kind for each in found} == dict.fromkeys(
        ["MANIFEST.damaged-2.json", "attempt-1"] if resumed else ["attempt-1"], "damaged"
    )
    for leftover in found:
        remove(leftover, storage)
    assert run.checkpoints.children() == ["step-00000030"]


def test_in_a_store_files_that_a_committed_manifest_names_stay(store: ObjectStore) -> None:
    storage = Location(f"s3://{store.bucket}/runs")
    run = write_run(storage, "a")

    def save(step: int, attempt: int) -> None:
        Save(save_request(run, step, 0, 1, attempt), snapshot_of({"state.json": b"{}", "zero/rank.pt": b"x" * 100})).start().wait(60.0)

    save(10, 1)
    checkpoints_of(run).set_aside("step-00000010", "damaged", 2)
    assert find_in_run(run) == [], "while nothing is committed what is damaged stays"
    for step, attempt in ((10, 2), (20, 2), (30, 2)):
        save(step, attempt)
    checkpoints_of(run).set_aside("step-00000030", "rewound", 3)
    (run.checkpoints / "step-00000020" / "attempt-3" / "zero" / "rank.pt").write_bytes(b"x" * 7)
    (run.checkpoints / "step-00000040" / "attempt-3" / "zero" / "rank.pt").write_bytes(b"x" * 7)
    found = find_in_run(run)
    assert sorted((each.location.url.partition("checkpoints/")[2], each.kind) for each in found) == [
        ("step-00000010/MANIFEST.damaged-2.json", "damaged"),
        ("step-00000010/attempt-1", "damaged"),
        ("step-00000020/attempt-3", "partial"),
        ("step-00000030/MANIFEST.rewound-3.json", "rewound"),
        ("step-00000030/attempt-2", "rewound"),
        ("step-00000040/attempt-3", "partial"),
    ]
    for leftover in found:
        assert leftover.bytes > 0
        remove(leftover, storage)
    assert find_in_run(run) == []
    for step in (10, 20):
        assert verify_checkpoint(run.checkpoints / f"step-{step:08d}", lambda done, total: None) == []
    assert [entry.step for entry in checkpoints_of(run).committed()] == [10, 20]


@pytest.mark.parametrize("used_by", [".", PROFILE_FOLDER])
def test_nothing_of_a_run_that_runs_or_is_profiled(storage: Location, capsys: pytest.CaptureFixture[str], used_by: str) -> None:
    run = write_run(storage, "a")
    write_checkpoint(run, "step-00000050.partial-1", manifest=False)
    (leftover,) = find_in_run(run)
    write_corpus(storage, "unused-0123456789ab")
    with Lease.acquire(RunFolder(run.root / used_by)):
        assert cli.run(["clean", "a", "--yes"], debug=False) == ExitCode.CONFLICT
        assert cli.run(["clean", "--yes"], debug=False) == 0
        out = capsys.readouterr().out
        assert "passed over: a: it runs" in out
        assert "passed over: corpora and caches" in out
        with pytest.raises(ConflictError):
            remove(leftover, storage)  # it began after it was listed
    assert (storage / "corpora" / "unused-0123456789ab").exists()
    assert leftover.location.exists()


def test_corpora_that_no_run_uses(storage: Location, tmp_path: Path) -> None:
    write_run(storage, "a", "used-0123456789ab")
    write_run(storage, "b", "mixture-0123456789ab")
    write_run(storage, "c")
    for name in ("used-0123456789ab", "part-0123456789ab", "unused-0123456789ab", "claimed-0123456789ab"):
        write_corpus(storage, name)
    mixture = storage / "corpora" / "mixture-0123456789ab" / "mixture.json"
    mixture.write_json({"corpora": [{"corpus": "part-0123456789ab", "weight": 1.0}]})
    (storage / "corpora" / "begun-0123456789ab" / "work" / "receipt").write_bytes(b"x")
    (storage / "corpora" / "mine.txt").write_bytes(b"x")
    outside = tmp_path / "elsewhere-0123456789ab"
    outside.mkdir()
    (outside / "corpus.json").write_text("{}")
    (storage / "corpora" / "link-0123456789ab").path.symlink_to(outside)
    with claimed(storage / "corpora" / "claimed-0123456789ab" / "claim.json", "it"):
        found = find_in_storage(storage).leftovers
    assert {each.location.name: each.kind for each in found} == {"unused-0123456789ab": "corpus", "begun-0123456789ab": "unfinished-corpus"}
    unused = next(each for each in found if each.kind == "corpus")
    write_run(storage, "d", "unused-0123456789ab")
    with pytest.raises(ConflictError, match="a run uses"):
        remove(unused, storage)
    assert (unused.location / "corpus.json").exists()


def test_a_storage_without_runs_keeps_its_corpora(storage: Location, capsys: pytest.CaptureFixture[str]) -> None:
    write_corpus(storage, "docs-0123456789ab")
    assert cli.run(["clean", "--yes"], debug=False) == 0
    assert "those that use its corpora may lie in another" in capsys.readouterr().out
    assert (storage / "corpora" / "docs-0123456789ab" / "corpus.json").exists()


def test_a_run_that_cannot_be_read_keeps_all_corpora(storage: Location) -> None:
    run = write_run(storage, "a")
    run.config.write_bytes(b"name: [")
    write_corpus(storage, "docs-0123456789ab")
    found = find_in_storage(storage)
    assert found.leftovers == []
    assert "not every run can be read" in found.passed_over["corpora and caches"]


def test_what_a_doctor_that_was_killed_left_in_the_storage(storage: Location) -> None:
    for name in (".doctor-0", ".doctor-1"):
        (storage / name / "node").write_bytes(b"word")
    os.utime((storage / ".doctor-0").path, (0, 0))
    found = find_in_storage(storage).leftovers
    assert [(each.location.name, each.kind, each.bytes) for each in found] == [(".doctor-0", "trial", 4)], "the other may be at work"
    remove(found[0], storage)
    assert storage.children() == [".doctor-1"]


def test_caches_are_emptied(storage: Location, tmp_path: Path) -> None:
    write_run(storage, "a")
    (storage / "corpora" / ".cache" / "source-digests.json").write_bytes(b"{}")
    cache = BlockCache(tmp_path / "cache" / "blocks", 1 << 20)
    cache.put("0123456789abcdef", b"x" * 500)
    (cache.folder / "mine.txt").write_text("not a copy")
    found = find_in_storage(storage).leftovers
    assert [(each.kind, each.bytes) for each in found] == [("cache", 2), ("cache", 500)]
    for leftover in found:
        remove(leftover, storage)
    assert find_in_storage(storage).leftovers == []
    assert sorted(path.name for path in cache.folder.iterdir() if path.is_file()) == ["mine.txt", "size"]
    cache.put("0123456789abcdef", b"x" * 500)
    assert cache.held_bytes() == 500


def test_without_yes_nothing_is_removed_and_the_command_that_does_is_named(storage: Location, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(storage, "a")
    write_checkpoint(run, "step-00000050.partial-1", manifest=False)
    assert cli.run(["clean", "a", "--storage", str(storage)], debug=False) == 0
    out = capsys.readouterr().out
    assert "100 bytes; nothing was removed" in out
    assert f"next: maskwright clean a --storage {storage} --yes" in out
    assert cli.run(["clean", "a", "--json"], debug=False) == 0
    listed = json.loads(capsys.readouterr().out)
    assert listed["leftovers"] == [{"path": str(run.checkpoints / "step-00000050.partial-1"), "kind": "partial", "bytes": 100, "removed": False}]
    assert cli.run(["clean", "a", "--yes", "--json"], debug=False) == 0
    assert json.loads(capsys.readouterr().out)["leftovers"][0]["removed"] is True
    assert cli.run(["clean", "a"], debug=False) == 0
    assert f"there is nothing to remove in run {run.root}\n" in capsys.readouterr().out
    assert cli.run(["clean", "a", "--yes"], debug=False) == 0
    assert f"removed 0 bytes from run {run.root}\n" in capsys.readouterr().out
    assert cli.run(["clean"], debug=False) == 0
    assert f"there is nothing to remove in {storage}\n" in capsys.readouterr().out
    assert cli.run(["clean", "nope"], debug=False) == ExitCode.NOT_FOUND
