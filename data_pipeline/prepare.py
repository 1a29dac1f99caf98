"""From sources to a prepared corpus: content-addressed, continued where it was killed, complete only when corpus.json is there."""

import hashlib
import json
import tempfile
import time
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipeline import text
from data_pipeline.claims import claimed
from data_pipeline.config import CorpusConfig, TokenizerConfig
from data_pipeline.errors import ConfigError, NotFoundError
from data_pipeline.executor import Executor, InProcessExecutor
from data_pipeline.hashing import threshold64
from data_pipeline.index import FORMAT_VERSION, INDEX, MANIFEST, TOKENIZER, record_dtype, sealed
from data_pipeline.masking import Vocabulary
from data_pipeline.partitions import WORK, Job, Receipt, encode_partition, load_partition, load_tables, read_partition
from data_pipeline.reading import count_documents
from data_pipeline.sources import PYTHON_DOCS, Inputs, Partition, describe_source, limit_documents, list_inputs, source_names
from data_pipeline.storage import Location
from data_pipeline.tokenizer import load_tokenizer, loaded_digest, tokenizer_digest, train_tokenizer, vocabulary_of, write_tokenizer

Progress = Callable[[str], None]

_RULES_VERSION = 2
"""Raise it when this module, partitions, chunks or shards change what they write."""
_BYTES_PER_TOKEN = 4
_NUM_BLOCKS = 4096
_MIN_BLOCK_TOKENS, _MAX_BLOCK_TOKENS = 8 << 10, 512 << 10
_HASH_PARTITION_BYTES = 16 << 20
_MAX_HASH_PARTITIONS = 4096
_SAMPLE_CHARACTERS = 512 << 20


@dataclass(frozen=True)
class Prepared:
    """The outcome of `prepare`."""

    folder: Location
    created: bool
    """False when the corpus was there already."""
    summary: dict[str, Any]
    """Counts of corpus.json, and `seconds`, which is not in it: a corpus is byte-identical however long it took."""


def find_prepared(corpus: CorpusConfig, tokenizer: TokenizerConfig, sequence_lengths: tuple[int, ...], storage: Location) -> Location:
    """Folder of the corpus that these settings and sources make.

    Raises:
        NotFoundError: it has not been prepared, or a source is missing.
    """
    folder = _corpus_folder(corpus, tokenizer, sequence_lengths, storage, describe_sources(corpus, InProcessExecutor()))
    if not (folder / MANIFEST).exists():
        raise NotFoundError(f"corpus {folder.name} is not prepared in {storage}", "Run `maskwright prepare CONFIG`.")
    return folder


def prepare(
    corpus: CorpusConfig,
    tokenizer: TokenizerConfig,
    sequence_lengths: tuple[int, ...],
    storage: Location,
    executor: Executor,
    progress: Progress,
) -> Prepared:
    """Prepare the corpus, or return at once when it is there. Same inputs and settings, same bytes, whatever the executor.

    Raises:
        NotFoundError: a source is missing.
        ConfigError: nothing to read, a missing text column, an unsuitable tokenizer.
        DataCorruptError: text that is not UTF-8, a broken line or archive.
        ConflictError: another process prepares the same corpus.
        StorageError: the disk is full.
    """
    started_at = time.monotonic()
    sources = describe_sources(corpus, executor)
    lengths = tuple(sorted(set(sequence_lengths)))
    folder = _corpus_folder(corpus, tokenizer, lengths, storage, sources)
    created = not (folder / MANIFEST).exists()
    if created or (folder / WORK).exists():  # working files beside a corpus that is complete: killed while it removed them
        with claimed(folder / "claim.json", f"corpus {folder.name}"):
            if not (folder / MANIFEST).exists():  # the holder before us may have finished it
                _build(corpus, tokenizer, lengths, folder, sources, executor, progress)
            (folder / WORK).remove()
    manifest = (folder / MANIFEST).read_json()
    return Prepared(folder, created, {**manifest["counts"], "seconds": round(time.monotonic() - started_at, 3)})


def describe_sources(corpus: CorpusConfig, executor: Executor) -> list[dict[str, Any]]:
    """Names and content digests of all sources."""
    return list(executor.map(partial(_describe, corpus), list(source_names(corpus))))


def _describe(corpus: CorpusConfig, source: str) -> dict[str, Any]:
    return describe_source(source, corpus)


def _corpus_folder(
    corpus: CorpusConfig, tokenizer: TokenizerConfig, sequence_lengths: tuple[int, ...], storage: Location, sources: list[dict[str, Any]]
) -> Location:
    settings = _settings(corpus, tokenizer, tuple(sorted(set(sequence_lengths))))
    identity = json.dumps([FORMAT_VERSION, _library_versions(), settings, sources], sort_keys=True)
    return storage / "corpora" / f"{corpus.label}-{hashlib.sha256(identity.encode()).hexdigest()[:12]}"


def _settings(corpus: CorpusConfig, tokenizer: TokenizerConfig, sequence_lengths: tuple[int, ...]) -> dict[str, Any]:
    """The settings that decide the bytes: content stands for the paths of sources and tokenizer."""
    chosen: dict[str, Any]
    chosen = tokenizer.model_dump(exclude={"path"}) if tokenizer.path is None else {"digest": tokenizer_digest(tokenizer.path)}
    return {"corpus": corpus.model_dump(exclude={"source", "name"}), "tokenizer": chosen, "sequence_lengths": list(sequence_lengths)}


def _library_versions() -> dict[str, Any]:
    """Versions of what changes the output."""
    import ftfy
    import tokenizers

    versions = {"ftfy": ftfy.__version__, "tokenizers": tokenizers.__version__, "unicode": unicodedata.unidata_version}
    return {**versions, "rules": [_RULES_VERSION, text.RULES_VERSION]}


def _build(
    corpus: CorpusConfig,
    tokenizer: TokenizerConfig,
    sequence_lengths: tuple[int, ...],
    folder: Location,
    sources: list[dict[str, Any]],
    executor: Executor,
    progress: Progress,
) -> None:
    """Read, train the tokenizer, encode, index. Every step returns at once when an earlier attempt finished it."""
    inputs = list_inputs(corpus)
    job = plan_job(folder, corpus.seed, inputs.text_bytes, sequence_lengths)
    partitions = _limited(inputs, corpus, executor)
    progress(f"reading {len(partitions)} partitions")
    read = list(executor.map(partial(read_partition, job), list(enumerate(partitions))))
    spills = [name for receipt in read for name in receipt["spills"]]
    if not spills:
        raise ConfigError(f"corpus.source {', '.join(source_names(corpus))} holds no text", "Point it at a folder of text.")
    # The document with the smallest hash is always held out: a small corpus has a validation split, too.
    threshold = max(int(threshold64(corpus.validation_fraction)), min(receipt["smallest_split_hash"] for receipt in read) + 1)
    progress("tokenizer")
    vocabulary, digests = _make_tokenizer(job, tokenizer, spills, threshold)
    progress(f"encoding {job.num_partitions} partitions")
    encoded = list(executor.map(partial(encode_partition, job, spills, threshold), list(range(job.num_partitions))))
    progress("index")
    manifest = _index(job, encoded, vocabulary)
    manifest["counts"] |= _counts(read, encoded)
    manifest["digests"] |= digests
    manifest |= {"sources": sources, "config": _settings(corpus, tokenizer, sequence_lengths), "versions": _library_versions()}
    (folder / MANIFEST).write_json(sealed(manifest))


def plan_job(folder: Location, seed: int, text_bytes: int, sequence_lengths: tuple[int, ...]) -> Job:
    """Layout of a corpus, a function of the size of its text: about 4096 blocks or more, of 8 k to 512 k tokens; pure."""
    num_partitions = min(max(1, -(-text_bytes // _HASH_PARTITION_BYTES)), _MAX_HASH_PARTITIONS)
    block_tokens = min(max(text_bytes // _BYTES_PER_TOKEN // _NUM_BLOCKS, _MIN_BLOCK_TOKENS), _MAX_BLOCK_TOKENS)
    return Job(folder, seed, num_partitions, block_tokens, sequence_lengths)


def _limited(inputs: Inputs, corpus: CorpusConfig, executor: Executor) -> Sequence[Partition]:
    """The first `max_documents` documents in the order of the sources; `python-docs` alone limits itself, without parsing twice."""
    partitions, max_documents = inputs.partitions, corpus.max_documents
    source_is_limited = source_names(corpus) == (PYTHON_DOCS,)
    if max_documents is None or not partitions or source_is_limited:
        return partitions
    counts = [max_documents] if len(partitions) == 1 else list(executor.map(count_documents, list(partitions)))
    return limit_documents(partitions, counts, max_documents)


def _make_tokenizer(job: Job, config: TokenizerConfig, spills: Sequence[str], threshold: int) -> tuple[Vocabulary, dict[str, Any]]:
    """Write tokenizer/, trained or copied, unless an earlier attempt did; return its vocabulary, and the digests of it and of its files."""
    receipt = job.work / "tokenizer.json"
    if not receipt.exists():
        with tempfile.TemporaryDirectory() as folder:
            if config.path is None:
                write_tokenizer(train_tokenizer(_sample(job, config, spills, threshold), config), config, Path(folder))
            else:
                load_tokenizer(config.path).save_pretrained(folder)
            loaded = load_tokenizer(folder)
            contents = {file.name: file.read_bytes() for file in sorted(Path(folder).iterdir())}
        for name, data in contents.items():
            (job.folder / TOKENIZER / name).write_bytes(data)
        files = {name: hashlib.sha256(data).hexdigest() for name, data in contents.items()}
        digests = {"tokenizer": loaded_digest(loaded), "tokenizer_files": files}
        receipt.write_json({"digests": digests, "vocabulary": asdict(vocabulary_of(loaded))})
    stored = receipt.read_json()
    return Vocabulary(**stored["vocabulary"]), stored["digests"]


def _sample(job: Job, config: TokenizerConfig, spills: Sequence[str], threshold: int) -> list[str]:
    """Training documents with the smallest keys: a uniform sample that depends on neither files nor partitions."""
    sample: list[str] = []
    num_characters = 0
    for number in range(job.num_partitions):
        for document in load_partition(job, spills, number)[0]:
            if len(sample) >= config.sample_documents or num_characters >= _SAMPLE_CHARACTERS:
                return sample
            if document.split_hash >= threshold:
                sample.append(document.text)
                num_characters += len(document.text)
    if not sample:
        raise ConfigError("the corpus has fewer than 2 distinct documents: none is left to train on", "Use more text.")
    return sample


def _index(job: Job, encoded: Sequence[Receipt], vocabulary: Vocabulary) -> dict[str, Any]:
    """Write index.bin, training blocks first; return what corpus.json says about blocks, shards and tokens."""
    shards: list[dict[str, Any]] = []
    tables: list[NDArray[np.void]] = []
    num_blocks = {"train": 0, "validation": 0}
    token_counts = np.zeros(vocabulary.size, dtype=np.int64)
    for split in num_blocks:
        for receipt in encoded:
            shard = receipt["splits"][split]["shard"]
            if shard is None:
                continue
            records, counts = load_tables(job, shard["name"])
            records["shard"] = len(shards)
            tables.append(records)
            num_blocks[split] += len(records)
            shards.append({**shard, "blocks": len(records)})
            if split == "train":
                token_counts[: len(counts)] += counts
    if not num_blocks["train"]:
        raise ConfigError("the corpus has fewer than 2 distinct documents: none is left to train on", "Use more text.")
    data = np.concatenate(tables).astype(record_dtype(len(job.sequence_lengths))).tobytes()
    (job.folder / INDEX).write_bytes(data)
    return {
        "format_version": FORMAT_VERSION,
        "sequence_lengths": list(job.sequence_lengths),
        "block_tokens": job.block_tokens,
        "vocabulary": asdict(vocabulary),
        "unigram_entropy": _entropy(token_counts[vocabulary.ordinary_ids]),
        "counts": {f"{split}_blocks": count for split, count in num_blocks.items()},
        "digests": {"index": hashlib.sha256(data).hexdigest()},
        "shards": shards,
    }


def _counts(read: Sequence[Receipt], encoded: Sequence[Receipt]) -> dict[str, Any]:
    totals: dict[str, Any] = {name: sum(receipt[name] for receipt in read) for name in ("documents", "empty", "bytes")}
    totals["duplicates"] = sum(receipt["duplicates"] for receipt in encoded)
    for split in ("train", "validation"):
        parts = [receipt["splits"][split] for receipt in encoded]
        totals["empty"] += sum(part["without_tokens"] for part in parts)
        for name in ("documents", "sentences", "tokens", "single_sentence_documents"):
            totals[f"{split}_{name}"] = sum(part[name] for part in parts)
        totals[f"{split}_pairs"] = [sum(column) for column in zip(*(part["pairs"] for part in parts), strict=True)]
    kept = totals["train_documents"] + totals["validation_documents"]
    single = totals.pop("train_single_sentence_documents") + totals.pop("validation_single_sentence_documents")
    totals["share_without_pair"] = round(single / max(kept, 1), 6)
    totals["corpus_bytes"] = sum(
        receipt["splits"][s]["shard"]["bytes"] for receipt in encoded for s in receipt["splits"] if receipt["splits"][s]["shard"]
    )
    return totals


def _entropy(counts: NDArray[np.int64]) -> float:
    """In nats, rounded so that the last bit of a logarithm cannot change the corpus' fingerprint."""
    share = counts[counts > 0] / max(int(counts.sum()), 1)
    return round(float(-(share * np.log(share)).sum()), 6)
