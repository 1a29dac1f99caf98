"""The corpus' manifest and its memory-mapped index: which blocks there are, where, and how many samples each holds."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property, partial
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from data_pipeline.block_reader import BlockPlace, BlockReader
from data_pipeline.config import DataConfig
from data_pipeline.corpus_files import local_copy, read_intact, read_large
from data_pipeline.errors import ConfigError, DataCorruptError, NotFoundError
from data_pipeline.masking import Vocabulary
from data_pipeline.shards import Block, BlockExtent
from data_pipeline.storage import Location

FORMAT_VERSION = 1
MANIFEST = "corpus.json"
INDEX = "index.bin"
TOKENIZER = "tokenizer"
_REMEDY = "Restore the corpus from a copy or prepare it again."
_SHARDS_LOOKED_AT = 2000
"""Up to this many local shards are looked for when a corpus is opened. A block is always checked when it is read."""

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


def sealed(manifest: dict[str, Any]) -> dict[str, Any]:
    """The manifest with `digest`, which covers everything else in it."""
    body = {key: value for key, value in manifest.items() if key != "digest"}
    return {**body, "digest": hashlib.sha256(_canonical(body)).hexdigest()}


@dataclass(frozen=True)
class CorpusIndex:
    """An opened corpus. Pickled by its folder: a worker opens it again."""

    folder: Location
    manifest: dict[str, Any]
    fingerprint: str
    """SHA-256 of corpus.json, which names everything else by digest."""
    records: NDArray[np.void]
    settings: DataConfig = field(default_factory=DataConfig)
    """How blocks are read; decides nothing about what they are."""

    @classmethod
    def open(cls, folder: Location, settings: DataConfig | None = None) -> "CorpusIndex":
        """Open a corpus and check its version, the digests of its manifest, its index and its tokenizer's files, and the sizes of local shards.

        Nothing is listed, so a web server will do.

        Raises:
            NotFoundError: there is no prepared corpus.
            DataCorruptError: it is damaged, or was written by a newer release.
            UnreachableError: its store gave no answer in time, or refused us.
        """
        settings = settings or DataConfig()
        path = folder / MANIFEST
        try:
            data, manifest = read_intact(path, settings, partial(parse_manifest, path))
        except NotFoundError as error:
            raise NotFoundError(f"{folder} holds no prepared corpus", "Run `maskwright prepare CONFIG`.") from error
        records = open_records(folder, manifest, settings)
        if settings.on_damage == "fail":
            _check_shards(folder, manifest)
        index = cls(folder, manifest, hashlib.sha256(data).hexdigest(), records, settings)
        if folder.is_local:
            for problem in tokenizer_problems(folder, manifest, settings):
                raise DataCorruptError(problem, _REMEDY)
        else:
            _ = index.tokenizer_folder  # a verified copy
        return index

    def __reduce__(self) -> tuple[Any, ...]:
        return (_reopen, (self.folder, self.settings, self.fingerprint))

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
        digests: dict[str, str] = self.manifest["digests"]["tokenizer_files"]
        if folder.is_local:
            return folder.url
        return str(local_copy(folder, tuple(sorted(digests.items())), self.settings))  # pyright: ignore[reportArgumentType]

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
        """Read and verify the block of a record.

        Raises:
            DataCorruptError: it is damaged or its shard is missing; `shard` and `block` of the error name it.
            UnreachableError: its store gave no answer within `data.total_timeout_s`, or refused us.
        """
        return self._reader.read(self._place(record))

    def read_blocks(self, records: Iterable[np.void]) -> list[Block]:
        """The blocks of several records, read at the same time where they come from a store. Errors as `read_block` has them."""
        wanted = list(records)
        self.prefetch(wanted)
        return [self.read_block(record) for record in wanted]

    def prefetch(self, records: Iterable[np.void]) -> None:
        """Begin to read blocks that will be asked for, the soonest first; returns at once. Errors wait for `read_block`.

        Of a local corpus it does nothing. Of more than `data.read_ahead_bytes` those begun first are given up.
        """
        if not self.folder.is_local:
            self._reader.read_ahead(self._place(record) for record in records)

    @cached_property
    def _reader(self) -> BlockReader:
        return BlockReader(self.folder, self.settings)

    def _place(self, record: np.void) -> BlockPlace:
        extent = BlockExtent(int(record["offset"]), int(record["bytes"]), int(record["checksum"]))
        return BlockPlace(str(self.manifest["shards"][int(record["shard"])]["name"]), int(record["number"]), extent)


def _reopen(folder: Location, settings: DataConfig, fingerprint: str) -> CorpusIndex:
    index = CorpusIndex.open(folder, settings)
    if index.fingerprint != fingerprint:
        raise DataCorruptError(f"{folder} changed while it was in use", "Do not change a corpus; resume on the one that the run was begun with.")
    return index


def _canonical(manifest: dict[str, Any]) -> bytes:
    """What `Location.write_json` makes of it."""
    return (json.dumps(manifest, indent=2, sort_keys=True) + "\n").encode()


def parse_manifest(path: Location, data: bytes) -> dict[str, Any]:
    """The contents of corpus.json.

    Raises:
        DataCorruptError: it is damaged, or was written by a newer release.
    """
    try:
        manifest: dict[str, Any] = json.loads(data)
        version = int(manifest["format_version"])
    except (ValueError, KeyError, TypeError) as error:
        raise DataCorruptError(f"{path} is not a corpus manifest: {error}", _REMEDY) from error
    if version > FORMAT_VERSION:
        raise DataCorruptError(f"{path} has format version {version}; this release reads up to {FORMAT_VERSION}", "Upgrade maskwright.")
    if data != _canonical(sealed(manifest)):
        raise DataCorruptError(f"{path}: its contents do not match the digest in it", _REMEDY)
    return manifest


def open_records(folder: Location, manifest: dict[str, Any], settings: DataConfig) -> NDArray[np.void]:
    """The records of index.bin. Raises DataCorruptError where it is not the file that corpus.json names by digest."""
    path, digest = folder / INDEX, str(manifest["digests"]["index"])
    dtype = record_dtype(len(manifest["sequence_lengths"]))
    try:
        if not path.is_local:
            num_blocks = int(manifest["counts"]["train_blocks"]) + int(manifest["counts"]["validation_blocks"])
            return read_large(path, num_blocks * dtype.itemsize, digest, settings).view(dtype)
        data: NDArray[np.uint8] = np.memmap(path.url, dtype=np.uint8, mode="r")
    except (FileNotFoundError, ValueError) as error:  # an empty file cannot be mapped
        raise DataCorruptError(f"{path} is missing or empty", _REMEDY) from error
    if hashlib.sha256(data.data).hexdigest() != digest:
        raise DataCorruptError(f"{path}: its digest is not the one in {MANIFEST}", _REMEDY)
    return data.view(dtype)


def _check_shards(folder: Location, manifest: dict[str, Any]) -> None:
    shards: Sequence[dict[str, Any]] = manifest["shards"]
    if not folder.is_local or len(shards) > _SHARDS_LOOKED_AT:
        return
    for shard in shards:
        path = folder / shard["name"]
        try:
            found = path.path.stat().st_size
        except (FileNotFoundError, NotADirectoryError):
            found = None
        if found != shard["bytes"]:
            said = "is missing" if found is None else f"has {found} bytes"
            raise DataCorruptError(f"{path} {said}; {MANIFEST} says {shard['bytes']} bytes", _REMEDY, shard["name"])


def tokenizer_problems(folder: Location, manifest: dict[str, Any], settings: DataConfig) -> list[str]:
    """Files of the tokenizer that are not what corpus.json names by digest. Of a corpus in a store, which may not list, those it names are read."""
    path = folder / TOKENIZER
    expected: dict[str, str] = manifest["digests"].get("tokenizer_files", {})
    present = [name for name in path.children() if not name.startswith(".")] if folder.is_local else list(expected)
    problems: list[str] = []
    for name in sorted({*expected, *present}):
        try:
            found = hashlib.sha256((path / name).read_bytes(settings)).hexdigest()
        except NotFoundError:
            problems.append(f"{path / name} is missing")
            continue
        if found != expected.get(name):
            problems.append(f"{path / name} {'has not the digest in' if name in expected else 'is not in'} {MANIFEST}")
    return problems
