"""What a node does with the storage and sees of a corpus when doctor asks (runs on the node; reads and writes storage)."""

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from statistics import median

from data_pipeline.config import DataConfig
from data_pipeline.errors import MaskwrightError, NotFoundError, StorageError
from data_pipeline.storage import Location, storage_errors
from launcher.measurements import Read, ShardLook, Written

WRITES = 5
_POLL_S = 0.1
_CLAIM = "claim"
_AT_ONCE = 16
_SETTINGS = DataConfig(read_timeout_s=10.0, total_timeout_s=30.0)


TRIAL = ".doctor-"
"""How the names of folders begin that a storage is tried with."""


def make_root(storage: str) -> None:
    """Make a storage that is a folder, on one machine only: elsewhere it then shows by being mounted, and nothing is made in its place."""
    root = Location(storage)
    if root.is_local:
        with storage_errors(storage):
            root.path.mkdir(parents=True, exist_ok=True)


def write_words(folder: str, node: str, word: str) -> Written:
    """Write this node's file some times over, the last time with `word`, and try to create the file that one node may create.

    Raises:
        StorageError: there is no such storage here. Also StorageUnreachableError: see `Location.write_bytes`.
    """
    root = Location(folder).parent
    if root.is_local and not root.path.is_dir():
        raise StorageError(f"there is no folder {root} here", "Mount the storage.")
    file, seconds = Location(folder) / node, list[float]()
    for nth in reversed(range(WRITES)):
        started_at = time.perf_counter()
        file.write_bytes(f"{word} {nth}".encode())
        seconds.append(time.perf_counter() - started_at)
    return Written(median(seconds), (Location(folder) / _CLAIM).claim(f"{node} {word}".encode()))


def read_words(folder: str, words: Mapping[str, str], patience_s: float) -> Read:
    """Look for the last words that nodes have written, for `patience_s` seconds in all: network file systems show them late.

    Raises:
        UnreachableError: see `Location.read_bytes`.
    """
    deadline, seconds, missing = time.monotonic() + patience_s, list[float](), dict(words)
    while True:
        for node, word in list(missing.items()):
            started_at = time.perf_counter()
            with suppress(NotFoundError):
                if (Location(folder) / node).read_bytes() == f"{word} 0".encode():
                    seconds.append(time.perf_counter() - started_at)
                    del missing[node]
        if not missing or time.monotonic() > deadline:
            return Read(median(seconds or [0.0]), tuple(node for node in words if node not in missing), tuple(missing))
        time.sleep(_POLL_S)


def remove_words(folder: str) -> None:
    """Remove everything again; nodes that do so at the same time do not disturb each other."""
    with suppress(MaskwrightError, OSError):
        Location(folder).remove()


def assert_removed(folder: str) -> None:
    """Remove what is left, if anything is.

    Raises:
        StorageError, StorageUnreachableError: it stays.
    """
    if Location(folder).exists():
        Location(folder).remove()


def look_at_shards(folder: str, shards: Sequence[tuple[str, int]]) -> ShardLook:
    """Read the last byte of shards, and whether another follows: the file is there, can be read, and is as long as the corpus says."""
    with ThreadPoolExecutor(_AT_ONCE) as threads:
        causes = threads.map(partial(_problem, Location(folder)), shards)
        return ShardLook(len(shards), {name: cause for (name, _), cause in zip(shards, causes, strict=True) if cause})


def _problem(folder: Location, shard: tuple[str, int]) -> str:
    name, num_bytes = shard
    try:
        end = (folder / name).read_range(num_bytes - 1, num_bytes + 1, _SETTINGS)
    except FileNotFoundError:
        return "is missing"
    except (MaskwrightError, OSError) as error:
        return f"cannot be read: {error.cause if isinstance(error, MaskwrightError) else error}"
    return "" if len(end) == 1 else f"is {'longer' if end else 'shorter'} than the {num_bytes:,} bytes that the corpus says"


def shards_of(corpus: Location) -> list[tuple[str, int]]:
    """Names below the corpus' parent folder, and bytes, of all shards of a corpus, or of those of a mixture.

    Raises:
        NotFoundError: the folder holds neither. DataCorruptError: a manifest is damaged.
    """
    from data_pipeline.index import MANIFEST, parse_manifest

    found: list[tuple[str, int]] = []
    for folder in _corpora_in(corpus):
        manifest = parse_manifest(folder / MANIFEST, (folder / MANIFEST).read_bytes())
        found += [(f"{folder.name}/{shard['name']}", int(shard["bytes"])) for shard in manifest["shards"]]
    return found


def _corpora_in(folder: Location) -> list[Location]:
    from data_pipeline.index import MANIFEST
    from data_pipeline.mixture import MIXTURE

    if (folder / MIXTURE).exists():
        return [folder.parent / part["corpus"] for part in (folder / MIXTURE).read_json()["corpora"]]
    if not (folder / MANIFEST).exists():
        raise NotFoundError(f"{folder} holds no prepared corpus", "Give the folder or URL of a corpus, as `maskwright prepare` names it.")
    return [folder]
