"""The last pass of `prepare` over one hash partition: documents in shuffled order become sentences, token ids, blocks and shards."""

import hashlib
import io
from collections.abc import Iterator, Sequence
from dataclasses import fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipeline.chunks import IntArray, cut_chunks
from data_pipeline.encoding import EncodedDocuments, Encoder
from data_pipeline.index import record_dtype
from data_pipeline.partitions import Job, Receipt, batches, kept_documents
from data_pipeline.shards import Block, write_shard
from data_pipeline.stopwatch import Stopwatch
from data_pipeline.text import split_sentences

_PART_TOKENS = 8 << 10
"""Stretch of a document that stays in one block."""


def encode_partition(job: Job, spills: Sequence[str], threshold: int, number: int) -> Receipt:
    """Shuffle, de-duplicate, split, encode and write the shards of a hash partition."""
    receipt = job.work / f"encode-{number:06d}.json"
    if receipt.exists():
        return receipt.read_json()
    watch = Stopwatch()
    with watch("shuffle"):
        documents, num_duplicates = kept_documents(job, spills, number)
        encoder = Encoder.load(job.folder / "tokenizer")
    result: Receipt = {"duplicates": num_duplicates, "splits": {}}
    for split in ("train", "validation"):
        chosen = [document.text for document in documents if (document.split_hash < threshold) == (split == "validation")]
        result["splits"][split] = _write_split(job, f"{split}-{number:06d}.tar", encoder, chosen, watch)
    result["seconds"] = watch.seconds
    receipt.write_json(result)
    return result


def load_tables(job: Job, shard: str) -> tuple[NDArray[np.void], NDArray[np.int64]]:
    """The index records and the token counts that go with a shard."""
    buffer = io.BytesIO((job.work / f"{shard}.tables").read_bytes())
    records = np.lib.format.read_array(buffer, allow_pickle=False)
    return records, np.lib.format.read_array(buffer, allow_pickle=False)


def _write_split(job: Job, shard: str, encoder: Encoder, texts: list[str], watch: Stopwatch) -> Receipt:
    encoded = _encode(encoder, texts, watch)
    num_documents = len(encoded.document_lengths)
    result: Receipt = {
        "documents": num_documents,
        "without_tokens": len(texts) - num_documents,
        "single_sentence_documents": int(np.count_nonzero(encoded.document_lengths == 1)),
        "tokens": len(encoded.ids),
        "sentences": len(encoded.sentence_lengths),
        "pairs": [0] * len(job.sequence_lengths),
        "shard": None,
    }
    if not num_documents:
        return result
    with watch("blocks"):
        blocks = list(cut_blocks(encoded, job.block_tokens))
        chunks = [[cut_chunks(block.sentence_ends, block.document_ends, length) for length in job.sequence_lengths] for block in blocks]
        result["pairs"] = np.sum([[np.count_nonzero(each.stop_piece - each.first_piece > 1) for each in row] for row in chunks], axis=0).tolist()
        token_counts = np.bincount(encoded.ids, minlength=encoder.vocabulary_size)
    with watch("write"):
        data, extents = write_shard(shard, blocks)
        records = np.zeros(len(blocks), dtype=record_dtype(len(job.sequence_lengths)))
        for number, (block, extent) in enumerate(zip(blocks, extents, strict=True)):
            place = (extent.offset, extent.checksum, 0, number, extent.num_bytes)
            records[number] = (*place, len(block.ids), len(block.document_ends), [len(each) for each in chunks[number]])
        (job.folder / shard).write_bytes(data)
        (job.work / f"{shard}.tables").write_bytes(_arrays_to_bytes(records, token_counts))
        result["shard"] = {"name": shard, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    return result


def _encode(encoder: Encoder, texts: list[str], watch: Stopwatch) -> EncodedDocuments:
    parts: list[EncodedDocuments] = [encoder.encode(())]
    for batch in batches(texts):
        with watch("sentences"):
            split = list(map(split_sentences, batch))
        with watch("encode"):
            parts.append(encoder.encode(split))
    return EncodedDocuments(*(np.concatenate([getattr(part, field.name) for part in parts]) for field in fields(EncodedDocuments)))


def cut_blocks(encoded: EncodedDocuments, block_tokens: int) -> Iterator[Block]:
    """Whole documents until a block holds `block_tokens`; a block is exceeded by at most its last document.

    A document of more than `_PART_TOKENS` may go on in the next block, where it counts as another one: blocks of nearly one size keep memory
    bounded and micro-batches of equal numbers of tokens.
    """
    token_ends = np.concatenate([[0], np.cumsum(encoded.sentence_lengths)])
    ends, ends_document = _stops(encoded.document_lengths, token_ends, min(block_tokens, _PART_TOKENS))
    tokens = np.concatenate([[0], token_ends[ends]])  # before each stretch
    sentences = np.concatenate([[0], ends])
    start = 0
    while start < len(ends):
        stop = min(int(np.searchsorted(tokens, tokens[start] + block_tokens)), len(ends))
        is_end = ends_document[start:stop].copy()
        is_end[-1] = True
        yield Block(
            encoded.ids[tokens[start] : tokens[stop]],
            (token_ends[sentences[start] + 1 : sentences[stop] + 1] - tokens[start]).astype("<u4"),
            (ends[start:stop][is_end] - sentences[start]).astype("<u4"),
        )
        start = stop


def _stops(document_lengths: IntArray, token_ends: IntArray, part_tokens: int) -> tuple[IntArray, NDArray[np.bool_]]:
    """Where a block may end, as cumulative sentences, and whether a document ends there, too: inside documents after every `part_tokens`."""
    first_sentence = np.cumsum(document_lengths) - document_lengths
    document = np.repeat(np.arange(len(document_lengths)), document_lengths)
    part = (token_ends[:-1] - token_ends[first_sentence][document]) // part_tokens
    ends_document = np.diff(document, append=len(document_lengths)) > 0
    stops = np.flatnonzero(ends_document | (np.diff(part, append=0) > 0))
    return stops + 1, ends_document[stops]


def _arrays_to_bytes(*arrays: NDArray[Any]) -> bytes:
    buffer = io.BytesIO()
    for array in arrays:
        np.lib.format.write_array(buffer, array, allow_pickle=False)
    return buffer.getvalue()
