"""Small data sets of the same documents, ours and stock webdataset's, in four shards each; and a second pair, of other documents."""

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import webdataset
from numpy.typing import NDArray

from benchmarks.contestants.assembly import without_separators
from benchmarks.contestants.documents import Documents
from benchmarks.corpora import BenchCorpus
from benchmarks.synthetic import index_rows, shard_entry, write_corpus
from data_pipeline.index import CorpusIndex
from data_pipeline.shards import Block, write_shard
from data_pipeline.storage import Location

Read = Callable[[], list[bytes]]
"""Reads a data set whole: its documents or blocks, in order."""

NUM_SHARDS = 4
_DOCUMENTS_PER_SHARD = 40
_DOCUMENTS_PER_BLOCK = 8
_LONGEST = 400
"""Tokens: short documents keep the shards small, so that every place in one can be damaged."""


@dataclass(frozen=True)
class SmallCorpus:
    """One set of documents, written in both ways."""

    ours: Path
    stock: Path


def write_small_corpora(corpus: BenchCorpus, folder: Path) -> tuple[SmallCorpus, SmallCorpus]:
    """The data sets to damage, and the ones that foreign shards are taken from."""
    source = Documents.open(corpus.documents)
    wanted = 2 * NUM_SHARDS * _DOCUMENTS_PER_SHARD
    short = [np.array(array) for array in source if len(array) <= _LONGEST][:wanted]
    if len(short) < wanted:
        raise ValueError(f"the text has {len(short)} documents of at most {_LONGEST} tokens; {wanted} are needed")
    real = CorpusIndex.open(Location.at(corpus.folder))
    halves = short[: wanted // 2], short[wanted // 2 :]
    first, second = (_write(real, documents, folder / name) for documents, name in zip(halves, ("own", "foreign"), strict=True))
    return first, second


def _write(real: CorpusIndex, documents: Sequence[NDArray[np.integer]], folder: Path) -> SmallCorpus:
    parts = [documents[start : start + _DOCUMENTS_PER_SHARD] for start in range(0, len(documents), _DOCUMENTS_PER_SHARD)]
    _write_ours(real, parts, folder / "ours")
    _write_stock(parts, folder / "stock")
    return SmallCorpus(folder / "ours", folder / "stock")


def _write_ours(real: CorpusIndex, parts: Sequence[Sequence[NDArray[np.integer]]], folder: Path) -> None:
    folder.mkdir(parents=True)
    rows: list[NDArray[np.void]] = []
    shards: list[dict[str, Any]] = []
    for number, documents in enumerate(parts):
        groups = [documents[start : start + _DOCUMENTS_PER_BLOCK] for start in range(0, len(documents), _DOCUMENTS_PER_BLOCK)]
        blocks = [_block(group, real.vocabulary.sep) for group in groups]
        name = f"train-{number:06d}.tar"
        data, extents = write_shard(name, blocks)
        (folder / name).write_bytes(data)
        rows.append(index_rows(blocks, extents, number, real.sequence_lengths))
        shards.append(shard_entry(name, len(data)))
    write_corpus(real, folder, [np.concatenate(rows).tobytes()], shards, num_train=sum(map(len, rows)), num_validation=0)


def _block(documents: Sequence[NDArray[np.integer]], sep: int) -> Block:
    ids, sentence_ends, document_ends = without_separators(list(documents), sep)
    return Block(ids, sentence_ends.astype("<u4"), document_ends.astype("<u4"))


def _write_stock(parts: Sequence[Sequence[NDArray[np.integer]]], folder: Path) -> None:
    folder.mkdir(parents=True)
    for number, documents in enumerate(parts):
        with webdataset.TarWriter(f"{folder}/{number:06d}.tar", mtime=0, encoder=False) as writer:
            for nth, document in enumerate(documents):
                writer.write({"__key__": f"{number:03d}{nth:06d}", "ids.npy": _npy(document)})


def _npy(array: NDArray[np.integer]) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def open_ours(folder: Path) -> Read:
    """Open the index; what is returned reads all blocks through it. Raises DataCorruptError."""
    index = CorpusIndex.open(Location.at(folder))

    def read() -> list[bytes]:
        blocks = [index.read_block(record) for record in index.blocks("train")]
        return [block.ids.tobytes() + block.sentence_ends.tobytes() + block.document_ends.tobytes() for block in blocks]

    return read


def open_ours_later(folder: Path) -> Read:
    """The same, but the index is opened when it is read."""

    def read() -> list[bytes]:
        return open_ours(folder)()

    return read


def open_stock(**options: Any) -> Callable[[Path], Read]:
    """All documents with stock webdataset, its shards named by a range as its documentation has it."""

    def read(folder: Path) -> list[bytes]:
        urls = f"{folder}/{{000000..{NUM_SHARDS - 1:06d}}}.tar"
        return [sample["ids.npy"].tobytes() for sample in webdataset.WebDataset(urls, shardshuffle=False, **options).decode()]

    return lambda folder: lambda: read(folder)
