"""The passes of `prepare` in order: read, select, train the tokenizer, encode, index. Each returns at once when an earlier attempt finished it."""

import hashlib
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from data_pipeline.blocks import encode_partition
from data_pipeline.config import CorpusConfig, TokenizerConfig
from data_pipeline.contamination import held_out_digest, write_report
from data_pipeline.corpus_manifest import total_counts, write_index
from data_pipeline.errors import ConfigError
from data_pipeline.executor import Executor
from data_pipeline.hashing import threshold64
from data_pipeline.index import MANIFEST, TOKENIZER, sealed
from data_pipeline.masking import Vocabulary
from data_pipeline.partitions import Job, Receipt, kept_documents, read_partition
from data_pipeline.reading import count_documents
from data_pipeline.selection import Selection, select
from data_pipeline.sources import PYTHON_DOCS, Inputs, Partition, limit_documents, list_inputs, source_names
from data_pipeline.stopwatch import Stopwatch, total
from data_pipeline.storage import Location
from data_pipeline.tokenizer import load_tokenizer, loaded_digest, train_tokenizer, vocabulary_of, write_tokenizer

Progress = Callable[[str], None]
TestTexts = Mapping[str, Sequence[str]]
"""The texts of the test set of each task, by the task's name."""

_BYTES_PER_TOKEN = 4
_NUM_BLOCKS = 1024
_MIN_BLOCK_TOKENS, _MAX_BLOCK_TOKENS = 8 << 10, 512 << 10
_HASH_PARTITION_BYTES = 16 << 20
_MAX_HASH_PARTITIONS = 4096
_MOST_TEXT_BYTES = _MAX_HASH_PARTITIONS << 30
"""A task holds a partition some three times over."""
_SAMPLE_CHARACTERS = 128 << 20


@dataclass(frozen=True)
class Build:
    """What a corpus is built from, where, and by whom."""

    corpus: CorpusConfig
    tokenizer: TokenizerConfig
    sequence_lengths: tuple[int, ...]
    folder: Location
    executor: Executor
    progress: Progress

    def run(self, test_texts: TestTexts, identity: dict[str, Any]) -> dict[str, float]:
        """Build the corpus; corpus.json, which holds `identity`, is written last. Returns CPU seconds by step."""
        watch = Stopwatch()
        job, read, spills = self._read(self.corpus, test_texts)
        selection = self._select(job, spills, test_texts) if job.drops or job.held_out is not None else None
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
            manifest = write_index(job, encoded, vocabulary)
        manifest["counts"] |= total_counts(read, selection, encoded)
        manifest["digests"] |= digests
        if selection and selection.tasks:
            write_report(self.folder, selection.tasks)
        (self.folder / MANIFEST).write_json(sealed(manifest | identity))
        receipts = [*read, *(selection.receipts if selection else ()), *encoded]
        return total([*(receipt["seconds"] for receipt in receipts), watch.seconds])

    def report(self, test_texts: TestTexts) -> None:
        """Compare the documents of a corpus that is complete with more test sets."""
        job, _, spills = self._read(self.corpus.model_copy(update={"near_duplicates": None, "contamination": "report"}), test_texts)
        write_report(self.folder, self._select(job, spills, test_texts).tasks)

    def _read(self, corpus: CorpusConfig, test_texts: TestTexts) -> tuple[Job, list[Receipt], list[str]]:
        """The first pass: its job, its receipts and the files that it wrote."""
        inputs = list_inputs(corpus)
        job = replace(plan_job(self.folder, corpus, inputs.text_bytes, self.sequence_lengths), held_out=held_out_digest(test_texts))
        partitions = _limited(inputs, corpus, self.executor)
        self.progress(f"reading {len(partitions)} partitions")
        read = list(self.executor.map(partial(read_partition, job), list(enumerate(partitions))))
        spills = [name for receipt in read for name in receipt["spills"]]
        if not spills:
            raise _no_text(corpus, sum(receipt["counts"]["low_quality"] for receipt in read))
        return job, read, spills

    def _select(self, job: Job, spills: Sequence[str], test_texts: TestTexts) -> Selection:
        self.progress(f"comparing {job.num_partitions} partitions")
        return select(job, spills, test_texts, self.executor)


def plan_job(folder: Location, corpus: CorpusConfig, text_bytes: int, sequence_lengths: tuple[int, ...]) -> Job:
    """Layout of a corpus, a function of the size of its text: about 1024 blocks or more, of 8 k to 512 k tokens; pure.

    Raises:
        ConfigError: there is more text than partitions that fit in memory hold.
    """
    if text_bytes > _MOST_TEXT_BYTES and corpus.max_documents is None:
        said = f"corpus.source holds {text_bytes / 1e12:.1f} TB of text, more than the {_MOST_TEXT_BYTES / 1e12:.1f} TB that one corpus may have"
        raise ConfigError(said, "Divide it into corpora of their own, and train on all of them (`mixture`), or set corpus.max_documents.")
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


def _no_text(corpus: CorpusConfig, num_low_quality: int) -> ConfigError:
    sources = ", ".join(source_names(corpus))
    if not num_low_quality:
        return ConfigError(f"corpus.source {sources} holds no text", "Point it at a folder of text.")
    said = f"corpus.source {sources} holds no text that passes corpus.quality: {num_low_quality} documents fail it"
    return ConfigError(said, "Loosen the rules of corpus.quality.")


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
