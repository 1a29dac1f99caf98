"""`verify_corpus` reads everything and lists every problem, also what reading blocks cannot see."""

import json
import shutil
import time
from pathlib import Path

import fsspec
import numpy as np
import pytest

from data_pipeline.config import CorpusConfig, DataConfig, TokenizerConfig
from data_pipeline.errors import NotFoundError
from data_pipeline.executor import InProcessExecutor
from data_pipeline.index import CorpusIndex, sealed
from data_pipeline.prepare import Prepared, prepare
from data_pipeline.storage import Location
from data_pipeline.verification import Verification, verify_corpus

LARGE, SMALL = "train-000000.tar", "validation-000000.tar"


@pytest.fixture
def copy(tiny_corpus: Prepared, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_corpus.folder.url, tmp_path / "corpus"))


def _verify(folder: Path | Location) -> Verification:
    location = folder if isinstance(folder, Location) else Location.at(folder)
    return verify_corpus(location, DataConfig(cache_bytes=0), lambda done, total: None)


def _flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 16
    path.write_bytes(data)


def test_an_intact_corpus(tiny_corpus: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    """In parts smaller and larger than a block alike; progress ends at the number of bytes."""
    counts = tiny_corpus.summary
    for part in (1000, 40_000, 4 << 20):
        monkeypatch.setattr("data_pipeline.verification._READ_BYTES", part)
        seen: list[tuple[int, int]] = []
        found = verify_corpus(tiny_corpus.folder, DataConfig(), lambda done, total, seen=seen: seen.append((done, total)))
        assert found.problems == []
        assert (found.shards, found.blocks) == (2, counts["train_blocks"] + counts["validation_blocks"])
        assert found.counts == {name: counts[name] for name in found.counts}
        assert len(found.counts) == 6
        assert seen == sorted(seen)
        assert seen[-1] == (found.bytes, found.bytes)


def test_every_problem_is_listed(copy: Path) -> None:
    records = CorpusIndex.open(Location.at(copy)).blocks("train")
    for number in (1, 4):
        _flip(copy / LARGE, int(records[number]["offset"]) + 700)
    (copy / SMALL).unlink()
    _flip(copy / "tokenizer" / "vocab.txt", 5)
    (copy / "train-000007.tar").write_bytes(b"")
    found = _verify(copy)
    for said in ("block train-000000-000001", "block train-000000-000004", f"{LARGE} has not the digest", f"{SMALL} is missing"):
        assert sum(said in problem for problem in found.problems) == 1, found.problems
    assert any("tokenizer/vocab.txt has not the digest" in problem for problem in found.problems)
    assert any("train-000007.tar is not in corpus.json" in problem for problem in found.problems)
    assert len(found.problems) == 6
    assert found.blocks == len(records) - 2


def test_what_no_block_covers(copy: Path) -> None:
    """The end of a tar holds no data; only its digest says that it changed."""
    _flip(copy / LARGE, (copy / LARGE).stat().st_size - 100)
    assert _verify(copy).problems == [f"{copy / LARGE} has not the digest in corpus.json"]


def test_a_shard_that_was_cut(copy: Path) -> None:
    records = CorpusIndex.open(Location.at(copy)).blocks("train")
    data = (copy / LARGE).read_bytes()
    (copy / LARGE).write_bytes(data[: int(records[3]["offset"]) + 512])
    problems = _verify(copy).problems
    assert len(problems) == len(records) - 3 + 1
    assert "found 512" in problems[0]
    assert problems[-1].endswith(f"corpus.json says {len(data)} bytes")


def test_a_damaged_index_leaves_the_shards_to_their_digests(copy: Path) -> None:
    _flip(copy / "index.bin", 50)
    _flip(copy / SMALL, 600)
    problems = _verify(copy).problems
    assert len(problems) == 2
    assert "index.bin: its digest" in problems[0]
    assert f"{SMALL} has not the digest" in problems[1]


def test_a_manifest_that_counts_wrongly(copy: Path) -> None:
    """Digests that fit and numbers that do not: a fault of whoever wrote it."""
    path = copy / "corpus.json"
    manifest = json.loads(path.read_bytes())
    manifest["counts"]["train_tokens"] += 1
    Location.at(path).write_json(sealed(manifest))
    [problem] = _verify(copy).problems
    assert "says" in problem
    assert "train_tokens" in problem


def test_long_documents_lie_in_parts(tmp_path: Path) -> None:
    """Parts are more than documents, which is no problem."""
    (tmp_path / "texts").mkdir()
    for number in range(6):
        (tmp_path / "texts" / f"{number}.txt").write_text(" ".join(f"This is sentence {nth} of document {number}." for nth in range(4000)))
    corpus = CorpusConfig(source=str(tmp_path / "texts"), validation_fraction=0.1)
    made = prepare(corpus, TokenizerConfig(vocab_size=300), (32,), Location.at(tmp_path), InProcessExecutor(), lambda message: None)
    found = _verify(made.folder)
    assert found.problems == []
    assert found.counts["train_documents"] > made.summary["train_documents"]


def test_an_index_that_counts_wrongly(copy: Path) -> None:
    import hashlib

    index = CorpusIndex.open(Location.at(copy))
    records = np.array(index.records)
    records["samples"][2, 0] += 1
    (copy / "index.bin").write_bytes(records.tobytes())
    manifest = json.loads((copy / "corpus.json").read_bytes())
    manifest["digests"]["index"] = hashlib.sha256(records.tobytes()).hexdigest()
    Location.at(copy / "corpus.json").write_json(sealed(manifest))
    [problem] = _verify(copy).problems
    assert f"{LARGE}: block 2 holds" in problem
    assert "the index says" in problem


def test_without_a_manifest(copy: Path) -> None:
    _flip(copy / "corpus.json", 30)
    assert len(_verify(copy).problems) == 1
    (copy / "corpus.json").unlink()
    with pytest.raises(NotFoundError):
        _verify(copy)


def test_in_a_store(copy: Path) -> None:
    name = f"verify-{time.monotonic_ns()}"
    memory = fsspec.filesystem("memory")
    memory.put(str(copy), f"/{name}", recursive=True)
    assert _verify(Location.at(f"memory://{name}")).problems == []
    _flip(copy / LARGE, 700)
    memory.pipe_file(f"/{name}/{LARGE}", (copy / LARGE).read_bytes())
    problems = _verify(Location.at(f"memory://{name}")).problems
    assert len(problems) == 2
    assert "block train-000000-000000" in problems[0]
