"""Finds the input files of a corpus and cuts them into partitions."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import fsspec
from fsspec.core import url_to_fs

from data_pipeline import python_docs
from data_pipeline.config import CorpusConfig
from data_pipeline.errors import ConfigError, NotFoundError
from data_pipeline.remote import store_errors
from data_pipeline.storage import Location

PYTHON_DOCS = "python-docs"
FORMATS = ("txt", "jsonl", "parquet")
COMPRESSIONS = {"gz": "gzip", "zst": "zstd"}

_EXPANSION = {None: 1, "gzip": 4, "zstd": 4}
_PARQUET_EXPANSION = 3
_PYTHON_DOCS_SHARE = 8  # source bytes per byte of documentation
_PYTHON_DOCS_COST = 32  # parsing a module for its documentation costs this many times as much as reading as much text
_MIN_PARTITION_BYTES = 32 << 20
_MAX_PARTITIONS = 8192


@dataclass(frozen=True)
class SourceFile:
    """One input file."""

    url: str
    name: str
    """Path within its source: what the fingerprint sees instead of where the file lies."""
    format: str
    compression: str | None
    num_bytes: int

    @property
    def text_bytes(self) -> int:
        """Estimate of its size as plain text."""
        return self.num_bytes * (_PARQUET_EXPANSION if self.format == "parquet" else _EXPANSION[self.compression])


@dataclass(frozen=True)
class Piece:
    """A file or a part of it: bytes [start, stop) of a .jsonl, row groups [start, stop) of a .parquet; stop None is the end."""

    file: SourceFile
    start: int = 0
    stop: int | None = None


@dataclass(frozen=True)
class Partition:
    """Input that one task reads: small and picklable."""

    pieces: tuple[Piece | python_docs.Partition, ...]
    text_key: str
    max_documents: int | None = None


@dataclass(frozen=True)
class Inputs:
    """Everything a corpus is made of."""

    partitions: tuple[Partition, ...]
    text_bytes: int
    """Estimated bytes of plain text; the layout of the corpus is a function of it."""


def source_names(config: CorpusConfig) -> tuple[str, ...]:
    """The configured sources as a tuple."""
    return (config.source,) if isinstance(config.source, str) else config.source


def list_files(source: str) -> list[SourceFile]:
    """Files of one source in a fixed order: itself, or what a folder holds at any depth, hidden files left out.

    Raises:
        NotFoundError: there is no such file or folder.
        UnreachableError: its store does not answer, or refuses us.
        ConfigError: a format that cannot be read, or a folder without any readable file.
    """
    location = Location.at(source)
    if not location.exists():
        raise NotFoundError(f"corpus.source {source} does not exist", "Check the path; relative paths start at the current folder.")
    with store_errors(location.url):
        return _list(location, source)


def _list(location: Location, source: str) -> list[SourceFile]:
    filesystem, root = url_to_fs(location.url)
    is_web_file = location.url.startswith(("http://", "https://")) and _format_of(location.name) is not None
    if is_web_file or filesystem.isfile(root):  # fsspec takes a web server's passing failure for a folder
        return [_source_file(filesystem, root, location.name)]
    found: list[str] = sorted(filesystem.find(root))
    names = [path[len(root) :].lstrip("/") for path in found]
    readable = [
        (path, name)
        for path, name in zip(found, names, strict=True)
        if _format_of(name) is not None and not any(part.startswith(".") for part in name.split("/"))
    ]
    if not readable:
        raise ConfigError(f"corpus.source {source} holds no .txt, .jsonl or .parquet file", "Point it at a folder of text.")
    return [_source_file(filesystem, path, name) for path, name in readable]


def list_inputs(config: CorpusConfig) -> Inputs:
    """Cut all sources into partitions. Same files and config, same partitions.

    Raises:
        NotFoundError, ConfigError: see `list_files`.
    """
    pieces: list[tuple[Piece | python_docs.Partition, int]] = []
    files = {source: [] if source == PYTHON_DOCS else list_files(source) for source in source_names(config)}
    total = sum(file.text_bytes for group in files.values() for file in group)
    target = max(_MIN_PARTITION_BYTES, total // _MAX_PARTITIONS)
    for source, group in files.items():
        if source == PYTHON_DOCS:
            parts = python_docs.list_partitions(config.max_documents)
            pieces += [(part, _source_bytes(part) // _PYTHON_DOCS_SHARE) for part in parts]
        for file in group:
            pieces += _pieces_of(file, target)
    return Inputs(_pack(pieces, target, config.text_key), sum(size for _, size in pieces))


def limit_documents(partitions: Sequence[Partition], counts: Sequence[int], max_documents: int) -> tuple[Partition, ...]:
    """The first partitions that hold `max_documents` documents, the last of them cut; pure."""
    limited: list[Partition] = []
    for partition, count in zip(partitions, counts, strict=False):
        take = min(count, max_documents)
        if take:
            limited.append(Partition(partition.pieces, partition.text_key, take))
        max_documents -= take
    return tuple(limited)


def _format_of(name: str) -> tuple[str, str | None] | None:
    stem, _, suffix = name.lower().rpartition(".")
    compression = COMPRESSIONS.get(suffix)
    if compression is not None:
        suffix = stem.rpartition(".")[2]
    if suffix not in FORMATS or (suffix == "parquet" and compression is not None):
        return None
    return suffix, compression


def _source_file(filesystem: fsspec.AbstractFileSystem, path: str, name: str) -> SourceFile:
    url = filesystem.unstrip_protocol(path)
    known = _format_of(name)
    if known is None:
        raise ConfigError(f"corpus.source {url} is in a format that cannot be read", "Use .txt, .jsonl (.gz, .zst) or .parquet.")
    return SourceFile(Location.at(url).url, name, known[0], known[1], int(filesystem.size(path) or 0))


def _pieces_of(file: SourceFile, target: int) -> list[tuple[Piece | python_docs.Partition, int]]:
    """Parts of about `target` bytes of text; only what can be entered in the middle is cut."""
    num_parts = -(-file.text_bytes // target)
    if num_parts <= 1 or file.compression is not None or file.format == "txt":
        return [(Piece(file), file.text_bytes)]
    end = file.num_bytes
    if file.format == "parquet":
        from data_pipeline.reading import count_row_groups

        end = count_row_groups(file)
    cuts = sorted({end * part // num_parts for part in range(num_parts + 1)})
    return [(Piece(file, start, stop), file.text_bytes * (stop - start) // end) for start, stop in pairwise(cuts)]


def _pack(pieces: Sequence[tuple[Piece | python_docs.Partition, int]], target: int, text_key: str) -> tuple[Partition, ...]:
    groups: list[list[Piece | python_docs.Partition]] = []
    filled = target
    for piece, size in pieces:
        cost = size * _PYTHON_DOCS_COST if isinstance(piece, python_docs.Partition) else size
        if filled + cost > target:
            groups.append([])
            filled = 0
        groups[-1].append(piece)
        filled += max(cost, 1)
    return tuple(Partition(tuple(group), text_key) for group in groups)


def _source_bytes(partition: python_docs.Partition) -> int:
    return sum(Location(path).path.stat().st_size for path in partition.paths)
