"""Reads a whole corpus and compares everything with what its manifest says; every problem is listed, nothing larger than a block is held."""

import hashlib
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipeline.chunks import cut_chunks
from data_pipeline.config import DataConfig
from data_pipeline.corpus_files import read_intact
from data_pipeline.errors import DataCorruptError, NotFoundError
from data_pipeline.index import MANIFEST, open_records, parse_manifest, tokenizer_problems
from data_pipeline.shards import Block, BlockExtent, damaged_block, decode_block, find_damage
from data_pipeline.storage import Location

_READ_BYTES = 4 << 20
_COUNTED = ("documents", "sentences", "tokens")

Progress = Callable[[int, int], None]
"""Called with the bytes done and their total."""


@dataclass
class Verification:
    """What was found."""

    problems: list[str] = field(default_factory=list)
    shards: int = 0
    blocks: int = 0
    """Intact ones."""
    bytes: int = 0
    counts: dict[str, int] = field(default_factory=dict)
    """Documents (long ones in parts), sentences and tokens of each split, in intact blocks."""


def verify_corpus(folder: Location, settings: DataConfig, progress: Progress) -> Verification:
    """Re-hash manifest, index, tokenizer and shards, check every block by its checksum, and count what is in them.

    What comes damaged out of a store is read once more before it counts.

    Raises:
        NotFoundError: there is no corpus.
        UnreachableError: its store gave no answer in time; that says nothing about the corpus.
    """
    result = Verification()
    try:
        _, manifest = read_intact(folder / MANIFEST, settings, partial(parse_manifest, folder / MANIFEST))
    except DataCorruptError as error:
        result.problems.append(error.cause)  # without it there is nothing to compare with
        return result
    result.problems += _twice(folder, lambda: tokenizer_problems(folder, manifest, settings))
    records: NDArray[np.void] | None = None
    try:
        records = open_records(folder, manifest, settings)
    except DataCorruptError as error:
        result.problems.append(error.cause)
    _verify_shards(folder, manifest, records, settings, result, progress)
    if folder.is_local:
        known = {shard["name"] for shard in manifest["shards"]}
        strangers = [name for name in folder.children() if name.endswith(".tar") and name not in known]
        result.problems += [f"{folder / name} is not in {MANIFEST}" for name in strangers]
    if not result.problems:
        result.problems += _wrong_counts(folder, manifest, result)
    return result


def _verify_shards(
    folder: Location, manifest: dict[str, Any], records: NDArray[np.void] | None, settings: DataConfig, result: Verification, progress: Progress
) -> None:
    total = sum(int(shard["bytes"]) for shard in manifest["shards"])
    for number, shard in enumerate(manifest["shards"]):
        own = None if records is None else np.sort(records[records["shard"] == number], order="offset")
        seen = _Shard(folder / shard["name"], shard, own, tuple(manifest["sequence_lengths"]), settings)
        before = result.bytes
        found = seen.verify(lambda done, before=before: progress(before + done, total))
        if found and not folder.is_local:
            found = seen.verify(lambda done, before=before: progress(before + done, total))
        result.problems += found
        result.shards += 1
        result.bytes += int(shard["bytes"])
        result.blocks += seen.num_intact
        split = str(shard["name"]).split("-")[0]
        for name, value in zip(_COUNTED, seen.counts, strict=True):
            result.counts[f"{split}_{name}"] = result.counts.get(f"{split}_{name}", 0) + int(value)
        progress(result.bytes, total)


class _Shard:
    """One shard, read once from its first byte to its last."""

    def __init__(
        self, path: Location, said: dict[str, Any], records: NDArray[np.void] | None, sequence_lengths: tuple[int, ...], settings: DataConfig
    ) -> None:
        self.num_intact = 0
        self.counts = np.zeros(len(_COUNTED), dtype=np.int64)
        self._path = path
        self._said = said
        self._records = records
        self._lengths = sequence_lengths
        self._settings = settings

    def verify(self, progress: Callable[[int], None]) -> list[str]:
        """All that is wrong with it."""
        self.num_intact, self.counts = 0, np.zeros(len(_COUNTED), dtype=np.int64)
        try:
            return list(self._problems(progress))
        except (FileNotFoundError, NotFoundError):
            return [f"{self._path} is missing"]

    def _problems(self, progress: Callable[[int], None]) -> Iterator[str]:
        digest, num_bytes = hashlib.sha256(), 0
        held = bytearray()  # from the start of the next block on
        records = deque([] if self._records is None else self._records)
        offset = 0
        with self._path.open_binary(self._settings) as file:
            while part := file.read(_READ_BYTES):
                digest.update(part)
                num_bytes += len(part)
                held += part
                while records and num_bytes >= int(records[0]["offset"]) + int(records[0]["bytes"]):
                    record = records.popleft()
                    start = int(record["offset"]) - offset
                    yield from self._check(record, bytes(held[start : start + int(record["bytes"])]))
                    del held[: start + int(record["bytes"])]
                    offset += start + int(record["bytes"])
                if not records:
                    held.clear()
                    offset = num_bytes
                progress(num_bytes)
        for record in records:
            left = max(0, num_bytes - int(record["offset"]))
            yield from self._check(record, bytes(left))
        if num_bytes != self._said["bytes"]:
            yield f"{self._path} has {num_bytes} bytes; {MANIFEST} says {self._said['bytes']} bytes"
        elif digest.hexdigest() != self._said["sha256"]:
            yield f"{self._path} has not the digest in {MANIFEST}"

    def _check(self, record: np.void, data: bytes) -> Iterator[str]:
        extent = BlockExtent(int(record["offset"]), int(record["bytes"]), int(record["checksum"]))
        if (damage := find_damage(data, extent)) is not None:
            yield damaged_block(self._path, int(record["number"]), damage).cause
            return
        try:
            block = decode_block(data, self._path, int(record["number"]))
        except DataCorruptError as error:
            yield error.cause
            return
        where = f"{self._path}: block {int(record['number'])}"
        counts = (len(block.document_ends), len(block.sentence_ends), len(block.ids))
        found = (counts[0], counts[2], *(_num_samples(block, length) for length in self._lengths))
        said = (int(record["documents"]), int(record["tokens"]), *record["samples"].tolist())
        if found != said:
            yield f"{where} holds {found} documents, tokens and samples; the index says {said}"
            return
        self.num_intact += 1
        self.counts += counts


def _num_samples(block: Block, length: int) -> int:
    return len(cut_chunks(block.sentence_ends, block.document_ends, length))


def _wrong_counts(folder: Location, manifest: dict[str, Any], result: Verification) -> list[str]:
    """What adds up to something else than the manifest says. A document longer than a block lies there in parts: there may be more, never fewer."""
    said: dict[str, Any] = manifest["counts"]
    pairs = [(name, int(said.get(name, 0)), found) for name, found in result.counts.items()]
    pairs.append(("blocks", int(said["train_blocks"]) + int(said["validation_blocks"]), result.blocks))
    return [
        f"{folder / MANIFEST} says {expected} {name}; the shards hold {found}"
        for name, expected, found in pairs
        if found < expected or (found > expected and not name.endswith("documents"))
    ]


def _twice(folder: Location, find: Callable[[], list[str]]) -> list[str]:
    problems = find()
    return find() if problems and not folder.is_local else problems
