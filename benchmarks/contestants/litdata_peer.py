"""litdata, local: each document as bytes, the fastest item it stores (memory-mapped in place, decoded some hundreds at a time by default).

Its TokensLoader is no faster by token and keeps no documents: sentence pairs cannot be made from what it returns.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import litdata
import numpy as np
from numpy.typing import NDArray

from benchmarks.contestants.documents import Documents

_CHUNK_BYTES = "64MB"
_BATCH = 64


def write_bytes(documents: str, folder: str) -> None:
    """Each document as the bytes of its token ids."""
    litdata.optimize(fn=_items, inputs=[documents], output_dir=folder, chunk_bytes=_CHUNK_BYTES, num_workers=1)
    _write_dtype(documents, folder)


def write_arrays(documents: str, folder: str) -> None:
    """Each document as an array of token ids."""
    litdata.optimize(fn=_arrays, inputs=[documents], output_dir=folder, chunk_bytes=_CHUNK_BYTES, num_workers=1)
    _write_dtype(documents, folder)


def read_bytes(folder: str) -> Iterator[NDArray[np.integer]]:
    """An epoch of a StreamingDataset."""
    dtype = _dtype(folder)
    return (np.frombuffer(item, dtype) for item in litdata.StreamingDataset(folder, shuffle=False))


def read_arrays(folder: str) -> Iterator[NDArray[np.integer]]:
    """An epoch of a StreamingDataset of arrays."""
    return iter(litdata.StreamingDataset(folder, shuffle=False))


def resume_bytes(folder: str, position: int) -> Iterator[NDArray[np.integer]]:
    """Continue at a document by the loader's `load_state_dict`; the state is what its `state_dict` says after `position` documents."""
    dataset = litdata.StreamingDataset(folder, shuffle=False)
    loader = litdata.StreamingDataLoader(dataset, batch_size=_BATCH, num_workers=0, collate_fn=list)
    if position:
        state = dataset.state_dict(num_samples_yielded=position, num_workers=0, batch_size=_BATCH)
        loader.load_state_dict({"dataset": state, "current_epoch": 1, "num_samples_yielded": position, "latest_worker_idx": 0})
    dtype = _dtype(folder)
    return (np.frombuffer(item, dtype) for batch in loader for item in batch)


def _items(documents: str) -> Iterator[bytes]:
    for array in Documents.open(documents):
        yield array.tobytes()


def _arrays(documents: str) -> Iterator[NDArray[np.integer]]:
    for array in Documents.open(documents):
        yield np.array(array)


def _write_dtype(documents: str, folder: str) -> None:
    (Path(folder) / "dtype").write_text(Documents.open(documents).ids.dtype.str)


def _dtype(folder: str) -> np.dtype[Any]:
    return np.dtype((Path(folder) / "dtype").read_text())
