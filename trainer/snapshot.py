"""`Snapshot`, the files of one rank's part of a checkpoint as bytes in host memory, which is allocated once and used again by every save."""

import json
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

ZERO_FOLDER = "zero"
"""Where DeepSpeed's files lie in a checkpoint."""
CHUNK_BYTES = 64 << 20
PIECE_BYTES = 8 << 20
"""What is written and hashed at a time: large enough that neither holds the GIL, small enough to stop soon."""


class Snapshot:
    """Files that lie in memory one after the other. What they were made from may change as soon as `add` or `file` is done with them.

    It holds bytes rather than tensors: they are exactly what is written, so a save that runs beside training shares nothing with it, and a
    write that failed can be repeated. Memory is touched once; the second save and every later one copy into warm pages.
    """

    def __init__(self) -> None:
        self._chunks: list[bytearray] = []
        self._ends: dict[str, int] = {}
        self._at = 0

    def clear(self) -> None:
        """Forget the files, keep the memory."""
        self._ends, self._at = {}, 0

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of each file, in the order in which they were added."""
        return {name: stop - start for name, (start, stop) in zip(self._ends, pairwise([0, *self._ends.values()]), strict=True)}

    @property
    def num_bytes(self) -> int:
        """Bytes of all files."""
        return self._at

    def file(self, name: str) -> "SnapshotFile":
        """A file to write into; the one before must be complete."""
        self._ends[name] = self._at
        return SnapshotFile(self, name)

    def add(self, name: str, data: bytes) -> None:
        """A whole file."""
        self.file(name).write(data)

    def add_json(self, name: str, value: Any) -> None:
        """A whole file with `value` as JSON."""
        self.add(name, (json.dumps(value, indent=2, sort_keys=True) + "\n").encode())

    def pieces(self, name: str) -> Iterator[memoryview]:
        """The contents of a file, piece by piece, without a copy."""
        stop = self._ends[name]
        at = stop - self.sizes[name]
        while at < stop:
            number, offset = divmod(at, CHUNK_BYTES)
            num_bytes = min(PIECE_BYTES, CHUNK_BYTES - offset, stop - at)
            yield memoryview(self._chunks[number])[offset : offset + num_bytes]
            at += num_bytes

    def append(self, name: str, data: memoryview) -> None:
        """More of the file that was begun last."""
        done = 0
        while done < len(data):
            number, offset = divmod(self._at, CHUNK_BYTES)
            if number == len(self._chunks):
                self._chunks.append(bytearray(CHUNK_BYTES))
            num_bytes = min(CHUNK_BYTES - offset, len(data) - done)
            memoryview(self._chunks[number])[offset : offset + num_bytes] = data[done : done + num_bytes]
            self._at += num_bytes
            done += num_bytes
        self._ends[name] = self._at


class SnapshotFile:
    """A file of a snapshot as `torch.save` wants it: it writes in order and never seeks."""

    def __init__(self, snapshot: Snapshot, name: str) -> None:
        self._snapshot = snapshot
        self._name = name

    def write(self, data: Any) -> int:
        """Append `data`, any buffer of bytes."""
        view = memoryview(data).cast("B")
        self._snapshot.append(self._name, view)
        return len(view)

    def flush(self) -> None:
        """Nothing is held back."""
