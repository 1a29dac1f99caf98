"""A peer's documents to batches with our own pairing, masking and packing: what our arrays buy without our reader."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipeline.chunks import IntArray, cut_chunks
from data_pipeline.hashing import mix64
from data_pipeline.masking import Masking, Vocabulary, mask_tokens
from data_pipeline.micro_batch import MicroBatch
from data_pipeline.order import WINDOW_SAMPLES
from data_pipeline.packing import LAYOUTS
from data_pipeline.pairs import make_samples
from data_pipeline.window import finish

MASK_RATE = 0.15
_FILL = 0.6
"""Share of a row that a sample fills, roughly: windows of documents are to hold about as many samples as ours."""


def batches(documents: Iterator[NDArray[np.integer]], vocabulary: dict[str, Any], sequence_length: int, batch_size: int) -> Iterator[MicroBatch]:
    """Unpadded micro-batches of windows of documents, each shuffled."""
    known = vocabulary_from(vocabulary)
    choose = partial(mask_tokens, masking=Masking.of(known, MASK_RATE))
    for number, window in enumerate(windows(documents, int(WINDOW_SAMPLES * sequence_length * _FILL))):
        tokens, sentence_ends, document_ends = without_separators(window, known.sep)
        chunks = cut_chunks(sentence_ends, document_ends, sequence_length)
        samples = make_samples(chunks, mix64(number, np.arange(len(chunks))), sequence_length, "nsp")
        finished = finish(tokens, samples[np.argsort(samples.keys, kind="stable")], known, choose)
        for start in range(0, len(finished) - batch_size + 1, batch_size):
            part = finished[start : start + batch_size]
            yield MicroBatch(start, part, LAYOUTS["unpadded"](part.lengths, sequence_length), known.pad)


def vocabulary_from(fields: dict[str, Any]) -> Vocabulary:
    """A vocabulary from what the neutral form keeps of it."""
    return Vocabulary(**{**fields, "ordinary_ranges": tuple((int(start), int(stop)) for start, stop in fields["ordinary_ranges"])})


def without_separators(documents: list[NDArray[np.integer]], sep: int) -> tuple[NDArray[np.integer], IntArray, IntArray]:
    """(token ids, cumulative tokens by sentence, cumulative sentences by document) of some documents; pure."""
    joined = np.concatenate(documents)
    is_end = joined == sep
    at = np.flatnonzero(is_end)
    last = np.cumsum([len(document) for document in documents]) - 1
    return joined[~is_end], at - np.arange(len(at)), np.searchsorted(at, last, side="right")


def windows(documents: Iterator[NDArray[np.integer]], num_tokens: int) -> Iterator[list[NDArray[np.integer]]]:
    """Whole documents until a window holds `num_tokens`; pure."""
    window: list[NDArray[np.integer]] = []
    held = 0
    for array in documents:
        window.append(array)
        held += len(array)
        if held >= num_tokens:
            yield window
            window, held = [], 0
    if window:
        yield window
