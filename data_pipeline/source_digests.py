"""Content digests of the sources: local files are hashed once and remembered for as long as nothing about them changes."""

import hashlib
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fsspec.core import url_to_fs

from data_pipeline import python_docs
from data_pipeline.config import CorpusConfig
from data_pipeline.errors import NotFoundError
from data_pipeline.executor import Executor
from data_pipeline.sources import PYTHON_DOCS, SourceFile, list_files, source_names
from data_pipeline.storage import Location

_GROUP_BYTES = 256 << 20
_SETTLED_NS = 2 * 10**9
"""A file changed less than this before it was hashed may change again within one tick of its file system's clock: it is not remembered."""

_Stat = list[int]
"""Size, modification time, change time and inode: the change time cannot be set by a program."""


def describe_sources(corpus: CorpusConfig, cache: Location, executor: Executor) -> list[dict[str, Any]]:
    """Name, number of files, bytes and digest of the content of each source. Local files are hashed whole; remote ones by what the store says.

    A digest does not depend on where the files lie. `cache` is a file that remembers digests of local files by path, size, times and inode.
    """
    files = {source: [] if source == PYTHON_DOCS else list_files(source) for source in source_names(corpus)}
    digests = _digests([file for group in files.values() for file in group], cache, executor)
    return [_describe(source, group, digests, corpus) for source, group in files.items()]


def _describe(source: str, files: Sequence[SourceFile], digests: dict[str, str], corpus: CorpusConfig) -> dict[str, Any]:
    if source == PYTHON_DOCS:
        return {"name": source, "files": None, "bytes": None, "digest": python_docs.fingerprint(corpus.max_documents)}
    content = [[file.name, file.num_bytes, digests[file.url]] for file in files]
    return {
        "name": Location.at(source).name,
        "files": len(files),
        "bytes": sum(file.num_bytes for file in files),
        "digest": hashlib.sha256(json.dumps(content).encode()).hexdigest(),
    }


def _digests(files: Sequence[SourceFile], cache: Location, executor: Executor) -> dict[str, str]:
    remote = [file for file in files if not Location(file.url).is_local]
    local = {file.url: file for file in files if Location(file.url).is_local}
    known = _read_cache(cache)
    valid = {url: entry["digest"] for url in local if (entry := known.get(url)) and entry["stat"] == _stat(url)}
    entries = {url: entry for group in executor.map(_hash_files, _groups(local, valid)) for url, entry in group.items()}
    settled = {url: entry for url, entry in entries.items() if entry.pop("settled")}
    if settled:
        cache.write_json({**known, **settled})
    return valid | {url: entry["digest"] for url, entry in entries.items()} | {file.url: _remote_digest(file.url) for file in remote}


def _groups(local: dict[str, SourceFile], valid: dict[str, str]) -> list[list[str]]:
    """The files to be hashed, as tasks worth starting: small files go together."""
    groups: list[list[str]] = []
    filled = _GROUP_BYTES
    for url, file in local.items():
        if url in valid:
            continue
        if filled + file.num_bytes > _GROUP_BYTES:
            groups.append([])
            filled = 0
        groups[-1].append(url)
        filled += file.num_bytes
    return groups


def _hash_files(urls: Sequence[str]) -> dict[str, dict[str, Any]]:
    return {url: _hash_file(url) for url in urls}


def _hash_file(url: str) -> dict[str, Any]:
    before, now = _stat(url), time.time_ns()
    with open(url, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"stat": before, "digest": digest, "settled": _stat(url) == before and now - max(before[1:3]) > _SETTLED_NS}


def _stat(url: str) -> _Stat:
    found = Path(url).stat()
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]


def _read_cache(cache: Location) -> dict[str, Any]:
    try:
        return cache.read_json()
    except (NotFoundError, ValueError):  # absent or damaged: everything is hashed again
        return {}


def _remote_digest(url: str) -> str:
    filesystem, path = url_to_fs(url)
    return str(filesystem.ukey(path))
