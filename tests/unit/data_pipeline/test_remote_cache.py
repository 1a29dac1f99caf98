"""The node's copy of what was read from a store: bounded, shared by processes, never trusted, never in the way."""

import fcntl
import hashlib
import multiprocessing
import os
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import fsspec
import numpy as np
import pytest

from data_pipeline.block_cache import BlockCache
from data_pipeline.config import DataConfig
from data_pipeline.index import CorpusIndex
from data_pipeline.prepare import Prepared
from data_pipeline.storage import Location

SIZE = 1000


def _content(number: int) -> tuple[str, bytes]:
    data = np.random.default_rng(number).bytes(SIZE)
    return hashlib.sha256(data).hexdigest(), data


def _any(data: bytes) -> bool:
    return True


def _files(cache: BlockCache) -> list[Path]:
    return [path for path in cache.folder.glob("*/*") if path.is_file()]


def _held(cache: BlockCache) -> int:
    total = 0
    for path in _files(cache):
        with suppress(FileNotFoundError):  # another process makes room
            total += path.stat().st_size
    return total


@pytest.fixture
def remote_corpus(tiny_corpus: Prepared) -> Iterator[Location]:
    """The tiny corpus on a file system that is not the local one."""
    name = f"cache-{time.monotonic_ns()}"
    memory = fsspec.filesystem("memory")
    memory.put(str(tiny_corpus.folder), f"/{name}", recursive=True)
    yield Location.at(f"memory://{name}")
    memory.rm(f"/{name}", recursive=True)


def test_the_least_recently_used_goes_first(tmp_path: Path) -> None:
    cache = BlockCache(tmp_path / "blocks", 10 * SIZE)
    contents = [_content(number) for number in range(11)]
    for age, (key, data) in enumerate(contents[:10]):
        cache.put(key, data)
        os.utime(cache.path(key) or "", (age, age))
    assert len(_files(cache)) == 10
    assert cache.get(contents[0][0], _any) == contents[0][1]  # used again: now the newest
    cache.put(*contents[10])
    kept = [number for number, (key, _) in enumerate(contents) if cache.path(key)]
    assert kept == [0, 3, 4, 5, 6, 7, 8, 9, 10]
    assert _held(cache) <= cache.max_bytes


def _fill(folder: Path, first: int, count: int) -> None:
    cache = BlockCache(folder, 50 * SIZE)
    for number in range(first, first + count):
        key, data = _content(number)
        cache.put(key, data)
        found = cache.get(key, lambda found, expected=data: found == expected)
        assert found in (data, None)
        assert _held(cache) <= cache.max_bytes + 3 * SIZE  # what the others have reserved while one counted


def test_processes_share_it_and_its_bound(tmp_path: Path) -> None:
    """Three processes write overlapping files at once: what is there is whole, and never more than the bound."""
    processes = [multiprocessing.get_context("spawn").Process(target=_fill, args=(tmp_path / "blocks", first, 100)) for first in (0, 50, 0)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    cache = BlockCache(tmp_path / "blocks", 50 * SIZE)
    assert 0 < _held(cache) <= cache.max_bytes
    assert all(hashlib.sha256(path.read_bytes()).hexdigest() == path.name for path in _files(cache))
    assert not list(cache.folder.glob("*/.*"))


def test_files_of_others_are_left_alone(tmp_path: Path) -> None:
    """A cache_dir that holds something else loses nothing but our own files."""
    cache = BlockCache.of(DataConfig(cache_dir=str(tmp_path), cache_bytes=3 * SIZE))
    others = [tmp_path / "precious.txt", tmp_path / "ab" / "precious", cache.folder / "ab" / "notes.txt"]
    for path in others:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(5 * SIZE))
        os.utime(path, (1, 1))
    for number in range(20):
        cache.put(*_content(number))
    assert all(path.stat().st_size == 5 * SIZE for path in others)


def test_what_a_killed_process_left_is_cleared_away(tmp_path: Path) -> None:
    """Its temporary file, and a size that counts what it never wrote."""
    cache = BlockCache(tmp_path / "blocks", 10 * SIZE)
    key, data = _content(0)
    cache.put(key, data)
    stale = cache.folder / key[:2] / f".{key}.0123abcd.tmp"
    stale.write_bytes(bytes(4 * SIZE))
    os.utime(stale, (1, 1))
    (cache.folder / "size").write_text(str(99 * SIZE))
    cache.put(*_content(1))
    cache.put(*_content(2))
    for number in range(3, 9):
        cache.put(*_content(number))
    assert all(cache.path(_content(number)[0]) for number in range(9))
    for number in range(9, 14):
        cache.put(*_content(number))
    assert not stale.exists()
    assert _held(cache) <= cache.max_bytes


def test_a_lock_that_is_kept_costs_the_copy_and_not_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data_pipeline.block_cache._LOCK_WAIT_S", 0.1)
    cache = BlockCache(tmp_path / "blocks", 10 * SIZE)
    cache.put(*_content(0))
    with (cache.folder / "size").open("r+b") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        cache.put(*_content(1))
    assert cache.path(_content(0)[0])
    assert cache.path(_content(1)[0]) is None


def test_a_folder_that_cannot_be_written(tmp_path: Path, remote_corpus: Location) -> None:
    (tmp_path / "file").write_text("not a folder")
    index = CorpusIndex.open(remote_corpus, DataConfig(cache_dir=str(tmp_path / "file")))
    assert len(index.read_block(index.records[0]).ids)


def test_blocks_come_from_the_copy(tmp_path: Path, remote_corpus: Location) -> None:
    settings = DataConfig(cache_dir=str(tmp_path))
    first = CorpusIndex.open(remote_corpus, settings)
    expected = [block.ids for block in first.read_blocks(first.records)]
    fsspec.filesystem("memory").rm((remote_corpus / "train-000000.tar").url.removeprefix("memory:/"))
    second = CorpusIndex.open(remote_corpus, settings)
    assert all(np.array_equal(block.ids, ids) for block, ids in zip(second.read_blocks(second.blocks("train")), expected, strict=False))


def test_a_damaged_copy_is_noticed_and_read_again(tmp_path: Path, remote_corpus: Location) -> None:
    """Of a block, and of the index."""
    settings = DataConfig(cache_dir=str(tmp_path))
    index = CorpusIndex.open(remote_corpus, settings)
    expected, records = index.read_block(index.records[0]).ids, np.array(index.records)
    files = _files(BlockCache.of(settings))
    assert len(files) == 2
    for path in files:
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    again = CorpusIndex.open(remote_corpus, settings)
    assert np.array_equal(again.read_block(again.records[0]).ids, expected)
    assert np.array_equal(again.records, records)
    assert all(path.read_bytes() for path in files)


def test_nothing_is_kept_when_there_is_no_room(tmp_path: Path, remote_corpus: Location) -> None:
    settings = DataConfig(cache_dir=str(tmp_path), cache_bytes=0)
    index = CorpusIndex.open(remote_corpus, settings)
    assert len(index.read_blocks(index.records)) == len(index.records)
    assert _files(BlockCache.of(settings)) == []
