"""Corpora far larger than this machine's disk: a real manifest and a full index over a few real blocks, which stand for all the others.

What opening and positioning cost depends on the index alone; the blocks that are then read are real and checked like any other.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipeline.chunks import cut_chunks
from data_pipeline.index import INDEX, MANIFEST, TOKENIZER, CorpusIndex, record_dtype, sealed
from data_pipeline.shards import Block, BlockExtent, write_shard
from data_pipeline.storage import Location

BLOCK_TOKENS = 512 << 10
"""Tokens of a block of a large corpus: the most that `prepare` makes."""
NUM_SHARDS = 4096
"""Shards of a large corpus: the most that `prepare` makes. One is real, the others are names in the manifest."""
_REAL_BLOCKS = 4
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Synthetic:
    """A corpus that was made, and its size."""

    folder: str
    num_blocks: int
    num_tokens: int
    num_documents: int
    index_bytes: int
    corpus_bytes: int


def build_for_documents(real: CorpusIndex, folder: Path, num_documents: int, progress: Callable[[str], None]) -> Synthetic:
    """A corpus of at least `num_documents` documents like those of `real`."""
    blocks = large_blocks(real)
    per_block = sum(len(block.document_ends) for block in blocks) / len(blocks)
    return build(real, blocks, folder, -(-num_documents // int(per_block)), progress)


def build_for_tokens(real: CorpusIndex, folder: Path, num_tokens: int, progress: Callable[[str], None]) -> Synthetic:
    """A corpus of at least `num_tokens` tokens."""
    return build(real, large_blocks(real), folder, -(-num_tokens // BLOCK_TOKENS), progress)


def with_larger_blocks(real: CorpusIndex, folder: Path, block_tokens: int) -> str:
    """The training documents of `real` in blocks of `block_tokens` tokens, as a larger corpus has them; returns the folder."""
    folder.mkdir(parents=True)
    blocks = list(joined_blocks((real.read_block(record) for record in real.blocks("train")), block_tokens))
    name = "train-000000.tar"
    rows = _write_real(folder, name, blocks, real, shard=0)
    write_corpus(real, folder, [rows.tobytes()], [shard_entry(name, (folder / name).stat().st_size)], len(rows), num_validation=0)
    return str(folder)


def large_blocks(real: CorpusIndex) -> list[Block]:
    """A few blocks of `BLOCK_TOKENS` tokens or a little more, made of the corpus' documents, which come again when they are too few."""
    small = [real.read_block(record) for record in real.blocks("train")]
    return list(islice(joined_blocks(cycle(small), BLOCK_TOKENS), _REAL_BLOCKS))


def joined_blocks(blocks: Iterable[Block], num_tokens: int) -> Iterator[Block]:
    """Whole blocks joined until they hold `num_tokens`; pure."""
    held: list[Block] = []
    for block in blocks:
        held.append(block)
        if sum(len(each.ids) for each in held) >= num_tokens:
            yield join(held)
            held = []
    if held:
        yield join(held)


def join(blocks: list[Block]) -> Block:
    """Several blocks as one; pure."""
    token_starts = np.cumsum([0, *(len(block.ids) for block in blocks[:-1])])
    sentence_starts = np.cumsum([0, *(len(block.sentence_ends) for block in blocks[:-1])])
    return Block(
        np.concatenate([block.ids for block in blocks]),
        np.concatenate([block.sentence_ends + start for block, start in zip(blocks, token_starts, strict=True)]).astype("<u4"),
        np.concatenate([block.document_ends + start for block, start in zip(blocks, sentence_starts, strict=True)]).astype("<u4"),
    )


def build(real: CorpusIndex, blocks: list[Block], folder: Path, num_blocks: int, progress: Callable[[str], None]) -> Synthetic:
    """Write a shard with the few real blocks, and an index in which they stand for `num_blocks`."""
    progress(f"index of {num_blocks:,} blocks")
    folder.mkdir(parents=True)
    names = [f"train-{number:06d}.tar" for number in range(NUM_SHARDS)]
    held_out = "validation-000000.tar"
    train = _write_real(folder, names[0], blocks, real, shard=0)
    validation = _write_real(folder, held_out, blocks[:1], real, shard=NUM_SHARDS)
    for name in names[1:]:
        (folder / name).hardlink_to(folder / names[0])
    shards = [shard_entry(name, (folder / name).stat().st_size) for name in [*names, held_out]]
    write_corpus(real, folder, [*_repeated(train, num_blocks), validation.tobytes()], shards, num_blocks, num_validation=1)
    totals = _totals(train, num_blocks)
    return Synthetic(str(folder), num_blocks, totals["tokens"], totals["documents"], (folder / INDEX).stat().st_size, totals["bytes"])


def write_corpus(
    real: CorpusIndex, folder: Path, records: Iterable[bytes], shards: list[dict[str, Any]], num_train: int, num_validation: int
) -> None:
    """Write index.bin from parts of its bytes, and a manifest like that of `real`, whose tokenizer it shares."""
    digest = hashlib.sha256()
    with (folder / INDEX).open("wb") as file:
        for part in records:
            file.write(part)
            digest.update(part)
    (folder / TOKENIZER).symlink_to(real.tokenizer_folder)
    manifest: dict[str, Any] = {
        **real.manifest,
        "counts": {**real.manifest["counts"], "train_blocks": num_train, "validation_blocks": num_validation},
        "digests": {**real.manifest["digests"], "index": digest.hexdigest()},
        "shards": shards,
    }
    Location.at(folder / MANIFEST).write_json(sealed(manifest))


def shard_entry(name: str, size: int) -> dict[str, Any]:
    """A shard as the manifest lists it."""
    return {"name": name, "bytes": size, "sha256": hashlib.sha256(name.encode()).hexdigest(), "blocks": 0}


def index_rows(blocks: Sequence[Block], extents: Sequence[BlockExtent], shard: int, sequence_lengths: Sequence[int]) -> NDArray[np.void]:
    """Index records of the blocks of a shard."""
    rows = np.zeros(len(blocks), dtype=record_dtype(len(sequence_lengths)))
    for number, (block, extent) in enumerate(zip(blocks, extents, strict=True)):
        samples = [len(cut_chunks(block.sentence_ends, block.document_ends, length)) for length in sequence_lengths]
        place = (extent.offset, extent.checksum, shard, number, extent.num_bytes)
        rows[number] = (*place, len(block.ids), len(block.document_ends), samples)
    return rows


def _write_real(folder: Path, name: str, blocks: list[Block], real: CorpusIndex, shard: int) -> NDArray[np.void]:
    data, extents = write_shard(name, blocks)
    (folder / name).write_bytes(data)
    return index_rows(blocks, extents, shard, real.sequence_lengths)


def _repeated(rows: NDArray[np.void], num_rows: int) -> Iterator[bytes]:
    """The bytes of the rows again and again until there are `num_rows`, a part at a time."""
    part = np.tile(rows, _CHUNK // len(rows)).tobytes()
    remaining = num_rows * rows.dtype.itemsize
    while remaining:
        yield part[:remaining]
        remaining -= len(part[:remaining])


def _totals(rows: NDArray[np.void], num_blocks: int) -> dict[str, int]:
    """Sums over all blocks of the synthetic corpus."""
    whole, rest = divmod(num_blocks, len(rows))
    return {
        name: int(rows[name].sum(dtype=np.int64)) * whole + int(rows[name][:rest].sum(dtype=np.int64)) for name in ("tokens", "documents", "bytes")
    }
