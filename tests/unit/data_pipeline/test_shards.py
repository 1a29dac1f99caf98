"""Blocks in tars: stock webdataset reads them, every damage is found when a block is read, nothing is unpickled or run."""

import io
import pickle
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset

from data_pipeline.errors import DataCorruptError, NotFoundError
from data_pipeline.index import CorpusIndex
from data_pipeline.prepare import Prepared
from data_pipeline.shards import Block, parse_block, write_shard
from data_pipeline.storage import Location


@pytest.fixture
def copy(tiny_corpus: Prepared, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_corpus.folder.url, tmp_path / "corpus"))


def _read_all(folder: Path) -> None:
    index = CorpusIndex.open(Location.at(folder))
    for record in index.records:
        index.read_block(record)


def test_stock_webdataset_reads_the_shards(tiny_corpus: Prepared) -> None:
    index = CorpusIndex.open(tiny_corpus.folder)
    dataset = webdataset.WebDataset(f"{tiny_corpus.folder}/train-000000.tar", shardshuffle=False).decode()
    samples = list(dataset)
    assert len(samples) == len(index.blocks("train"))
    for sample, record in zip(samples, index.blocks("train"), strict=True):
        block = index.read_block(record)
        assert (sample["ids.npy"] == block.ids).all()
        assert (sample["sentences.npy"] == block.sentence_ends).all()
        assert (sample["documents.npy"] == block.document_ends).all()
        assert len(block.ids) == record["tokens"] == block.sentence_ends[-1]
        assert len(block.document_ends) == record["documents"]


def test_same_blocks_same_bytes() -> None:
    block = Block(np.arange(9, dtype="<u2"), np.array([4, 9], dtype="<u4"), np.array([2], dtype="<u4"))
    assert write_shard("train-000000.tar", [block, block]) == write_shard("train-000000.tar", [block, block])


@pytest.mark.parametrize("where", ["payload", "header", "first", "last"])
def test_a_flipped_bit_is_found(copy: Path, where: str) -> None:
    record = CorpusIndex.open(Location.at(copy)).blocks("train")[3]
    start, size = int(record["offset"]), int(record["bytes"])
    at = {"payload": start + 512 + 200, "header": start + 100, "first": start, "last": start + size - 1}[where]
    path = copy / "train-000000.tar"
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataCorruptError, match=r"train-000000.tar: checksum of block train-000000-000003"):
        _read_all(copy)


def test_missing_cut_and_swapped_shards_are_found(copy: Path) -> None:
    path = copy / "train-000000.tar"
    data = path.read_bytes()
    path.unlink()
    with pytest.raises(DataCorruptError, match=r"train-000000.tar is missing"):
        CorpusIndex.open(Location.at(copy))
    path.write_bytes(data[:-512])
    with pytest.raises(DataCorruptError, match=r"train-000000.tar has \d+ bytes; corpus.json says"):
        CorpusIndex.open(Location.at(copy))
    path.write_bytes(bytes(len(data)))
    with pytest.raises(DataCorruptError, match="checksum"):
        _read_all(copy)


def test_a_shard_that_vanishes_or_shrinks_later_is_found(copy: Path) -> None:
    index = CorpusIndex.open(Location.at(copy))
    record = index.blocks("train")[-1]
    path = copy / "train-000000.tar"
    with path.open("r+b") as file:
        file.truncate(int(record["offset"]) + 700)
    with pytest.raises(DataCorruptError, match=r"should have \d+ bytes at \d+, found 700"):
        index.read_block(record)
    path.unlink()
    with pytest.raises(DataCorruptError, match="is missing"):
        index.read_block(record)


def test_damaged_index_and_manifest(copy: Path) -> None:
    manifest, index = copy / "corpus.json", copy / "index.bin"
    data = bytearray(index.read_bytes())
    data[40] ^= 1
    index.write_bytes(data)
    with pytest.raises(DataCorruptError, match=r"index\.bin: its digest"):
        CorpusIndex.open(Location.at(copy))
    index.write_bytes(b"")
    with pytest.raises(DataCorruptError, match=r"index\.bin is missing or empty"):
        CorpusIndex.open(Location.at(copy))
    text = manifest.read_text()
    manifest.write_text(text.replace('"format_version": 1', '"format_version": 7'))
    with pytest.raises(DataCorruptError, match="has format version 7; this release reads up to 1"):
        CorpusIndex.open(Location.at(copy))
    manifest.write_text(text[:100])
    with pytest.raises(DataCorruptError, match="is not a corpus manifest"):
        CorpusIndex.open(Location.at(copy))
    manifest.unlink()
    with pytest.raises(NotFoundError, match="no prepared corpus"):
        CorpusIndex.open(Location.at(copy))


def _tar(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def _npy(array: np.ndarray, allow_pickle: bool = False) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=allow_pickle)
    return buffer.getvalue()


def test_blocks_that_another_writer_laid_out_are_read(tiny_corpus: Prepared) -> None:
    """Other order, other headers (with an owner's name and a long path): the same arrays, by webdataset's own reader."""
    index = CorpusIndex.open(tiny_corpus.folder)
    block = index.read_block(index.records[0])
    arrays = {"sentences": block.sentence_ends, "ids": block.ids, "documents": block.document_ends}
    for key in ("k", "long" * 60):
        again = parse_block(_tar({f"{key}.{name}.npy": _npy(array) for name, array in arrays.items()}), key, "s.tar")
        assert (again.ids == block.ids).all()
        assert (again.sentence_ends == block.sentence_ends).all()
        assert (again.document_ends == block.document_ends).all()


def test_our_own_layout_needs_no_other_reader(tiny_corpus: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    """Most of the time of reading a small block would be spent in Python's tar reader."""
    monkeypatch.setattr("webdataset.tariterators.tar_file_expander", None)
    index = CorpusIndex.open(tiny_corpus.folder)
    assert sum(len(index.read_block(record).ids) for record in index.records) == int(index.records["tokens"].sum())


class _Bomb:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (Path.touch, (Path("exploded"),))


def test_nothing_is_unpickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    good = _npy(np.arange(3, dtype="<u2"))
    bomb = _npy(np.array([_Bomb()], dtype=object), allow_pickle=True)
    with pytest.raises(DataCorruptError, match=r"k\.ids\.npy is not a plain array"):
        parse_block(_tar({"k.ids.npy": bomb, "k.sentences.npy": good, "k.documents.npy": good}), "k", "s.tar")
    with pytest.raises(DataCorruptError, match="unexpected members"):
        parse_block(_tar({"k.ids.pkl": pickle.dumps(_Bomb()), "k.sentences.npy": good, "k.documents.npy": good}), "k", "s.tar")
    with pytest.raises(DataCorruptError, match="expected a flat array of unsigned integers"):
        parse_block(_tar({"k.ids.npy": _npy(np.zeros(3)), "k.sentences.npy": good, "k.documents.npy": good}), "k", "s.tar")
    with pytest.raises(DataCorruptError, match=r"expected block k, found \['other'\]"):
        parse_block(_tar({"other.ids.npy": good}), "k", "s.tar")
    assert list(tmp_path.iterdir()) == []


def test_a_pipe_is_a_file_name(copy: Path, tmp_path: Path) -> None:
    index = CorpusIndex.open(Location.at(copy))
    index.manifest["shards"][0]["name"] = f"pipe:touch {tmp_path}/ran"
    with pytest.raises(DataCorruptError, match="is missing"):
        index.read_block(index.blocks("train")[0])
    assert not (tmp_path / "ran").exists()


def test_the_lines_of_the_readme_read_a_corpus_with_stock_webdataset(tiny_corpus: Prepared, tmp_path: Path) -> None:
    text = (Path(__file__).parents[3] / "README.md").read_text()
    start = text.index("    import io, json, pathlib, sys")
    code = "".join(line.removeprefix("    ") for line in text[start : text.index("\n## ", start)].splitlines(keepends=True))
    (tmp_path / "read.py").write_text(code)
    assert len([line for line in code.splitlines() if line]) <= 12
    printed = subprocess.run(
        [sys.executable, "read.py", tiny_corpus.folder.url], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=True
    )
    counts = CorpusIndex.open(tiny_corpus.folder).manifest["counts"]
    documents = printed.stdout.splitlines()
    assert len(documents) == counts["train_documents"] + counts["validation_documents"]
    assert len(set(documents)) > 0.9 * len(documents)
