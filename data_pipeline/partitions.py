"""The two passes of `prepare` as functions of one partition each: read and spill by hash, then shuffle, de-duplicate, encode.

Pass 1 cleans documents and spills them, with a 128-bit keyed hash of their text, into hash partitions. Pass 2 takes one hash partition:
sorting by the hash is the global shuffle, equal hashes are duplicates. Each task leaves a receipt, written last, and returns it at once
when it is already there; so a run that was killed continues, and results depend neither on workers nor on order.
"""

import hashlib
import io
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipeline.chunks import cut_chunks
from data_pipeline.encoding import EncodedDocuments, Encoder
from data_pipeline.index import record_dtype
from data_pipeline.reading import read_documents
from data_pipeline.shards import Block, write_shard
from data_pipeline.sources import Partition
from data_pipeline.storage import Location
from data_pipeline.text import clean_document

WORK = "work"
_RECORD = struct.Struct("<16s8sI")  # key, split hash, bytes of UTF-8 text
_SPILL_BYTES = 64 << 20
_ENCODE_DOCUMENTS = 512

Receipt = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """What every task knows. Picklable."""

    folder: Location
    """The corpus folder."""
    seed: int
    num_partitions: int
    """Hash partitions."""
    block_tokens: int
    sequence_lengths: tuple[int, ...]

    @property
    def work(self) -> Location:
        """Working files, removed when the corpus is complete."""
        return self.folder / WORK


@dataclass(frozen=True)
class Document:
    """A cleaned document with its place in the global shuffle."""

    key: bytes
    split_hash: int
    """Documents below the threshold are held out for validation."""
    text: str


def read_partition(job: Job, numbered: tuple[int, Partition]) -> Receipt:
    """Pass 1: clean the documents of an input partition and spill them by hash. Memory holds one spill's worth of text."""
    number, partition = numbered
    receipt = job.work / f"read-{number:06d}.json"
    if receipt.exists():
        return receipt.read_json()
    counts = {"documents": 0, "empty": 0, "bytes": 0}
    smallest = 2**64 - 1
    spills: list[str] = []
    for batch in _batches(_cleaned(partition, counts), _SPILL_BYTES):
        name = f"spill-{number:06d}-{len(spills):04d}.bin"
        smallest = min(smallest, *(_spill(job, name, batch)))
        spills.append(name)
    result = {**counts, "smallest_split_hash": smallest, "spills": spills}
    receipt.write_json(result)
    return result


def load_partition(job: Job, spills: Sequence[str], number: int) -> tuple[list[Document], int]:
    """The distinct documents of a hash partition in shuffled order, and how many duplicates were dropped."""
    documents: dict[bytes, Document] = {}
    num_read = 0
    for name in spills:
        for document in _load_spill(job.work / name, job.num_partitions, number):
            num_read += 1
            documents[document.key] = document
    return [documents[key] for key in sorted(documents)], num_read - len(documents)


def encode_partition(job: Job, spills: Sequence[str], threshold: int, number: int) -> Receipt:
    """Pass 2: shuffle, de-duplicate, split, encode and write the shards of a hash partition."""
    receipt = job.work / f"encode-{number:06d}.json"
    if receipt.exists():
        return receipt.read_json()
    documents, num_duplicates = load_partition(job, spills, number)
    encoder = Encoder.load(job.folder / "tokenizer")
    result: Receipt = {"duplicates": num_duplicates, "splits": {}}
    for split in ("train", "validation"):
        chosen = (document.text for document in documents if (document.split_hash < threshold) == (split == "validation"))
        result["splits"][split] = _write_split(job, f"{split}-{number:06d}.tar", encoder, chosen)
    receipt.write_json(result)
    return result


def load_tables(job: Job, shard: str) -> tuple[NDArray[np.void], NDArray[np.int64]]:
    """The index records and the token counts that go with a shard."""
    buffer = io.BytesIO((job.work / f"{shard}.tables").read_bytes())
    records = np.lib.format.read_array(buffer, allow_pickle=False)
    return records, np.lib.format.read_array(buffer, allow_pickle=False)


def _write_split(job: Job, shard: str, encoder: Encoder, texts: Iterable[str]) -> Receipt:
    counts = {"documents": 0, "without_tokens": 0, "single_sentence_documents": 0, "tokens": 0, "sentences": 0}
    pairs = dict.fromkeys(job.sequence_lengths, 0)
    token_counts = np.zeros(encoder.vocabulary_size, dtype=np.int64)
    blocks: list[Block] = []
    samples: list[list[int]] = []
    for block in _blocks(_encoded(encoder, texts, counts), job.block_tokens, encoder.dtype):
        blocks.append(block)
        chunks = [cut_chunks(block.sentence_ends, block.document_ends, length) for length in job.sequence_lengths]
        samples.append([len(each) for each in chunks])
        for length, each in zip(job.sequence_lengths, chunks, strict=True):
            pairs[length] += int(np.count_nonzero(each.stop_piece - each.first_piece > 1))
        token_counts += np.bincount(block.ids, minlength=len(token_counts))
    counts["documents"] = sum(len(block.document_ends) for block in blocks)
    counts["tokens"] = sum(len(block.ids) for block in blocks)
    counts["sentences"] = sum(len(block.sentence_ends) for block in blocks)
    result: Receipt = {**counts, "pairs": [pairs[length] for length in job.sequence_lengths], "shard": None}
    if blocks:
        data, extents = write_shard(shard, blocks)
        records = np.zeros(len(blocks), dtype=record_dtype(len(job.sequence_lengths)))
        for number, (block, extent) in enumerate(zip(blocks, extents, strict=True)):
            place = (extent.offset, extent.checksum, 0, number, extent.num_bytes)
            records[number] = (*place, len(block.ids), len(block.document_ends), samples[number])
        (job.folder / shard).write_bytes(data)
        (job.work / f"{shard}.tables").write_bytes(_arrays_to_bytes(records, token_counts))
        result["shard"] = {"name": shard, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    return result


def _encoded(encoder: Encoder, texts: Iterable[str], counts: dict[str, int]) -> Iterator[EncodedDocuments]:
    remaining = iter(texts)
    while batch := list(islice(remaining, _ENCODE_DOCUMENTS)):
        encoded = encoder.encode(batch)
        counts["without_tokens"] += len(batch) - len(encoded)
        counts["single_sentence_documents"] += sum(len(sentences) == 1 for sentences in encoded)
        yield encoded


def _blocks(batches: Iterable[EncodedDocuments], block_tokens: int, dtype: np.dtype[Any]) -> Iterator[Block]:
    """Whole documents until a block holds `block_tokens`; a block is exceeded by at most its last document."""
    documents: EncodedDocuments = []
    num_tokens = 0
    for document in (document for batch in batches for document in batch):
        documents.append(document)
        num_tokens += sum(map(len, document))
        if num_tokens >= block_tokens:
            yield _block(documents, dtype)
            documents, num_tokens = [], 0
    if documents:
        yield _block(documents, dtype)


def _block(documents: EncodedDocuments, dtype: np.dtype[Any]) -> Block:
    sentences = [sentence for document in documents for sentence in document]
    ids = np.fromiter(chain.from_iterable(sentences), dtype=dtype)
    sentence_ends = np.cumsum([len(sentence) for sentence in sentences]).astype("<u4")
    document_ends = np.cumsum([len(document) for document in documents]).astype("<u4")
    return Block(ids, sentence_ends, document_ends)


def _cleaned(partition: Partition, counts: dict[str, int]) -> Iterator[str]:
    for raw in read_documents(partition):
        text = clean_document(raw)
        counts["documents"] += 1
        counts["bytes"] += len(text.encode())
        if text:
            yield text
        else:
            counts["empty"] += 1


def _batches(texts: Iterable[str], max_characters: int) -> Iterator[list[str]]:
    batch: list[str] = []
    num_characters = 0
    for text in texts:
        batch.append(text)
        num_characters += len(text)
        if num_characters >= max_characters:
            yield batch
            batch, num_characters = [], 0
    if batch:
        yield batch


def _spill(job: Job, name: str, texts: Sequence[str]) -> list[int]:
    """Write documents grouped by hash partition behind a table of offsets; return their split hashes."""
    groups: list[list[bytes]] = [[] for _ in range(job.num_partitions)]
    seed = job.seed.to_bytes(8, "little")
    split_hashes: list[int] = []
    for text in texts:
        data = text.encode()
        key = hashlib.blake2b(data, digest_size=16, key=seed, person=b"shuffle").digest()
        split = hashlib.blake2b(data, digest_size=8, key=seed, person=b"split").digest()
        split_hashes.append(int.from_bytes(split, "big"))
        groups[_hash_partition(key, job.num_partitions)].append(_RECORD.pack(key, split, len(data)) + data)
    joined = [b"".join(group) for group in groups]
    ends = np.cumsum([0, *(len(group) for group in joined)]).astype("<u8")
    (job.work / name).write_bytes(ends.tobytes() + b"".join(joined))
    return split_hashes


def _hash_partition(key: bytes, num_partitions: int) -> int:
    """By the key's top bits, so that partition after partition is ascending in the key."""
    return int.from_bytes(key[:8], "big") * num_partitions >> 64


def _load_spill(path: Location, num_partitions: int, number: int) -> Iterator[Document]:
    table_bytes = 8 * (num_partitions + 1)
    start, stop = np.frombuffer(path.read_range(8 * number, 8 * number + 16), dtype="<u8").tolist()
    data = path.read_range(table_bytes + start, table_bytes + stop) if stop > start else b""
    offset = 0
    while offset < len(data):
        key, split, size = _RECORD.unpack_from(data, offset)
        offset += _RECORD.size
        yield Document(key, int.from_bytes(split, "big"), data[offset : offset + size].decode())
        offset += size


def _arrays_to_bytes(*arrays: NDArray[Any]) -> bytes:
    buffer = io.BytesIO()
    for array in arrays:
        np.lib.format.write_array(buffer, array, allow_pickle=False)
    return buffer.getvalue()
