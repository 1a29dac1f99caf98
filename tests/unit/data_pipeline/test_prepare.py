"""Preparing a corpus: the same bytes from any executor, continued after a kill, one writer, nothing half-written is selectable."""

import json
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.blocks import encode_partition
from data_pipeline.building import plan_job
from data_pipeline.config import CorpusConfig, TokenizerConfig
from data_pipeline.errors import ConfigError, ConflictError, DataCorruptError, NotFoundError, StorageError
from data_pipeline.executor import Executor, InProcessExecutor
from data_pipeline.index import CorpusIndex
from data_pipeline.partitions import Job, load_partition, read_partition
from data_pipeline.prepare import Prepared, find_prepared, prepare
from data_pipeline.sources import list_inputs
from data_pipeline.storage import Location
from tests.support.text import generate_documents, write_texts

TOKENIZER = TokenizerConfig(vocab_size=300)
LENGTHS = (32, 64)


class BackwardsExecutor:
    """Runs the last item first."""

    def map(self, function: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[Any]:
        return reversed([function(item) for item in reversed(items)])


class PoolExecutor:
    """Two processes."""

    def map(self, function: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[Any]:
        with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("forkserver")) as pool:
            yield from pool.map(function, items)


def _prepare(source: Path | tuple[str, ...], storage: Path | str, executor: Executor | None = None, **settings: Any) -> Prepared:
    name = source if isinstance(source, tuple) else str(source)
    corpus = CorpusConfig(source=name, validation_fraction=0.1, **settings)
    return prepare(corpus, TOKENIZER, LENGTHS, Location.at(storage), executor or InProcessExecutor(), progress=lambda message: None)


def _files(folder: Location) -> dict[str, bytes]:
    return {str(path.relative_to(folder.path)): path.read_bytes() for path in sorted(folder.path.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prepare") / "texts"
    write_texts(folder, num_documents=120, seed=3)
    lines = (folder / "documents.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (folder / "again.jsonl").write_text("".join(lines[:7]) + '{"text": " "}\n', encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def prepared(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    return _prepare(texts, tmp_path_factory.mktemp("storage"))


def test_counts(prepared: Prepared) -> None:
    summary = prepared.summary
    assert prepared.created
    assert (summary["documents"], summary["duplicates"], summary["empty"]) == (128, 7, 1)
    assert summary["train_documents"] + summary["validation_documents"] == 120
    assert 0 < summary["validation_documents"] < 40
    assert 0 < summary["share_without_pair"] < 0.2
    index = CorpusIndex.open(prepared.folder)
    for split in ("train", "validation"):
        assert int(index.blocks(split)["tokens"].sum()) == summary[f"{split}_tokens"]
        assert int(index.blocks(split)["documents"].sum()) == summary[f"{split}_documents"]
    assert 3 < index.unigram_entropy < 6
    assert index.manifest["sources"][0]["name"] == "texts"
    assert not (prepared.folder / "work").exists()
    assert not (prepared.folder / "claim.json").exists()


def test_rerun_does_nothing(prepared: Prepared, texts: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in prepared.folder.path.rglob("*")}
    again = _prepare(texts, prepared.folder.parent.parent.url)
    assert (again.folder, again.created) == (prepared.folder, False)
    assert {path: path.stat().st_mtime_ns for path in prepared.folder.path.rglob("*")} == before


def test_working_files_go_after_the_corpus_is_committed(texts: Path, prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    remove = Location.remove

    def fails_for_work(location: Location) -> None:
        if location.name == "work":
            raise OSError("killed here")
        remove(location)

    with monkeypatch.context() as patched:
        patched.setattr(Location, "remove", fails_for_work)
        with pytest.raises(OSError, match="killed here"):
            _prepare(texts, tmp_path)
    folder = Location.at(tmp_path) / "corpora" / prepared.folder.name
    CorpusIndex.open(folder)
    assert (folder / "work").exists()
    assert not _prepare(texts, tmp_path).created
    assert _files(folder) == _files(prepared.folder)


@pytest.mark.parametrize(("name", "said"), [("vocab.txt", "has not the digest"), ("added_tokens.json", "is not in corpus.json"), ("", "is missing")])
def test_another_tokenizer_in_a_corpus_is_refused(prepared: Prepared, tmp_path: Path, name: str, said: str) -> None:
    copy = tmp_path / "corpus"
    shutil.copytree(prepared.folder.path, copy)
    if name:
        (copy / "tokenizer" / name).write_text("{}")
    else:
        (copy / "tokenizer" / "tokenizer.json").unlink()
    with pytest.raises(DataCorruptError, match=said):
        CorpusIndex.open(Location.at(copy))


@pytest.mark.parametrize("executor", [BackwardsExecutor(), PoolExecutor()], ids=["backwards", "two-processes"])
def test_same_bytes_from_another_executor_and_place(prepared: Prepared, texts: Path, tmp_path: Path, executor: Executor) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "texts").symlink_to(texts)
    again = _prepare(tmp_path / "elsewhere" / "texts", tmp_path / "storage", executor)
    assert again.folder.name == prepared.folder.name
    assert _files(again.folder) == _files(prepared.folder)


def test_other_settings_are_another_corpus(texts: Path, prepared: Prepared, tmp_path: Path) -> None:
    storage = prepared.folder.parent.parent

    def folder_of(tokenizer: TokenizerConfig = TOKENIZER, lengths: tuple[int, ...] = LENGTHS, **settings: Any) -> str:
        corpus = CorpusConfig(**{"source": str(texts), "validation_fraction": 0.1, **settings})
        with pytest.raises(NotFoundError, match="is not prepared") as caught:
            find_prepared(corpus, tokenizer, lengths, storage)
        assert "maskwright prepare" in caught.value.remedy
        return caught.value.cause

    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("Other text.")
    names = {
        folder_of(seed=1), folder_of(validation_fraction=0.2), folder_of(max_documents=50), folder_of(lengths=(32,)),
        folder_of(TokenizerConfig(vocab_size=301)), folder_of(source=str(tmp_path / "texts")),
    }  # fmt: skip
    assert len(names) == 6
    assert find_prepared(CorpusConfig(source=str(texts), validation_fraction=0.1), TOKENIZER, LENGTHS, storage) == prepared.folder


def _job(folder: Path, num_partitions: int) -> Job:
    return Job(Location.at(folder), CorpusConfig(), num_partitions, block_tokens=512, sequence_lengths=LENGTHS)


def test_partitioning_does_not_change_the_shuffle(texts: Path, tmp_path: Path) -> None:
    def shuffled(num_partitions: int) -> list[str]:
        job = _job(tmp_path / str(num_partitions), num_partitions)
        read = [read_partition(job, numbered) for numbered in enumerate(list_inputs(CorpusConfig(source=str(texts))).partitions)]
        spills = [name for receipt in read for name in receipt["spills"]]
        return [document.text for number in range(num_partitions) for document in load_partition(job, spills, number)[0]]

    order = shuffled(1)
    assert shuffled(5) == order
    assert len(order) == len(set(order)) == 120
    assert order != sorted(order)


def test_finished_partitions_are_not_redone(texts: Path, prepared: Prepared, tmp_path: Path) -> None:
    job = _job(tmp_path, 3)
    for name, data in _files(prepared.folder / "tokenizer").items():
        (job.folder / "tokenizer" / name).write_bytes(data)
    read = [read_partition(job, numbered) for numbered in enumerate(list_inputs(CorpusConfig(source=str(texts))).partitions)]
    spills = [name for receipt in read for name in receipt["spills"]]
    first = [encode_partition(job, spills, 1 << 61, number) for number in range(3)]
    for name in spills:
        (job.work / name).remove()  # work on a finished partition would miss them
    assert [encode_partition(job, spills, 1 << 61, number) for number in range(3)] == first


_KILLED = """
import os, signal, sys
from data_pipeline import prepare as module
from data_pipeline.config import CorpusConfig, TokenizerConfig
from data_pipeline.executor import InProcessExecutor
from data_pipeline.storage import Location

def progress(message):
    if message.startswith(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)

corpus = CorpusConfig(source=sys.argv[1], validation_fraction=0.1)
module.prepare(corpus, TokenizerConfig(vocab_size=300), (32, 64), Location.at(sys.argv[2]), InProcessExecutor(), progress)
"""


@pytest.mark.parametrize("stage", ["encoding", pytest.param("tokenizer", marks=pytest.mark.full), pytest.param("index", marks=pytest.mark.full)])
def test_a_killed_run_continues(texts: Path, prepared: Prepared, tmp_path: Path, stage: str) -> None:
    command = [sys.executable, "-c", _KILLED, str(texts), str(tmp_path), stage]
    root = str(Path(__file__).parents[3])
    killed = subprocess.run(command, env={**os.environ, "PYTHONPATH": root}, timeout=60, check=False)
    assert killed.returncode == -signal.SIGKILL
    folder = Location.at(tmp_path) / "corpora" / prepared.folder.name
    with pytest.raises(NotFoundError, match="no prepared corpus"):
        CorpusIndex.open(folder)
    assert (folder / "claim.json").exists()
    kept = folder.path / "work" / "read-000000.json"
    written_at = kept.stat().st_mtime_ns
    seen: list[int] = []
    config = CorpusConfig(source=str(texts), validation_fraction=0.1)
    prepare(config, TOKENIZER, LENGTHS, Location.at(tmp_path), InProcessExecutor(), progress=lambda message: seen.append(kept.stat().st_mtime_ns))
    assert set(seen) == {written_at}
    assert _files(folder) == _files(prepared.folder)


def test_a_second_writer_is_refused_and_a_dead_one_replaced(texts: Path, prepared: Prepared, tmp_path: Path) -> None:
    claim = tmp_path / "corpora" / prepared.folder.name / "claim.json"
    claim.parent.mkdir(parents=True)
    claim.write_text(json.dumps({"host": "elsewhere", "pid": 1, "started": "1", "id": "x"}))
    with pytest.raises(ConflictError, match="is being written by process 1 on elsewhere"):
        _prepare(texts, tmp_path)
    started = Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]
    claim.write_text(json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "started": started, "id": "x"}))
    with pytest.raises(ConflictError):
        _prepare(texts, tmp_path)
    claim.write_text(json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "started": "before a restart", "id": "x"}))
    assert _prepare(texts, tmp_path).created
    assert not claim.exists()


def test_torn_writes_of_killed_processes_are_removed(texts: Path, prepared: Prepared, tmp_path: Path) -> None:
    folder = tmp_path / "corpora" / prepared.folder.name
    (folder / "tokenizer").mkdir(parents=True)
    for name in (".train-000000.tar.0a1b2c3d.tmp", "tokenizer/.vocab.txt.0a1b2c3d.tmp"):
        (folder / name).write_bytes(b"half")
    assert _files(_prepare(texts, tmp_path).folder) == _files(prepared.folder)


def test_on_another_file_system(texts: Path, prepared: Prepared) -> None:
    storage = f"memory://prepare-{time.monotonic_ns()}"
    found = _prepare(texts, storage)
    filesystem, path = found.folder.filesystem()
    files = {name.split(f"{found.folder.name}/")[1]: filesystem.cat_file(name) for name in filesystem.find(path)}
    assert files == _files(prepared.folder)
    index = CorpusIndex.open(found.folder)
    assert len(index.read_block(index.blocks("train")[0]).ids) == index.blocks("train")["tokens"][0]
    copy = Path(index.tokenizer_folder)
    assert (copy / "tokenizer.json").read_bytes() == files["tokenizer/tokenizer.json"]
    assert (copy.stat().st_mode & 0o777, copy.stat().st_uid) == (0o700, os.getuid())
    assert index.tokenizer_folder == CorpusIndex.open(found.folder).tokenizer_folder == str(copy)


def test_max_documents(texts: Path, tmp_path: Path) -> None:
    assert _prepare(texts, tmp_path, max_documents=40).summary["documents"] == 40


def test_layout_follows_the_size_of_the_text() -> None:
    layouts = [plan_job(Location("/x"), CorpusConfig(), num_bytes, (128,)) for num_bytes in (0, 10**6, 10**9, 10**12, 4 * 10**12)]
    assert [job.block_tokens for job in layouts] == [8192, 8192, 244140, 524288, 524288]
    assert [job.num_partitions for job in layouts] == [1, 1, 60, 4096, 4096]
    with pytest.raises(ConfigError, match=r"holds 5\.0 TB of text, more than the 4\.4 TB"):
        plan_job(Location("/x"), CorpusConfig(), 5 * 10**12, (128,))


@pytest.mark.parametrize(
    ("files", "settings", "error", "message"),
    [
        ({}, {}, NotFoundError, "does not exist"),
        ({"a.txt": b"  \n"}, {}, ConfigError, "holds no text"),
        ({"a.txt": b"Only one document. " * 50}, {}, ConfigError, "fewer than 2 distinct documents"),
        ({"a.txt": b"caf\xe9"}, {}, DataCorruptError, "a.txt is not UTF-8: byte 0xe9 at offset 3"),
        ({"a.jsonl": b'{"body": "x"}\n'}, {}, ConfigError, "it has body"),
        ({"a.jsonl": b'{"text": "x"}\n{"text\n'}, {}, DataCorruptError, "line 2 is not JSON"),
    ],
    ids=["missing", "empty", "one-document", "not-utf8", "no-column", "broken-line"],
)
def test_errors_leave_nothing_selectable(
    tmp_path: Path, files: dict[str, bytes], settings: dict[str, Any], error: type[Exception], message: str
) -> None:
    for name, data in files.items():
        (tmp_path / "texts").mkdir(exist_ok=True)
        (tmp_path / "texts" / name).write_bytes(data)
    with pytest.raises(error, match=message):
        _prepare(tmp_path / "texts", tmp_path / "storage", **settings)
    assert not list(tmp_path.glob("storage/corpora/*/corpus.json"))
    assert not list(tmp_path.glob("storage/corpora/*/claim.json"))


def test_a_full_disk_is_said(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(disk)], capture_output=True, text=True, check=False)
    if mount.returncode:
        pytest.skip(f"cannot mount a small disk: {mount.stderr.strip()}")
    try:
        (tmp_path / "texts").mkdir()
        (tmp_path / "texts" / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in generate_documents(400, 1)))
        with pytest.raises(StorageError, match="no space left"):
            _prepare(tmp_path / "texts", disk)
        assert not list(disk.glob("corpora/*/corpus.json"))
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_given_tokenizer_is_used(texts: Path, prepared: Prepared, tmp_path: Path) -> None:
    corpus = CorpusConfig(source=str(texts), validation_fraction=0.1)
    config = TokenizerConfig(path=(prepared.folder / "tokenizer").url)
    found = prepare(corpus, config, LENGTHS, Location.at(tmp_path), InProcessExecutor(), progress=lambda message: None)
    assert found.folder.name != prepared.folder.name
    theirs, ours = CorpusIndex.open(prepared.folder), CorpusIndex.open(found.folder)
    assert ours.tokenizer_digest == theirs.tokenizer_digest
    assert ours.manifest["shards"] == theirs.manifest["shards"]
