"""From sources to a prepared corpus: content-addressed, continued where it was killed, complete only when corpus.json is there."""

import hashlib
import json
import tempfile
import time
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipeline import text
from data_pipeline.blocks import encode_partition, load_tables
from data_pipeline.claims import claimed
from data_pipeline.config import CorpusConfig, TokenizerConfig
from data_pipeline.contamination import held_out_digest, unreported, write_report
from data_pipeline.errors import ConfigError, NotFoundError
from data_pipeline.executor import Executor, InProcessExecutor
from data_pipeline.hashing import threshold64
from data_pipeline.index import FORMAT_VERSION, INDEX, MANIFEST, TOKENIZER, record_dtype, sealed
from data_pipeline.masking import Vocabulary
from data_pipeline.partitions import WORK, Job, Receipt, kept_documents, read_partition
from data_pipeline.reading import count_documents
from data_pipeline.selection import Selection, select
from data_pipeline.source_digests import describe_sources
from data_pipeline.sources import PYTHON_DOCS, Inputs, Partition, limit_documents, list_inputs, source_names
from data_pipeline.stopwatch import Stopwatch, total
from data_pipeline.storage import Location
from data_pipeline.tokenizer import load_tokenizer, loaded_digest, tokenizer_digest, train_tokenizer, vocabulary_of, write_tokenizer

Progress = Callable[[str], None]
TestTexts = Mapping[str, Sequence[str]]
"""The texts of the test set of each task, by the task's name."""

_RULES_VERSION = 4
"""Raise it when this module, partitions, selection, blocks, chunks or shards change what they write."""
_BYTES_PER_TOKEN = 4
_NUM_BLOCKS = 4096
_MIN_BLOCK_TOKENS, _MAX_BLOCK_TOKENS = 8 << 10, 512 << 10
_HASH_PARTITION_BYTES = 16 << 20
_MAX_HASH_PARTITIONS = 4096
_SAMPLE_CHARACTERS = 128 << 20
_DIGESTS = "corpora/.cache/source-digests.json"
_NOTHING: TestTexts = {}


@dataclass(frozen=True)
class Prepared:
    """The outcome of `prepare`."""

    folder: Location
    created: bool
    """False when the corpus was there already."""
    summary: dict[str, Any]
    """Counts of corpus.json, and two things that are not in it, because a corpus is byte-identical however long it took: `seconds`, and
    `cpu_seconds` of each step, summed over all tasks (empty when the corpus was there already)."""


def find_prepared(
    corpus: CorpusConfig,
    tokenizer: TokenizerConfig,
    sequence_lengths: tuple[int, ...],
    storage: Location,
    *,
    test_texts: Callable[[], TestTexts] = lambda: _NOTHING,
) -> Location:
    """Folder of the corpus that these settings and sources make. Test texts are asked for only when documents like them are removed.

    Raises:
        NotFoundError: it has not been prepared, or a source is missing.
    """
    held_out = held_out_digest(test_texts()) if corpus.contamination == "remove" else None
    folder = _corpus_folder(corpus, tokenizer, sequence_lengths, storage, describe_sources(corpus, storage / _DIGESTS, InProcessExecutor()), held_out)
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
    *,
    test_texts: Callable[[], TestTexts] = lambda: _NOTHING,
) -> Prepared:
    """Prepare the corpus, or return at once when it is there. Same inputs and settings, same bytes, whatever the executor.

    Documents that overlap with `test_texts` are reported in contamination.json or removed, as `corpus.contamination` says; a corpus that is
    there already, but was never compared with them, is read again and reported on.

    Raises:
        NotFoundError: a source is missing.
        ConfigError: nothing to read, a missing text column, an unsuitable tokenizer.
        DataCorruptError: text that is not UTF-8, a broken line or archive.
        ConflictError: another process prepares the same corpus.
        StorageError: the disk is full.
    """
    started_at = time.monotonic()
    sources = describe_sources(corpus, storage / _DIGESTS, executor)
    lengths = tuple(sorted(set(sequence_lengths)))
    texts = test_texts()
    held_out = held_out_digest(texts)
    folder = _corpus_folder(corpus, tokenizer, lengths, storage, sources, held_out if corpus.contamination == "remove" else None)
    created = not (folder / MANIFEST).exists()
    cpu_seconds: dict[str, float] = {}
    if created or unreported(folder, texts) or (folder / WORK).exists():  # killed while it removed its working files
        with claimed(folder / "claim.json", f"corpus {folder.name}"):
            if not (folder / MANIFEST).exists():  # the holder before us may have finished it
                cpu_seconds = _Build(corpus, tokenizer, lengths, folder, sources, executor, progress).run(texts)
            elif missing := unreported(folder, texts):
                _report_again(corpus, lengths, folder, executor, progress, missing)
            (folder / WORK).remove()
    manifest = (folder / MANIFEST).read_json()
    measured = {"seconds": round(time.monotonic() - started_at, 3), "cpu_seconds": {step: round(value, 3) for step, value in cpu_seconds.items()}}
    return Prepared(folder, created, {**manifest["counts"], **measured})


def _corpus_folder(
    corpus: CorpusConfig,
    tokenizer: TokenizerConfig,
    sequence_lengths: tuple[int, ...],
    storage: Location,
    sources: list[dict[str, Any]],
    held_out: str | None,
) -> Location:
    settings = _settings(corpus, tokenizer, tuple(sorted(set(sequence_lengths))), held_out)
    identity = json.dumps([FORMAT_VERSION, _library_versions(), settings, sources], sort_keys=True)
    return storage / "corpora" / f"{corpus.label}-{hashlib.sha256(identity.encode()).hexdigest()[:12]}"


def _settings(corpus: CorpusConfig, tokenizer: TokenizerConfig, sequence_lengths: tuple[int, ...], held_out: str | None) -> dict[str, Any]:
    """The settings that decide the bytes: content stands for the paths of sources and tokenizer. `held_out` is what documents are removed for."""
    chosen: dict[str, Any]
    chosen = tokenizer.model_dump(exclude={"path"}) if tokenizer.path is None else {"digest": tokenizer_digest(tokenizer.path)}
    settings = {**corpus.model_dump(mode="json", exclude={"source", "name", "contamination"}), "removed_test_texts": held_out}
    settings["personal_data"] = sorted(set(corpus.personal_data))
    return {"corpus": settings, "tokenizer": chosen, "sequence_lengths": list(sequence_lengths)}


def _library_versions() -> dict[str, Any]:
    """Versions of what changes the output."""
    import ftfy
    import tokenizers

    versions = {"ftfy": ftfy.__version__, "tokenizers": tokenizers.__version__, "unicode": unicodedata.unidata_version}
    return {**versions, "rules": [_RULES_VERSION, text.RULES_VERSION]}


@dataclass(frozen=True)
class _Build:
    """What one preparation is made from."""

    corpus: CorpusConfig
    tokenizer: TokenizerConfig
    sequence_lengths: tuple[int, ...]
    folder: Location
    sources: list[dict[str, Any]]
    executor: Executor
    progress: Progress

    def run(self, test_texts: TestTexts) -> dict[str, float]:
        """Read, select, train the tokenizer, encode, index; return CPU seconds by step. A step that an earlier attempt finished is not redone."""
        watch = Stopwatch()
        job, read = _read(self.corpus, self.sequence_lengths, self.folder, self.executor, self.progress, test_texts)
        spills = [name for receipt in read for name in receipt["spills"]]
        selection = None
        if job.drops or job.held_out is not None:
            self.progress(f"comparing {job.num_partitions} partitions")
            selection = select(job, spills, test_texts, self.executor)
        smallest = selection.smallest_split_hash if selection else min(receipt["smallest_split_hash"] for receipt in read)
        # The document with the smallest hash is always held out: a small corpus has a validation split, too.
        threshold = max(int(threshold64(self.corpus.validation_fraction)), smallest + 1)
        self.progress("tokenizer")
        with watch("tokenizer"):
            vocabulary, digests = _make_tokenizer(job, self.tokenizer, spills, threshold)
        self.progress(f"encoding {job.num_partitions} partitions")
        encoded = list(self.executor.map(partial(encode_partition, job, spills, threshold), list(range(job.num_partitions))))
        self.progress("index")
        with watch("index"):
            manifest = _index(job, encoded, vocabulary)
        manifest["counts"] |= _counts(read, selection, encoded)
        manifest["digests"] |= digests
        removed_for = job.held_out if self.corpus.contamination == "remove" else None
        settings = _settings(self.corpus, self.tokenizer, self.sequence_lengths, removed_for)
        manifest |= {"sources": self.sources, "config": settings, "versions": _library_versions()}
        if selection and selection.tasks:
            write_report(self.folder, selection.tasks)
        (self.folder / MANIFEST).write_json(sealed(manifest))
        receipts = [*read, *(selection.receipts if selection else ()), *encoded]
        return total([*(receipt["seconds"] for receipt in receipts), watch.seconds])


def _report_again(
    corpus: CorpusConfig, sequence_lengths: tuple[int, ...], folder: Location, executor: Executor, progress: Progress, test_texts: TestTexts
) -> None:
    """Compare the documents of a corpus that is complete with more test sets."""
    alone = corpus.model_copy(update={"near_duplicates": None, "contamination": "report"})
    job, read = _read(alone, sequence_lengths, folder, executor, progress, test_texts)
    progress(f"comparing {job.num_partitions} partitions")
    spills = [name for receipt in read for name in receipt["spills"]]
    write_report(folder, select(job, spills, test_texts, executor).tasks)


def _read(
    corpus: CorpusConfig, sequence_lengths: tuple[int, ...], folder: Location, executor: Executor, progress: Progress, test_texts: TestTexts
) -> tuple[Job, list[Receipt]]:
    """The first pass.

    Raises:
        ConfigError: there is no text.
    """
    inputs = list_inputs(corpus)
    job = replace(plan_job(folder, corpus, inputs.text_bytes, sequence_lengths), held_out=held_out_digest(test_texts))
    partitions = _limited(inputs, corpus, executor)
    progress(f"reading {len(partitions)} partitions")
    read = list(executor.map(partial(read_partition, job), list(enumerate(partitions))))
    if not any(receipt["spills"] for receipt in read):
        dropped = sum(receipt["counts"]["low_quality"] for receipt in read)
        why = f"no text that passes corpus.quality: {dropped} documents fail it" if dropped else "no text"
        remedy = "Loosen the rules of corpus.quality." if dropped else "Point it at a folder of text."
        raise ConfigError(f"corpus.source {', '.join(source_names(corpus))} holds {why}", remedy)
    return job, read


def plan_job(folder: Location, corpus: CorpusConfig, text_bytes: int, sequence_lengths: tuple[int, ...]) -> Job:
    """Layout of a corpus, a function of the size of its text: about 4096 blocks or more, of 8 k to 512 k tokens; pure."""
    num_partitions = min(max(1, -(-text_bytes // _HASH_PARTITION_BYTES)), _MAX_HASH_PARTITIONS)
    block_tokens = min(max(text_bytes // _BYTES_PER_TOKEN // _NUM_BLOCKS, _MIN_BLOCK_TOKENS), _MAX_BLOCK_TOKENS)
    return Job(folder, corpus, num_partitions, block_tokens, sequence_lengths)


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
                write_tokenizer(train_tokenizer(_Sample(job, config.sample_documents, spills, threshold), config), config, Path(folder))
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


@dataclass(frozen=True)
class _Sample:
    """Training documents with the smallest keys: a uniform sample that depends on neither files nor partitions. One partition is in memory."""

    job: Job
    num_documents: int
    spills: Sequence[str]
    threshold: int

    def __iter__(self) -> Iterator[str]:
        left, characters = self.num_documents, _SAMPLE_CHARACTERS
        for number in range(self.job.num_partitions):
            for document in kept_documents(self.job, self.spills, number)[0]:
                if left <= 0 or characters <= 0:
                    return
                if document.split_hash >= self.threshold:
                    left, characters = left - 1, characters - len(document.text)
                    yield document.text


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


def _counts(read: Sequence[Receipt], selection: Selection | None, encoded: Sequence[Receipt]) -> dict[str, Any]:
    totals: dict[str, Any] = {name: sum(receipt["counts"][name] for receipt in read) for name in ("documents", "empty", "low_quality", "bytes")}
    for name in ("quality", "personal_data"):
        totals[name] = dict(sum((Counter[str](receipt[name]) for receipt in read), Counter[str]()))
    totals["duplicates"] = sum(receipt["duplicates"] for receipt in encoded)
    totals["contaminated"] = selection.contaminated if selection else 0
    totals["near_duplicates"] = selection.near_duplicates if selection else 0
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
