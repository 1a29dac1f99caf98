"""Overlap of training documents with the test sets of tasks: shared runs of 13 words (after Brown et al. 2020, appendix C); pure but for files."""

import hashlib
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from data_pipeline.hashing import UInt64Array
from data_pipeline.ngrams import ngram_hashes, word_hashes
from data_pipeline.storage import Location

NGRAM = 13
"""Words, lower-cased and without punctuation."""
REPORT = "contamination.json"
_FILTER_SLOTS = 16
"""Slots of the filter per n-gram: one in sixteen foreign n-grams goes on to the search."""

Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class HeldOut:
    """The n-grams of some test sets, ready to be looked up."""

    ngrams: UInt64Array
    """Distinct, ascending."""
    in_task: Bools
    """For each n-gram and task whether the task's test set has it."""
    where: NDArray[np.int64]
    """Rows (n-gram, task, text): every text that an n-gram occurs in."""
    filter: Bools
    """Slot `hash mod size` is set for each n-gram: sends most foreign ones away at the price of one look."""

    @classmethod
    def of(cls, texts: Mapping[str, Sequence[str]]) -> Self:
        """The n-grams of the texts of each task, tasks in the order of their names."""
        found = [
            (int(ngram), task, text)
            for task, name in enumerate(sorted(texts))
            for text, words in enumerate(word_hashes(texts[name]))
            for ngram in set(ngram_hashes(words, NGRAM).tolist())
        ]
        ngrams, number = np.unique(np.array([ngram for ngram, _, _ in found], dtype=np.uint64), return_inverse=True)
        where = np.array([(0, task, text) for _, task, text in found], dtype=np.int64).reshape(-1, 3)
        where[:, 0] = number
        in_task = np.zeros((len(ngrams), len(texts)), dtype=np.bool_)
        in_task[where[:, 0], where[:, 1]] = True
        slots = np.zeros(1 << max(16, (_FILTER_SLOTS * len(ngrams) - 1).bit_length()), dtype=np.bool_)
        slots[ngrams & np.uint64(len(slots) - 1)] = True
        return cls(ngrams, in_task, where, slots)

    @classmethod
    def load(cls, path: Location) -> Self:
        """Read what `save` wrote."""
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as stored:
            return cls(**{field.name: stored[field.name] for field in fields(cls)})

    def save(self, path: Location) -> None:
        """Write as an .npz."""
        buffer = io.BytesIO()
        np.savez(buffer, **{field.name: getattr(self, field.name) for field in fields(self)})
        path.write_bytes(buffer.getvalue())

    def find(self, documents: Sequence[UInt64Array]) -> tuple[Bools, Bools]:
        """For documents as hashes of their words: which tasks each overlaps with (documents × tasks), and which n-grams were met."""
        hits = np.zeros((len(documents), self.in_task.shape[1]), dtype=np.bool_)
        met = np.zeros(len(self.ngrams), dtype=np.bool_)
        if not documents or not len(self.ngrams):
            return hits, met
        ends = np.cumsum([len(words) for words in documents])
        hashes = ngram_hashes(np.concatenate(documents), NGRAM)
        positions = np.flatnonzero(self.filter[hashes & np.uint64(len(self.filter) - 1)])
        document = np.searchsorted(ends, positions, side="right")
        number = np.minimum(np.searchsorted(self.ngrams, hashes[positions]), len(self.ngrams) - 1)
        genuine = (self.ngrams[number] == hashes[positions]) & (positions + NGRAM <= ends[document])  # not across two documents
        number, document = number[genuine], document[genuine]
        np.logical_or.at(hits, document, self.in_task[number])
        met[number] = True
        return hits, met


def task_digest(texts: Sequence[str]) -> str:
    """SHA-256 of a task's test texts and of the length of n-grams."""
    return hashlib.sha256(json.dumps([NGRAM, list(texts)]).encode()).hexdigest()


def held_out_digest(test_texts: Mapping[str, Sequence[str]]) -> str | None:
    """SHA-256 of the tasks' names and test texts; None without any task."""
    digests = {name: task_digest(texts) for name, texts in test_texts.items()}
    return hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest() if digests else None


def contamination_report(
    test_texts: Mapping[str, Sequence[str]], held_out: HeldOut, documents: Iterable[int], met: Bools, *, removed: bool
) -> dict[str, Any]:
    """What contamination.json says of each task. `documents` are the overlapping ones of each, `met` the n-grams found in any of them."""
    tasks: dict[str, Any] = {}
    for task, (name, count) in enumerate(zip(sorted(test_texts), documents, strict=True)):
        rows = held_out.where[held_out.where[:, 1] == task]
        tasks[name] = {
            "digest": task_digest(test_texts[name]),
            "documents": int(count),
            "removed": removed,
            "test_texts": len(test_texts[name]),
            "test_texts_found": len(np.unique(rows[met[rows[:, 0]], 2])),
            "test_texts_long_enough": len(np.unique(rows[:, 2])),
        }
    return tasks


def reported_tasks(folder: Location) -> dict[str, Any]:
    """What the report in a corpus' folder says, by task; empty when there is none."""
    report = folder / REPORT
    return report.read_json()["tasks"] if report.exists() else {}


def unreported(folder: Location, test_texts: Mapping[str, Sequence[str]]) -> dict[str, Sequence[str]]:
    """The tasks whose test texts the report does not speak of."""
    known = reported_tasks(folder)
    return {name: texts for name, texts in test_texts.items() if known.get(name, {}).get("digest") != task_digest(texts)}


def write_report(folder: Location, tasks: Mapping[str, Any]) -> None:
    """Add tasks to the report of a corpus."""
    known = reported_tasks(folder)
    (folder / REPORT).write_json({"format_version": 1, "ngram_words": NGRAM, "tasks": {**known, **tasks}})
