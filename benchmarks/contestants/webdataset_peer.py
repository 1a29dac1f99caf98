"""Stock webdataset with one sample per document: .npy members that `.decode()` turns into arrays, or raw bytes."""

import io
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import webdataset
from numpy.typing import NDArray

from benchmarks.contestants.documents import Documents

_DOCUMENTS_PER_SHARD = 10_000


def write_npy(documents: str, folder: str) -> None:
    """Each document as a member `.ids.npy`."""
    _write(documents, folder, "ids.npy", _npy)


def write_raw(documents: str, folder: str) -> None:
    """Each document as the bytes of its token ids."""
    _write(documents, folder, "ids.bin", lambda array: array.tobytes())


def read_npy(folder: str) -> Iterator[NDArray[np.integer]]:
    """An epoch, decoded by webdataset."""
    return (sample["ids.npy"] for sample in webdataset.WebDataset(shards(folder), shardshuffle=False).decode())


def read_raw(folder: str) -> Iterator[NDArray[np.integer]]:
    """An epoch of raw bytes, viewed as arrays."""
    dtype = np.dtype((Path(folder) / "dtype").read_text())
    return (np.frombuffer(sample["ids.bin"], dtype) for sample in webdataset.WebDataset(shards(folder), shardshuffle=False))


def resume_raw(folder: str, position: int) -> Iterator[NDArray[np.integer]]:
    """webdataset keeps no position: the samples before it are read and dropped."""
    remaining = read_raw(folder)
    for _ in range(position):
        next(remaining)
    return remaining


def shards(folder: str) -> list[str]:
    """The tars of a data set, in order."""
    return sorted(str(path) for path in Path(folder).glob("*.tar"))


def _write(documents: str, folder: str, member: str, encode: Callable[[NDArray[np.integer]], bytes]) -> None:
    Path(folder).mkdir(parents=True)
    source = Documents.open(documents)
    with webdataset.ShardWriter(f"{folder}/%06d.tar", maxcount=_DOCUMENTS_PER_SHARD, maxsize=1 << 30, verbose=0, encoder=False) as writer:
        for number, array in enumerate(source):
            writer.write({"__key__": f"{number:09d}", member: encode(array)})
    (Path(folder) / "dtype").write_text(source.ids.dtype.str)


def _npy(array: NDArray[np.integer]) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()
