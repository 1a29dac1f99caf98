"""Documents on disk between the passes of `prepare`: grouped by hash partition, so that a partition is read by ranges."""

import hashlib
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from data_pipeline.storage import Location

SPILL_BYTES = 32 << 20
"""Text held in memory before it is written."""
_RECORD = struct.Struct("<16s8sI")  # key, split hash, bytes of UTF-8 text


@dataclass(frozen=True)
class Document:
    """A cleaned document with its place in the global shuffle."""

    key: bytes
    split_hash: int
    """Documents below the threshold are held out for validation."""
    text: str


class SpillWriter:
    """Gathers documents and writes them, grouped by partition, whenever SPILL_BYTES are full."""

    def __init__(self, folder: Location, prefix: str, seed: int, num_partitions: int) -> None:
        self.names: list[str] = []
        """Files written."""
        self.smallest_split_hash = 2**64 - 1
        self.num_bytes = 0
        """Bytes of text added."""
        self._folder, self._prefix, self._num_partitions = folder, prefix, num_partitions
        self._key = seed.to_bytes(8, "little")
        self._clear()

    def _clear(self) -> None:
        self._groups = [bytearray() for _ in range(self._num_partitions)]
        self._pending = 0

    def add(self, text: str) -> None:
        """Add a document; its 128-bit keyed hash is its identity and its place."""
        data = text.encode()
        key = hashlib.blake2b(data, digest_size=16, key=self._key, person=b"shuffle").digest()
        split = hashlib.blake2b(data, digest_size=8, key=self._key, person=b"split").digest()
        self.smallest_split_hash = min(self.smallest_split_hash, int.from_bytes(split, "big"))
        group = self._groups[_partition_of(key, self._num_partitions)]
        group += _RECORD.pack(key, split, len(data))
        group += data
        self.num_bytes += len(data)
        self._pending += len(data)
        if self._pending >= SPILL_BYTES:
            self.flush()

    def flush(self) -> None:
        """Write what is pending."""
        if self._pending:
            self.names.append(f"{self._prefix}-{len(self.names):04d}.bin")
            write_groups(self._folder / self.names[-1], self._groups)
            self._clear()


def read_spill(path: Location, number: int, num_partitions: int) -> Iterator[Document]:
    """The documents of one partition in a file, in the order in which they were added."""
    data = read_group(path, number, num_partitions)
    offset = 0
    while offset < len(data):
        key, split, size = _RECORD.unpack_from(data, offset)
        offset += _RECORD.size
        yield Document(key, int.from_bytes(split, "big"), data[offset : offset + size].decode())
        offset += size


def write_groups(path: Location, groups: Sequence[bytes | bytearray | memoryview]) -> None:
    """Write byte strings one after the other behind a table of where each ends."""
    ends = np.cumsum([0, *map(len, groups)]).astype("<u8")
    path.write_bytes(b"".join([ends.tobytes(), *groups]))


def read_group(path: Location, number: int, num_groups: int) -> bytes:
    """One of the byte strings of `write_groups`."""
    table_bytes = 8 * (num_groups + 1)
    bounds: Any = np.frombuffer(path.read_range(8 * number, 8 * number + 16), dtype="<u8").tolist()
    start, stop = bounds
    return path.read_range(table_bytes + start, table_bytes + stop) if stop > start else b""


def _partition_of(key: bytes, num_partitions: int) -> int:
    """By the key's top bits, so that partition after partition is ascending in the key."""
    return int.from_bytes(key[:8], "big") * num_partitions >> 64
