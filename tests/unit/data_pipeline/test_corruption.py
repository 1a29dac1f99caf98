"""D6: whatever happens to a prepared corpus on disk, nothing is lost or changed silently; what is refused is named."""

import io
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.config import CorpusConfig, TokenizerConfig
from data_pipeline.errors import DataCorruptError, ExitCode
from data_pipeline.executor import InProcessExecutor
from data_pipeline.index import CorpusIndex
from data_pipeline.prepare import Prepared, prepare
from data_pipeline.shards import Block
from data_pipeline.storage import Location
from tests.support.corpus import small_corpus
from tests.support.text import generate_documents

SMALL, LARGE = "validation-000000.tar", "train-000000.tar"
_TAR_HEADER = {  # POSIX.1-1988, offsets within the 512 bytes
    "name": 3, "mode": 104, "uid": 110, "gid": 118, "size": 130, "mtime": 140, "checksum": 150,
    "type": 156, "link": 160, "magic": 258, "version": 263, "user": 270, "group": 300, "device": 330, "prefix": 350, "filler": 505,
}  # fmt: skip


@pytest.fixture
def copy(tiny_corpus: Prepared, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_corpus.folder.url, tmp_path / "corpus"))


@pytest.fixture(scope="module")
def other_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(small_corpus(tmp_path_factory.mktemp("other"), seed=9))


def _flip(path: Path, at: int, bit: int = 0) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ (1 << bit)]))


def _blocks_of(index: CorpusIndex, shard: str) -> Iterator[np.void]:
    names = [each["name"] for each in index.manifest["shards"]]
    return (record for record in index.records if names[int(record["shard"])] == shard)


def _refused(index: CorpusIndex, shard: str) -> dict[int, DataCorruptError]:
    """Blocks of a shard that cannot be read, by number; every other block is read, and holds what the index says."""
    refused: dict[int, DataCorruptError] = {}
    for record in _blocks_of(index, shard):
        try:
            block = index.read_block(record)
        except DataCorruptError as error:
            refused[int(record["number"])] = error
        else:
            assert len(block.ids) == record["tokens"]
            assert len(block.document_ends) == record["documents"]
    for number, error in refused.items():
        assert (error.shard, error.block, error.exit_code) == (shard, number, ExitCode.DATA_CORRUPT)
        assert f"{shard.removesuffix('.tar')}-{number:06d}" in error.cause
        assert shard in error.cause
    return refused


def _opened_before(copy: Path) -> CorpusIndex:
    """The corpus as a run holds it that opened it before the damage."""
    return CorpusIndex.open(Location.at(copy))


@pytest.mark.parametrize("region", _TAR_HEADER)
@pytest.mark.parametrize("member", [0, 1, 2], ids=["documents", "ids", "sentences"])
def test_a_bit_flipped_in_a_header(copy: Path, region: str, member: int) -> None:
    with tarfile.open(copy / LARGE) as tar:
        members = tar.getmembers()
    number = 2
    _flip(copy / LARGE, members[3 * number + member].offset + _TAR_HEADER[region], bit=2)
    assert list(_refused(_opened_before(copy), LARGE)) == [number]


@pytest.mark.parametrize("place", ["npy magic", "npy header", "first value", "last value", "padding"])
def test_a_bit_flipped_in_a_payload(copy: Path, place: str) -> None:
    with tarfile.open(copy / LARGE) as tar:
        members = tar.getmembers()
    number = 3
    for member in members[3 * number : 3 * number + 3]:
        end = member.offset_data + member.size
        at = {"npy magic": member.offset_data, "npy header": member.offset_data + 20, "first value": member.offset_data + 128}
        at |= {"last value": end - 1, "padding": end}
        if place == "padding" and end % 512 == 0:
            continue
        _flip(copy / LARGE, at[place], bit=5)
        assert list(_refused(_opened_before(copy), LARGE)) == [number]
        _flip(copy / LARGE, at[place], bit=5)
    assert not _refused(_opened_before(copy), LARGE)


def test_every_bit_of_a_block_counts(copy: Path) -> None:
    """A sample of all bits of a shard's last block: every one is refused."""
    index = _opened_before(copy)
    record = list(_blocks_of(index, SMALL))[-1]
    generator = np.random.default_rng(0)
    for at in generator.integers(int(record["offset"]), int(record["offset"]) + int(record["bytes"]), size=200).tolist():
        bit = int(generator.integers(8))
        _flip(copy / SMALL, at, bit)
        with pytest.raises(DataCorruptError, match=rf"{SMALL}: checksum of block"):
            index.read_block(record)
        _flip(copy / SMALL, at, bit)
    assert index.read_block(record)


def test_truncation_at_every_boundary(copy: Path) -> None:
    index = _opened_before(copy)
    data = (copy / SMALL).read_bytes()
    records = list(_blocks_of(index, SMALL))
    for size in range(0, len(data), 512):
        (copy / SMALL).write_bytes(data[:size])
        with pytest.raises(DataCorruptError, match=rf"{SMALL} has {size} bytes; corpus\.json says {len(data)}") as caught:
            CorpusIndex.open(Location.at(copy))
        assert caught.value.shard == SMALL
        cut = [int(record["number"]) for record in records if int(record["offset"]) + int(record["bytes"]) > size]
        assert list(_refused(index, SMALL)) == cut


def test_a_shard_missing(copy: Path) -> None:
    index = _opened_before(copy)
    (copy / SMALL).unlink()
    assert len(_refused(index, SMALL)) == len(list(_blocks_of(index, SMALL)))
    with pytest.raises(DataCorruptError, match=rf"{SMALL} is missing") as caught:
        CorpusIndex.open(Location.at(copy))
    assert caught.value.shard == SMALL


def test_a_shard_replaced_by_another_corpus(copy: Path, other_corpus: Path) -> None:
    """Also by one of the same size, which only its contents give away."""
    index = _opened_before(copy)
    size = (copy / LARGE).stat().st_size
    foreign = (other_corpus / LARGE).read_bytes()
    (copy / LARGE).write_bytes((foreign * (size // len(foreign) + 1))[:size])
    reopened = CorpusIndex.open(Location.at(copy))
    for each in (index, reopened):
        assert len(_refused(each, LARGE)) == len(list(_blocks_of(index, LARGE)))


def test_two_shards_swapped(copy: Path) -> None:
    index = _opened_before(copy)
    one, two = copy / LARGE, copy / SMALL
    one.rename(copy / "aside")
    two.rename(one)
    (copy / "aside").rename(two)
    for shard in (LARGE, SMALL):
        assert len(_refused(index, shard)) == len(list(_blocks_of(index, shard)))
    with pytest.raises(DataCorruptError, match=r"has \d+ bytes"):
        CorpusIndex.open(Location.at(copy))


def test_two_blocks_of_equal_size_swapped(copy: Path) -> None:
    """Bytes that are intact in the wrong place: the key inside the block and the checksum in the index both differ."""
    index = _opened_before(copy)
    records = list(_blocks_of(index, LARGE))
    path = copy / LARGE
    data = bytearray(path.read_bytes())
    places = [slice(int(record["offset"]), int(record["offset"]) + int(record["bytes"])) for record in records]
    one, two = next((a, b) for a in range(len(places)) for b in range(a) if records[a]["bytes"] == records[b]["bytes"])
    data[places[one]], data[places[two]] = data[places[two]], data[places[one]]
    path.write_bytes(data)
    assert set(_refused(index, LARGE)) == {one, two}


def test_an_index_from_another_version(copy: Path) -> None:
    """A layout with a field less, and records in another order: neither is taken for this corpus' index."""
    path = copy / "index.bin"
    records = CorpusIndex.open(Location.at(copy)).records
    without = np.array(records[[name for name in records.dtype.names or () if name != "documents"]].tolist(), dtype=object)
    for data in (str(without).encode(), np.array(records[::-1]).tobytes(), path.read_bytes()[:-4]):
        path.write_bytes(data)
        with pytest.raises(DataCorruptError, match=r"index\.bin: its digest is not the one in corpus\.json"):
            CorpusIndex.open(Location.at(copy))


def test_a_manifest_from_another_version(copy: Path) -> None:
    path = copy / "corpus.json"
    path.write_text(path.read_text().replace('"format_version": 1', '"format_version": 2'))
    with pytest.raises(DataCorruptError, match=r"format version 2; this release reads up to 1") as caught:
        CorpusIndex.open(Location.at(copy))
    assert caught.value.remedy == "Upgrade maskwright."


@pytest.mark.parametrize("name", ["index.bin", "corpus.json"])
def test_a_file_of_another_corpus(copy: Path, other_corpus: Path, name: str) -> None:
    shutil.copyfile(other_corpus / name, copy / name)
    with pytest.raises(DataCorruptError, match=r"index\.bin: its digest"):
        CorpusIndex.open(Location.at(copy))


def test_a_bit_flipped_in_the_index(copy: Path) -> None:
    path = copy / "index.bin"
    for at in range(0, path.stat().st_size, 37):
        _flip(path, at, bit=at % 8)
        with pytest.raises(DataCorruptError, match=r"index\.bin: its digest"):
            CorpusIndex.open(Location.at(copy))
        _flip(path, at, bit=at % 8)
    CorpusIndex.open(Location.at(copy))


@pytest.mark.parametrize("stride", [17, pytest.param(1, marks=pytest.mark.full)])
def test_a_bit_flipped_in_the_manifest(copy: Path, stride: int) -> None:
    """Spaces and digits included: the file is what this release writes, to the byte."""
    path = copy / "corpus.json"
    data = path.read_bytes()
    for bit in range(0, 8 * len(data), stride):
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        with pytest.raises(DataCorruptError, match=r"corpus\.json"):
            CorpusIndex.open(Location.at(copy))


def test_a_bit_flipped_in_a_tokenizer_file(copy: Path) -> None:
    for path in sorted((copy / "tokenizer").iterdir()):
        for at in (0, path.stat().st_size // 2, path.stat().st_size - 1):
            _flip(path, at)
            with pytest.raises(DataCorruptError, match=rf"tokenizer/{path.name} has not the digest"):
                CorpusIndex.open(Location.at(copy))
            _flip(path, at)
        data = path.read_bytes()
        path.unlink()
        with pytest.raises(DataCorruptError, match=rf"tokenizer/{path.name} is missing"):
            CorpusIndex.open(Location.at(copy))
        path.write_bytes(data)
    (copy / "tokenizer" / "more.json").write_text("{}")
    with pytest.raises(DataCorruptError, match=r"tokenizer/more.json is not in corpus.json"):
        CorpusIndex.open(Location.at(copy))


def test_shards_of_a_large_corpus_are_not_all_looked_for(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Above some thousand shards opening does not ask for each; the block that is read does."""
    monkeypatch.setattr("data_pipeline.index._SHARDS_LOOKED_AT", 1)
    (copy / SMALL).unlink()
    index = CorpusIndex.open(Location.at(copy))
    assert len(_refused(index, SMALL)) == len(list(_blocks_of(index, SMALL)))
    assert not _refused(index, LARGE)


def test_what_an_error_names_survives_a_process_border() -> None:
    import pickle

    error = pickle.loads(pickle.dumps(DataCorruptError("cause", "remedy", "train-000003.tar", 7)))
    assert (error.cause, error.remedy, error.shard, error.block) == ("cause", "remedy", "train-000003.tar", 7)
    assert DataCorruptError("cause", "remedy").shard is None


def test_stock_tar_readers_lose_what_we_refuse(copy: Path) -> None:
    """Why blocks are found by the index and not by walking the tar: a reader that walks stops at the damage, without a word."""
    with tarfile.open(copy / LARGE) as tar:
        members = tar.getmembers()
    _flip(copy / LARGE, members[6].offset + _TAR_HEADER["checksum"], bit=2)
    with tarfile.open(fileobj=io.BytesIO((copy / LARGE).read_bytes()), mode="r|") as tar:
        assert len(list(tar)) < len(members)
    assert list(_refused(_opened_before(copy), LARGE)) == [2]


def test_the_same_shard_of_another_preparation(tmp_path: Path, tiny_corpus: Prepared, copy: Path) -> None:
    """Same settings, other seed: shards of the same name and nearly the same size."""
    texts = tmp_path / "texts"
    texts.mkdir()
    for number, text in enumerate(generate_documents(60, seed=1)):
        (texts / f"{number}.txt").write_text(text)
    made = [
        prepare(
            CorpusConfig(name="x", source=str(texts), seed=seed, validation_fraction=0.1),
            TokenizerConfig(vocab_size=500),
            (32, 64),
            Location.at(tmp_path / "storage"),
            InProcessExecutor(),
            progress=lambda message: None,
        )
        for seed in (0, 1)
    ]
    one, two = (each.folder.path for each in made)
    index = CorpusIndex.open(Location.at(one))
    whole: list[Block] = [index.read_block(record) for record in index.records]
    shutil.copyfile(two / LARGE, one / LARGE)
    refused = _refused(index, LARGE)
    assert len(refused) == len(list(_blocks_of(index, LARGE))) > 0
    assert sum(len(block.ids) for block in whole) == made[0].summary["train_tokens"] + made[0].summary["validation_tokens"]
