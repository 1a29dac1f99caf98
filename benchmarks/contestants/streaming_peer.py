"""MosaicML streaming, local: a column of bytes, as its token data sets are stored, iterated without shuffling.

Its guide to speed is about downloads and about reading ahead; on local shards the defaults are its fast settings, and decoding bytes is
faster than its `ndarray` encoding. `dataset[i]`, which it offers too, is read here as well; it keeps no position.
"""

import importlib.machinery
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.contestants.documents import Documents

_SHARD_BYTES = 1 << 26  # its default
_BATCH = 64


def write_bytes(documents: str, folder: str) -> None:
    """Each document as the bytes of its token ids, in MDS shards."""
    source = Documents.open(documents)
    with _streaming().MDSWriter(out=folder, columns={"ids": "bytes"}, size_limit=_SHARD_BYTES) as writer:
        for array in source:
            writer.write({"ids": array.tobytes()})
    (Path(folder) / "dtype").write_text(source.ids.dtype.str)


def read_bytes(folder: str) -> Iterator[NDArray[np.integer]]:
    """An epoch of a StreamingDataset."""
    dtype = _dtype(folder)
    return (np.frombuffer(sample["ids"], dtype) for sample in _dataset(folder))


def read_items(folder: str) -> Iterator[NDArray[np.integer]]:
    """An epoch by `dataset[i]`, in order."""
    dtype, dataset = _dtype(folder), _dataset(folder)
    return (np.frombuffer(dataset[number]["ids"], dtype) for number in range(dataset.num_samples))


def resume_bytes(folder: str, position: int) -> Iterator[NDArray[np.integer]]:
    """Continue at a document by `load_state_dict`."""
    dataset, dtype = _dataset(folder), _dtype(folder)
    state = {"epoch": 0, "sample_in_epoch": position, "num_canonical_nodes": 1, "shuffle_seed": 9176, "initial_physical_nodes": 1}
    dataset.load_state_dict(state)
    return (np.frombuffer(sample["ids"], dtype) for sample in dataset)


def _dataset(folder: str) -> Any:
    return _streaming().StreamingDataset(local=folder, shuffle=False, batch_size=_BATCH, num_canonical_nodes=1)


def _dtype(folder: str) -> np.dtype[Any]:
    return np.dtype((Path(folder) / "dtype").read_text())


def _streaming() -> Any:
    """The library. It imports torchvision for its image data sets, and a torchvision built for another torch (CUDA's beside the CPU's) fails."""
    import transformers  # noqa: F401 -- looks at torchvision as well: before it is replaced

    try:
        import torchvision  # noqa: F401
    except Exception:  # noqa: BLE001 -- whatever a foreign binary raises; text needs none of it
        for name in ("torchvision", "torchvision.datasets", "torchvision.transforms", "torchvision.transforms.functional"):
            sys.modules[name] = _Empty(name)
    import streaming

    return streaming


class _Empty(ModuleType):
    """A module in which every name is an empty class."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__path__ = []
        self.__spec__ = importlib.machinery.ModuleSpec(name, None)

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


if "streaming" not in sys.modules:
    _streaming()  # imports are not part of what is timed
