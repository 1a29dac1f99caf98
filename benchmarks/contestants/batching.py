"""Child's side of `data_batches`: finished batches as tensors, ours and on each peer's reader."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.children import Measurement, timed_rate
from benchmarks.contestants.documents import TOKENIZER, Documents
from benchmarks.contestants.hugging_face import batches, make_collator
from benchmarks.contestants.peers import load

BATCH = 64
LANES = 4
"""Micro-batches of a step: as many lanes take turns."""
_STEPS = 1_000_000

Counts = Iterator[dict[str, int]]


def ours(folder: str, sequence_length: int, packing: str, seconds: float) -> Measurement:
    """`MicroBatchStream[n]` to tensors."""
    return timed_rate(our_batches(folder, sequence_length, packing, share=0.0), seconds)


def hugging_face(reader: str, data: str, documents: str, sequence_length: int, seconds: float) -> Measurement:
    """A peer's reader, plain Python and the Hugging Face collator."""
    collate = make_collator(f"{documents}/{TOKENIZER}")
    return timed_rate(hugging_face_batches(_epochs(reader, data), collate, documents, sequence_length), seconds)


def our_masking(reader: str, data: str, documents: str, sequence_length: int, seconds: float) -> Measurement:
    """A peer's reader with our pairing, masking and packing."""
    return timed_rate(_our_masking_batches(_epochs(reader, data), documents, sequence_length), seconds)


def our_batches(folder: str, sequence_length: int, packing: str, share: float) -> Counts:
    """Batches from `share` of the first epoch on."""
    from data_pipeline.config import BatchConfig, ObjectiveConfig
    from data_pipeline.index import CorpusIndex
    from data_pipeline.storage import Location
    from data_pipeline.stream import MicroBatchStream
    from trainer.batch import tensor_batches

    shape = BatchConfig(global_batch_size=LANES * BATCH, micro_batch_size=BATCH, sequence_length=sequence_length)
    index = CorpusIndex.open(Location.at(folder))
    stream = MicroBatchStream(index, ObjectiveConfig(), shape.phases_until(_STEPS), seed=0, packing=packing)
    for number in range(int(index.num_samples("train", sequence_length) * share) // BATCH, len(stream)):
        batch = stream[number]
        tensor_batches(batch)
        yield {"samples": batch.num_samples, "tokens": batch.num_tokens}


def hugging_face_batches(arrays: Iterator[NDArray[np.integer]], collate: Any, documents: str, sequence_length: int) -> Counts:
    """Batches of the Hugging Face collator."""
    vocabulary = Documents.open(documents).vocabulary
    for batch in batches(arrays, collate, vocabulary, sequence_length, BATCH):
        yield {"samples": len(batch["input_ids"]), "tokens": int(batch["attention_mask"].sum())}


def _our_masking_batches(arrays: Iterator[NDArray[np.integer]], documents: str, sequence_length: int) -> Counts:
    from benchmarks.contestants import assembly
    from trainer.batch import tensor_batches

    for batch in assembly.batches(arrays, Documents.open(documents).vocabulary, sequence_length, BATCH):
        tensor_batches(batch)
        yield {"samples": batch.num_samples, "tokens": batch.num_tokens}


def _epochs(reader: str, data: str) -> Iterator[NDArray[np.integer]]:
    read = load(reader)
    while True:
        yield from read(data)
