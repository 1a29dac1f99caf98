"""What every task of `prepare` knows, its first pass over input partitions, and how later passes get at the documents.

The first pass cleans documents and spills them, with a 128-bit keyed hash of their text, into hash partitions. Later passes take one hash
partition each: sorting by the hash is the global shuffle, equal hashes are duplicates. `selection` may drop documents, `blocks` encodes the
others. Each task leaves a receipt, written last, and returns it at once when it is already there; so a run that was killed continues, and
results depend neither on workers nor on order.
"""

import io
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np

from data_pipeline.config import CorpusConfig
from data_pipeline.personal_data import scrub
from data_pipeline.quality import failed_rules
from data_pipeline.reading import read_documents
from data_pipeline.sources import Partition
from data_pipeline.spills import Document, SpillWriter, read_spill
from data_pipeline.stopwatch import Stopwatch
from data_pipeline.storage import Location
from data_pipeline.text import clean_document

WORK = "work"
_BATCH_DOCUMENTS, _BATCH_CHARACTERS = 512, 4 << 20

Receipt = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """What every task knows. Picklable."""

    folder: Location
    """The corpus folder."""
    corpus: CorpusConfig
    num_partitions: int
    """Hash partitions."""
    block_tokens: int
    sequence_lengths: tuple[int, ...]
    held_out: str | None = None
    """Digest of the test sets that documents are compared with, None without any."""

    @property
    def work(self) -> Location:
        """Working files, removed when the corpus is complete."""
        return self.folder / WORK

    @property
    def drops(self) -> bool:
        """Whether `selection` drops documents."""
        return self.corpus.near_duplicates is not None or (self.held_out is not None and self.corpus.contamination == "remove")

    def dropped(self, number: int) -> Location:
        """Rows of the documents of a hash partition that `selection` dropped."""
        return self.work / f"dropped-{number:06d}.npy"


def read_partition(job: Job, numbered: tuple[int, Partition]) -> Receipt:
    """First pass: clean, filter and scrub the documents of an input partition and spill them by hash. Memory holds one spill's worth of text."""
    number, partition = numbered
    receipt = job.work / f"read-{number:06d}.json"
    if receipt.exists():
        return receipt.read_json()
    watch = Stopwatch()
    counts = Counter[str](documents=0, empty=0, low_quality=0)
    failed, personal = Counter[str](), Counter[str]()
    spills = SpillWriter(job.work, f"spill-{number:06d}", job.corpus.seed, job.num_partitions)
    raw = batches(read_documents(partition))
    while True:
        with watch("read"):
            batch = next(raw, None)
        if batch is None:
            break
        counts["documents"] += len(batch)
        with watch("clean"):
            texts = [text for text in map(clean_document, batch) if text]
        counts["empty"] += len(batch) - len(texts)
        with watch("quality"):
            kept = _good(job.corpus, texts, failed)
        counts["low_quality"] += len(texts) - len(kept)
        with watch("personal_data"):
            kept = _scrubbed(job.corpus, kept, personal)
        with watch("spill"):
            for text in kept:
                spills.add(text)
    with watch("spill"):
        spills.flush()
    result: Receipt = {
        "counts": {**counts, "bytes": spills.num_bytes},
        "quality": dict(failed),
        "personal_data": dict(personal),
        "smallest_split_hash": spills.smallest_split_hash,
        "spills": spills.names,
        "seconds": watch.seconds,
    }
    receipt.write_json(result)
    return result


def load_partition(job: Job, spills: Sequence[str], number: int) -> tuple[list[Document], int]:
    """The distinct documents of a hash partition in shuffled order, and how many duplicates were dropped."""
    documents: dict[bytes, Document] = {}
    num_read = 0
    for name in spills:
        for document in read_spill(job.work / name, number, job.num_partitions):
            num_read += 1
            documents[document.key] = document
    return [documents[key] for key in sorted(documents)], num_read - len(documents)


def kept_documents(job: Job, spills: Sequence[str], number: int) -> tuple[list[Document], int]:
    """The distinct documents of a hash partition but those that `selection` dropped, and how many duplicates there were."""
    documents, num_duplicates = load_partition(job, spills, number)
    if not job.drops:
        return documents, num_duplicates
    rows = set(np.lib.format.read_array(io.BytesIO(job.dropped(number).read_bytes()), allow_pickle=False).tolist())
    return [document for row, document in enumerate(documents) if row not in rows], num_duplicates


def batches(texts: Iterable[str]) -> Iterator[list[str]]:
    """Documents by the hundreds: enough to spread the price of a call, few enough to be small."""
    batch: list[str] = []
    num_characters = 0
    for text in texts:
        batch.append(text)
        num_characters += len(text)
        if len(batch) >= _BATCH_DOCUMENTS or num_characters >= _BATCH_CHARACTERS:
            yield batch
            batch, num_characters = [], 0
    if batch:
        yield batch


def _good(corpus: CorpusConfig, texts: list[str], failed: Counter[str]) -> list[str]:
    """The texts that pass every quality rule; the rules that the others fail are counted, each for itself."""
    if corpus.quality is None:
        return texts
    found = [failed_rules(text, corpus.quality) for text in texts]
    failed.update(chain.from_iterable(found))
    return [text for text, rules in zip(texts, found, strict=True) if not rules]


def _scrubbed(corpus: CorpusConfig, texts: list[str], counts: Counter[str]) -> list[str]:
    if not corpus.personal_data:
        return texts
    found = [scrub(text, corpus.personal_data) for text in texts]
    for _, replaced in found:
        counts.update(replaced)
    return [text for text, _ in found]
