"""Corpora and sources in stores, over real HTTP, while the store fails in every way it can: the right data, or the right error in time."""

import gzip
import io
import json
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from data_pipeline.config import BatchConfig, CorpusConfig, DataConfig, ObjectiveConfig, TokenizerConfig
from data_pipeline.errors import DataCorruptError, EnvironmentMismatchError, ExitCode, MaskwrightError, NotFoundError, UnreachableError
from data_pipeline.executor import InProcessExecutor
from data_pipeline.index import CorpusIndex
from data_pipeline.prepare import Prepared, prepare
from data_pipeline.reading import read_documents
from data_pipeline.shards import Block
from data_pipeline.sources import Partition, Piece, list_files
from data_pipeline.storage import Location
from data_pipeline.stream import MicroBatchStream, build_loader
from data_pipeline.verification import verify_corpus
from tests.support.object_store import ALWAYS, Fault, ObjectStore, reachable_object_store
from tests.support.required import missing
from tests.support.text import write_texts

SHARD = "train-000000.tar"


@pytest.fixture(scope="module")
def store(tiny_corpus: Prepared) -> Iterator[ObjectStore]:
    """A server that holds the tiny corpus, as `s3://corpora/tiny` and `http://…/corpora/tiny`."""
    with reachable_object_store(s3_additional_kwargs={"ACL": "public-read"}) as running:
        root = tiny_corpus.folder.path
        for path in root.rglob("*"):
            if path.is_file():
                Location.at(f"s3://{running.bucket}/tiny/{path.relative_to(root).as_posix()}").write_bytes(path.read_bytes())
        yield running


@pytest.fixture(params=["s3", "http"])
def url(request: pytest.FixtureRequest, store: ObjectStore) -> str:
    store.fail()
    return {"s3": f"s3://{store.bucket}/tiny", "http": f"{store.endpoint}/{store.bucket}/tiny"}[request.param]


@pytest.fixture
def settings(tmp_path: Path) -> DataConfig:
    return DataConfig(read_timeout_s=0.6, total_timeout_s=8.0, cache_dir=str(tmp_path / "cache"), cache_bytes=0)


@pytest.fixture
def local(tiny_corpus: Prepared) -> CorpusIndex:
    return CorpusIndex.open(tiny_corpus.folder)


def _same(one: Block, other: Block) -> bool:
    pairs = ((one.ids, other.ids), (one.sentence_ends, other.sentence_ends), (one.document_ends, other.document_ends))
    return all(np.array_equal(a, b) for a, b in pairs)


def test_a_corpus_in_a_store_is_the_corpus(url: str, settings: DataConfig, local: CorpusIndex, store: ObjectStore) -> None:
    """Opened and read without a listing, blocks of a window at the same time."""
    index = CorpusIndex.open(Location.at(url), settings)
    assert (index.fingerprint, index.manifest) == (local.fingerprint, local.manifest)
    assert np.array_equal(index.records, local.records)
    assert all(_same(one, other) for one, other in zip(index.read_blocks(index.records), local.read_blocks(local.records), strict=True))
    assert (Path(index.tokenizer_folder) / "tokenizer.json").read_bytes() == (Path(local.tokenizer_folder) / "tokenizer.json").read_bytes()
    asked = store.requests()
    assert not [line for line in asked if "list-type" in line or line.split()[1].rstrip("/") in (f"/{store.bucket}", f"/{store.bucket}/tiny")]
    shards = [line for line in asked if ".tar" in line]
    assert len(shards) == len(local.records)
    assert all("bytes=" in line for line in shards)


PASSING = [
    pytest.param([Fault("500", 3)], id="500"),
    pytest.param([Fault("503", 3)], id="slow-down"),
    pytest.param([Fault("reset", 2)], id="reset"),
    pytest.param([Fault("truncated", 2)], id="truncated"),
    pytest.param([Fault("slow", 1, delay_s=2.0)], id="slow-once"),
    pytest.param([Fault("html", 1)], id="html-once"),
    pytest.param([Fault("wrong", 1)], id="wrong-once"),
    pytest.param([Fault("500"), Fault("truncated"), Fault("reset"), Fault("wrong")], id="one-after-another"),
]


@pytest.mark.parametrize("faults", PASSING)
def test_what_passes_is_survived(url: str, settings: DataConfig, local: CorpusIndex, store: ObjectStore, faults: list[Fault]) -> None:
    """When a block is read, and when the corpus is opened (its manifest from S3, its index from a web server)."""
    index = CorpusIndex.open(Location.at(url), settings)
    store.fail(*faults)
    assert _same(index.read_block(index.records[2]), local.read_block(local.records[2]))
    name = "corpus.json" if url.startswith("s3") else "index.bin"
    store.fail(*(Fault(fault.kind, fault.times, name, fault.delay_s) for fault in faults))
    assert CorpusIndex.open(Location.at(url), settings).fingerprint == local.fingerprint


LASTING = [
    pytest.param("500", UnreachableError, r"no answer in \d+ attempts? over [\d.]+ s", id="500"),
    pytest.param("503", UnreachableError, r"no answer in \d+ attempts? over [\d.]+ s", id="slow-down"),
    pytest.param("slow", UnreachableError, "no answer in", id="slow"),
    pytest.param("reset", UnreachableError, "no answer in", id="reset"),
    pytest.param("truncated", UnreachableError, "no answer in", id="truncated"),
    pytest.param("403", UnreachableError, "cannot read", id="forbidden"),
    pytest.param("html", DataCorruptError, r"block train-000000-000002 should have \d+ bytes at \d+, found \d+ \(a page of HTML\)", id="html"),
    pytest.param("wrong", DataCorruptError, r"checksum of block train-000000-000002", id="wrong"),
]


@pytest.mark.parametrize(("kind", "error", "said"), LASTING)
def test_what_lasts_is_an_error_in_time(
    url: str, settings: DataConfig, store: ObjectStore, kind: str, error: type[MaskwrightError], said: str
) -> None:
    """Never a hang, and never a block less."""
    impatient = settings.model_copy(update={"total_timeout_s": 1.2})
    index = CorpusIndex.open(Location.at(url), settings)
    index = replace(index, settings=impatient)
    store.fail(Fault(kind, ALWAYS, SHARD, delay_s=2.0))
    started_at = time.monotonic()
    with pytest.raises(error, match=said) as caught:
        index.read_block(index.records[2])
    assert time.monotonic() - started_at < impatient.total_timeout_s + 5
    assert SHARD in caught.value.cause
    if isinstance(caught.value, DataCorruptError):
        assert (caught.value.shard, caught.value.block) == (SHARD, 2)
        assert len([line for line in store.requests() if SHARD in line]) == 2  # once more before it counts


@pytest.mark.parametrize(
    ("kind", "error", "code"),
    [("500", UnreachableError, ExitCode.UNREACHABLE), ("403", UnreachableError, 4), ("html", DataCorruptError, 14), ("wrong", DataCorruptError, 14)],
)
def test_opening_fails_in_time(url: str, settings: DataConfig, store: ObjectStore, kind: str, error: type[MaskwrightError], code: int) -> None:
    impatient = settings.model_copy(update={"total_timeout_s": 1.0})
    for name in ("corpus.json", "index.bin"):
        store.fail(Fault(kind, ALWAYS, name))
        with pytest.raises(error, match=name.replace(".", r"\.")) as caught:
            CorpusIndex.open(Location.at(url), impatient)
        assert caught.value.exit_code == code


def test_what_is_not_there(url: str, settings: DataConfig, store: ObjectStore) -> None:
    with pytest.raises(NotFoundError, match="holds no prepared corpus"):
        CorpusIndex.open(Location.at(url + "-of-another-name"), settings)
    index = CorpusIndex.open(Location.at(url), settings)
    index.manifest["shards"][0]["name"] = "train-000009.tar"
    with pytest.raises(DataCorruptError, match=r"train-000009\.tar is missing") as caught:
        index.read_block(index.records[0])
    assert (caught.value.shard, caught.value.block) == ("train-000009.tar", 0)
    assert not (Location.at(url) / "nothing").exists()
    assert (Location.at(url) / "index.bin").exists()


def test_a_shard_cut_in_the_store(settings: DataConfig, store: ObjectStore, tiny_corpus: Prepared, local: CorpusIndex) -> None:
    """Blocks before the cut are read, those behind it are refused, whether the range is answered in part or not at all."""
    store.fail()
    root = Location.at(f"s3://{store.bucket}/cut")
    for path in (path for path in tiny_corpus.folder.path.rglob("*") if path.is_file()):
        name = path.relative_to(tiny_corpus.folder.path).as_posix()
        data = path.read_bytes()
        (root / name).write_bytes(data[: len(data) // 2] if name == SHARD else data)
    index = CorpusIndex.open(root, settings)
    refused = 0
    for number, record in enumerate(index.blocks("train")):
        if int(record["offset"]) + int(record["bytes"]) <= index.manifest["shards"][0]["bytes"] // 2:
            assert _same(index.read_block(record), local.read_block(local.records[number]))
            continue
        with pytest.raises(DataCorruptError, match="should have"):
            index.read_block(record)
        refused += 1
    assert refused > 2


def test_reading_ahead_hides_a_slow_store(url: str, settings: DataConfig, local: CorpusIndex, store: ObjectStore) -> None:
    index = CorpusIndex.open(Location.at(url), settings.model_copy(update={"read_timeout_s": 5.0}))
    wanted = list(index.records[:6])
    store.fail(Fault("slow", ALWAYS, SHARD, delay_s=1.0))
    started_at = time.monotonic()
    index.prefetch(wanted)
    assert time.monotonic() - started_at < 1.0, "nothing is waited for"
    assert all(_same(index.read_block(record), local.read_block(record)) for record in wanted)
    assert time.monotonic() - started_at < 4.0, "one after another they take six seconds"
    assert len([line for line in store.requests() if SHARD in line]) == 6


def test_reading_ahead_is_bounded(url: str, settings: DataConfig, local: CorpusIndex, store: ObjectStore) -> None:
    """What does not fit is read when it is wanted."""
    bound = int(local.records["bytes"][:3].sum())
    index = CorpusIndex.open(Location.at(url), settings.model_copy(update={"read_ahead_bytes": bound}))
    index.prefetch(index.records)
    reader: Any = index._reader
    assert 0 < sum(place.extent.num_bytes for place in reader._ahead) <= bound
    assert all(_same(index.read_block(record), local.read_block(record)) for record in index.records[:8])


def test_an_error_of_reading_ahead_waits_for_its_block(url: str, settings: DataConfig, local: CorpusIndex, store: ObjectStore) -> None:
    index = CorpusIndex.open(Location.at(url), settings)
    store.fail(Fault("wrong", 2, SHARD))
    index.prefetch(index.records[:1])
    deadline = time.monotonic() + 10
    while sum(SHARD in line for line in store.requests()) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    assert _same(index.read_block(index.records[1]), local.read_block(local.records[1]))
    with pytest.raises(DataCorruptError, match="checksum of block train-000000-000000"):
        index.read_block(index.records[0])
    assert _same(index.read_block(index.records[0]), local.read_block(local.records[0]))


def test_a_server_that_is_gone(settings: DataConfig, tiny_corpus: Prepared, tmp_path: Path) -> None:
    copy = shutil.copytree(tiny_corpus.folder.path, tmp_path / "corpus")
    with _web_server(copy, ranges=True) as address:
        index = CorpusIndex.open(Location.at(address), settings.model_copy(update={"total_timeout_s": 1.5}))
        assert len(index.read_block(index.records[0]).ids)
    started_at = time.monotonic()
    with pytest.raises(UnreachableError, match=rf"{SHARD}: no answer in \d+ attempts over"):
        index.read_block(index.records[1])
    with pytest.raises(UnreachableError, match="no answer in"):
        CorpusIndex.open(Location.at(address), index.settings)
    assert time.monotonic() - started_at < 10


def test_a_server_without_ranges_is_named(settings: DataConfig, tiny_corpus: Prepared) -> None:
    with _web_server(tiny_corpus.folder.path, ranges=False) as address:
        index = CorpusIndex.open(Location.at(address), settings)
        with pytest.raises(UnreachableError, match="ignores requests for a range"):
            index.read_block(index.records[1])


def test_a_server_that_accepts_and_says_nothing(settings: DataConfig) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        started_at = time.monotonic()
        with pytest.raises(UnreachableError, match="TimeoutError"):
            CorpusIndex.open(Location.at(f"http://127.0.0.1:{silent.getsockname()[1]}/x"), settings.model_copy(update={"total_timeout_s": 2.0}))
        assert time.monotonic() - started_at < 8


def test_a_store_of_unknown_kind() -> None:
    with pytest.raises(MaskwrightError, match="nosuch://bucket"):
        CorpusIndex.open(Location.at("nosuch://bucket/x"))
    with pytest.raises(EnvironmentMismatchError, match=r"gs://bucket.* needs a package"):
        CorpusIndex.open(Location.at("gs://bucket/x"))


def test_sources_in_a_store(url: str, settings: DataConfig, store: ObjectStore, local: CorpusIndex) -> None:
    """A file read from the front and by seeking, through faults; what lasts is an error and not a short file."""
    expected = (local.folder / SHARD).read_bytes()
    location = Location.at(url) / SHARD
    store.fail(Fault("500", 2, SHARD), Fault("truncated", 1, SHARD))
    with location.open_binary(settings) as file:
        assert file.read(700) == expected[:700]
        file.seek(-100, 2)
        assert file.read() == expected[-100:]
        file.seek(512)
        assert file.read() == expected[512:]
    with pytest.raises(FileNotFoundError):
        (Location.at(url) / "nothing").open_binary(settings)
    store.fail(Fault("truncated", ALWAYS, SHARD))
    with location.open_binary(settings.model_copy(update={"total_timeout_s": 1.0})) as file, pytest.raises(UnreachableError):
        file.read()


def test_documents_of_a_store(url: str, store: ObjectStore) -> None:
    """Plain, compressed and Parquet, through passing faults; from a web server file by file, since it has no listing."""
    texts = [f"Document {number} says so." for number in range(40)]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    table = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), table)
    files = {"a.jsonl": lines, "b.jsonl.gz": gzip.compress(lines), "c.jsonl.zst": zstandard.compress(lines), "d.parquet": table.getvalue()}
    for name, data in files.items():
        Location.at(f"s3://{store.bucket}/texts/{name}").write_bytes(data)
    folder = url.rsplit("/", 1)[0] + "/texts"
    sources = [folder] if url.startswith("s3") else [f"{folder}/{name}" for name in files]
    store.fail(Fault("500", path="a.jsonl"), Fault("reset", path="b.jsonl"), Fault("truncated", path="c.jsonl"), Fault("503", path="d.parquet"))
    found = [file for source in sources for file in list_files(source)]
    assert [file.name for file in found] == list(files)
    assert [list(read_documents(Partition((Piece(file),), "text"))) for file in found] == [texts] * 4


def test_a_source_that_is_not_there_or_not_ours(url: str, store: ObjectStore) -> None:
    with pytest.raises(NotFoundError, match="does not exist"):
        list_files(url + "/nothing.txt")
    store.fail(Fault("403", ALWAYS))
    with pytest.raises(UnreachableError, match="cannot read") as caught:
        Location.at(url + "/corpus.json").read_bytes()
    assert caught.value.exit_code == ExitCode.UNREACHABLE


def _stream(index: CorpusIndex) -> MicroBatchStream:
    phases = BatchConfig(global_batch_size=16, micro_batch_size=8, sequence_length=64).phases_until(40)
    return MicroBatchStream(index, ObjectiveConfig(), phases, seed=3)


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.full)])
def test_micro_batches_are_those_of_the_local_corpus(url: str, settings: DataConfig, store: ObjectStore, local: CorpusIndex, workers: int) -> None:
    """Through the loader, with a process of its own, and through passing faults; what lasts reaches the reader as it is."""
    numbers = [0, 1, 2, 3, 40, 41, 79]
    store.fail(Fault("500", 2, SHARD), Fault("truncated", 1, SHARD), Fault("wrong", 1, SHARD))
    stream = _stream(CorpusIndex.open(Location.at(url), settings))
    found = [batch.digest for batch in build_loader(stream, iter(numbers), workers)]
    assert found == [_stream(local)[number].digest for number in numbers]
    store.fail(Fault("reset", ALWAYS, SHARD))
    impatient = CorpusIndex.open(Location.at(url), settings.model_copy(update={"total_timeout_s": 1.2}))
    with pytest.raises(UnreachableError, match=SHARD):
        next(build_loader(_stream(impatient), iter([5]), workers))


def test_a_corpus_prepared_in_a_store_is_the_same(store: ObjectStore, tmp_path: Path) -> None:
    """To the byte, although reads fail now and then."""
    write_texts(tmp_path / "texts", num_documents=60, seed=4)
    corpus = CorpusConfig(name="made", source=str(tmp_path / "texts"), validation_fraction=0.1)
    store.fail(Fault("500", 3), Fault("truncated", 1))
    made = [
        prepare(corpus, TokenizerConfig(vocab_size=400), (32,), storage, InProcessExecutor(), lambda message: None).folder
        for storage in (Location.at(tmp_path), Location.at(f"s3://{store.bucket}/storage"))
    ]
    assert made[0].name == made[1].name
    for name in ("corpus.json", "index.bin", SHARD):
        assert (made[0] / name).read_bytes() == (made[1] / name).read_bytes()
    assert verify_corpus(made[1], DataConfig(cache_bytes=0), lambda done, total: None).problems == []


def test_a_server_that_is_required_fails_instead_of_skipping(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASKWRIGHT_REQUIRE", "slurm,s3")
    with pytest.raises(pytest.fail.Exception, match="s3 is required"):
        missing("s3", "moto is not installed")
    monkeypatch.setenv("MASKWRIGHT_REQUIRE", "slurm")
    with pytest.raises(pytest.skip.Exception, match="moto is not installed"):
        missing("s3", "moto is not installed")


class _Ranges(SimpleHTTPRequestHandler):
    """A web server of a folder; `ranges` is the difference between nginx and `python -m http.server`."""

    def __init__(self, *arguments: Any, ranges: bool, **keywords: Any) -> None:
        self._ranges = ranges
        super().__init__(*arguments, **keywords)

    def do_GET(self) -> None:
        wanted = self.headers.get("Range")
        if not self._ranges or wanted is None:
            super().do_GET()
            return
        start, stop = (int(part) for part in wanted.removeprefix("bytes=").split("-"))
        data = Path(self.translate_path(self.path)).read_bytes()[start : stop + 1]
        self.send_response(206)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *arguments: Any) -> None:
        pass


class _web_server:
    """Context manager: serves a folder, and is gone afterwards."""

    def __init__(self, folder: Path, *, ranges: bool) -> None:
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Ranges, directory=str(folder), ranges=ranges))

    def __enter__(self) -> str:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{self._server.server_port}"

    def __exit__(self, *exception: object) -> None:
        self._server.shutdown()
        self._server.server_close()
