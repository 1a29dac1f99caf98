"""Child's side of `data_read`: epoch after epoch of documents from a peer's reader, or of blocks through our index."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from benchmarks.children import Measurement, timed_rate

_STEP = 64


def peer(reader: str, folder: str, seconds: float) -> Measurement:
    """Documents and bytes of token ids by second; `reader` is `module:function` of a folder."""
    from benchmarks.contestants.peers import load

    return timed_rate(_documents(load(reader), folder), seconds)


def ours(folder: str, seconds: float) -> Measurement:
    """The same through `CorpusIndex.read_block`, blocks in random order, as an epoch has them, and each checked against its digest."""
    return timed_rate(_blocks(folder), seconds)


def _documents(read: Any, folder: str) -> Iterator[dict[str, int]]:
    while True:
        documents = num_bytes = 0
        for array in read(folder):
            documents += 1
            num_bytes += array.nbytes
            if documents == _STEP:
                yield {"documents": documents, "bytes": num_bytes}
                documents = num_bytes = 0


def _blocks(folder: str) -> Iterator[dict[str, int]]:
    from data_pipeline.index import CorpusIndex
    from data_pipeline.storage import Location

    index = CorpusIndex.open(Location.at(folder))
    records = index.blocks("train")
    epoch = 0
    while True:
        for number in np.random.default_rng(epoch).permutation(len(records)):
            block = index.read_block(records[number])
            yield {"documents": len(block.document_ends), "bytes": block.ids.nbytes}
        epoch += 1
