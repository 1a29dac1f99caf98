"""The corpus' manifest and its memory-mapped index: which blocks there are, where, and how many samples each holds."""

import hashlib
import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from data_pipeline.errors import ConfigError, DataCorruptError, NotFoundError
from data_pipeline.masking import Vocabulary
from data_pipeline.shards import Block, BlockExtent, block_key, read_block
from data_pipeline.storage import Location

FORMAT_VERSION = 1
MANIFEST = "corpus.json"
INDEX = "index.bin"
TOKENIZER = "tokenizer"
_REMEDY = "Restore the corpus from a copy or prepare it again."

Split = Literal["train", "validation"]


def record_dtype(num_lengths: int) -> np.dtype[np.void]:
    """Layout of a record of index.bin, little-endian: training blocks first, then validation blocks."""
    return np.dtype(
        [
            ("offset", "<u8"),
            ("checksum", "<u8"),
            ("shard", "<u4"),
            ("number", "<u4"),
            ("bytes", "<u4"),
            ("tokens", "<u4"),
            ("documents", "<u4"),
            ("samples", "<u4", (num_lengths,)),
        ]
    )


@dataclass(frozen=True)
class CorpusIndex:
    """An opened corpus. Pickled by its folder: a worker opens it again."""

    folder: Location
    manifest: dict[str, Any]
    fingerprint: str
    """SHA-256 of corpus.json, which names everything else by digest."""
    records: NDArray[np.void]

    @classmethod
    def open(cls, folder: Location) -> "CorpusIndex":
        """Open a corpus and check its version, the digests of its index and its tokenizer's files, and the sizes of its shards.

        Raises:
            NotFoundError: there is no prepared corpus.
            DataCorruptError: it is damaged, or was written by a newer release.
        """
        path = folder / MANIFEST
        if not path.exists():
            raise NotFoundError(f"{folder} holds no prepared corpus", "Run `maskwright prepare CONFIG`.")
        data = path.read_bytes()
        manifest = _parse(data, path)
        records = _open_records(folder, manifest)
        _check_shards(folder, manifest)
        _check_tokenizer(folder, manifest)
        return cls(folder, manifest, hashlib.sha256(data).hexdigest(), records)

    def __reduce__(self) -> tuple[Any, ...]:
        return (CorpusIndex.open, (self.folder,))

    @property
    def tokenizer_digest(self) -> str:
        """Digest of the corpus' tokenizer, see `tokenizer.tokenizer_digest`."""
        return str(self.manifest["digests"]["tokenizer"])

    @property
    def sequence_lengths(self) -> tuple[int, ...]:
        """Sequence lengths that samples were counted for, ascending."""
        return tuple(self.manifest["sequence_lengths"])

    @property
    def vocabulary(self) -> Vocabulary:
        """Token ids of the corpus' tokenizer."""
        stored = self.manifest["vocabulary"]
        values = {field.name: stored[field.name] for field in fields(Vocabulary)}
        values["ordinary_ranges"] = tuple((int(start), int(stop)) for start, stop in values["ordinary_ranges"])
        return Vocabulary(**values)

    @property
    def unigram_entropy(self) -> float:
        """Entropy, in nats, of the ordinary tokens of the training split: the masked-LM loss of a model that knows only frequencies."""
        return float(self.manifest["unigram_entropy"])

    @property
    def tokenizer_folder(self) -> str:
        """A local folder with the tokenizer's files; of a remote corpus, a copy that lasts as long as this process."""
        folder = self.folder / TOKENIZER
        if folder.is_local:
            return folder.url
        return _local_copy(folder, self.fingerprint).name

    def blocks(self, split: Split) -> NDArray[np.void]:
        """Records of the split's blocks."""
        num_train = int(self.manifest["counts"]["train_blocks"])
        return self.records[:num_train] if split == "train" else self.records[num_train:]

    def samples_per_block(self, split: Split, sequence_length: int) -> NDArray[np.integer]:
        """Samples of each block of the split.

        Raises:
            ConfigError: the corpus was not prepared for this sequence length.
        """
        if sequence_length not in self.sequence_lengths:
            known = ", ".join(str(length) for length in self.sequence_lengths)
            raise ConfigError(f"corpus {self.folder.name} is prepared for sequence lengths {known}, not {sequence_length}", "Prepare it again.")
        return self.blocks(split)["samples"][:, self.sequence_lengths.index(sequence_length)]

    def num_samples(self, split: Split, sequence_length: int) -> int:
        """Samples of an epoch of the split."""
        return int(self.samples_per_block(split, sequence_length).sum(dtype=np.int64))

    def read_block(self, record: np.void) -> Block:
        """Read and verify the block of a record. Raises DataCorruptError."""
        shard = str(self.manifest["shards"][int(record["shard"])]["name"])
        extent = BlockExtent(int(record["offset"]), int(record["bytes"]), int(record["checksum"]))
        return read_block(self.folder / shard, block_key(shard, int(record["number"])), extent)


def _parse(data: bytes, path: Location) -> dict[str, Any]:
    try:
        manifest: dict[str, Any] = json.loads(data)
        version = int(manifest["format_version"])
    except (ValueError, KeyError, TypeError) as error:
        raise DataCorruptError(f"{path} is not a corpus manifest: {error}", _REMEDY) from error
    if version > FORMAT_VERSION:
        raise DataCorruptError(f"{path} has format version {version}; this release reads up to {FORMAT_VERSION}", "Upgrade maskwright.")
    return manifest


def _open_records(folder: Location, manifest: dict[str, Any]) -> NDArray[np.void]:
    path = folder / INDEX
    dtype = record_dtype(len(manifest["sequence_lengths"]))
    try:
        data = np.memmap(path.url, dtype=np.uint8, mode="r") if path.is_local else np.frombuffer(path.read_bytes(), dtype=np.uint8)
    except (FileNotFoundError, NotFoundError, ValueError) as error:  # an empty file cannot be mapped
        raise DataCorruptError(f"{path} is missing or empty", _REMEDY) from error
    if hashlib.sha256(data.data).hexdigest() != manifest["digests"]["index"]:
        raise DataCorruptError(f"{path}: its digest is not the one in {MANIFEST}", _REMEDY)
    return data.view(dtype)


def _check_shards(folder: Location, manifest: dict[str, Any]) -> None:
    sizes = folder_sizes(folder)
    shards: Sequence[dict[str, Any]] = manifest["shards"]
    for shard in shards:
        found = sizes.get(shard["name"])
        if found != shard["bytes"]:
            said = "is missing" if found is None else f"has {found} bytes"
            raise DataCorruptError(f"{folder / shard['name']} {said}; {MANIFEST} says {shard['bytes']} bytes", _REMEDY)


def _check_tokenizer(folder: Location, manifest: dict[str, Any]) -> None:
    path = folder / TOKENIZER
    expected: dict[str, str] = manifest["digests"].get("tokenizer_files", {})
    found = {name: hashlib.sha256((path / name).read_bytes()).hexdigest() for name in path.children() if not name.startswith(".")}
    for name in sorted({*expected, *found}):
        if found.get(name) != expected.get(name):
            said = "is missing" if name not in found else f"is not in {MANIFEST}" if name not in expected else f"has not the digest in {MANIFEST}"
            raise DataCorruptError(f"{path / name} {said}", _REMEDY)


@cache
def _local_copy(folder: Location, fingerprint: str) -> tempfile.TemporaryDirectory[str]:
    """A private copy of the files in `folder`, of the corpus with `fingerprint`; removed when the process ends."""
    copy = tempfile.TemporaryDirectory(prefix="maskwright-tokenizer-")
    for name in folder.children():
        (Path(copy.name) / name).write_bytes((folder / name).read_bytes())
    return copy


def folder_sizes(folder: Location) -> dict[str, int]:
    """Size in bytes of every entry of a folder, from one listing."""
    filesystem, path = folder.filesystem()
    if not folder.is_local:
        filesystem.invalidate_cache(path)
    entries: list[dict[str, Any]] = filesystem.ls(path, detail=True)
    return {str(entry["name"]).rstrip("/").rsplit("/", 1)[-1]: int(entry["size"] or 0) for entry in entries}
