"""The pass of `prepare` that compares documents with test sets and with each other, and says which of them to drop.

Documents are compared in hash partitions and, for near-duplicates, linked in band partitions: what shares a band meets in one task, wherever
it came from. The driver holds the pairs that were found, never the documents.
"""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipeline.contamination import Bools, HeldOut, contamination_report
from data_pipeline.executor import Executor
from data_pipeline.hashing import UInt64Array
from data_pipeline.near_duplicates import (
    BAND_RECORD,
    Signatures,
    band_records,
    candidates,
    document_number,
    redundant,
    signatures,
    split_number,
    verified_pairs,
)
from data_pipeline.ngrams import word_hashes
from data_pipeline.partitions import Job, Receipt, batches, load_partition
from data_pipeline.spills import read_group, write_groups
from data_pipeline.stopwatch import Stopwatch
from data_pipeline.storage import Location

_FACTS = np.dtype([("split_hash", "<u8"), ("dropped", np.bool_)])


@dataclass(frozen=True)
class Selection:
    """The outcome of `select`."""

    contaminated: int
    """Documents dropped because a test set shares 13 words with them."""
    near_duplicates: int
    """Documents dropped because an earlier one resembles them."""
    smallest_split_hash: int
    """Over the documents that are left."""
    tasks: dict[str, Any]
    """What contamination.json says of each task."""
    receipts: list[Receipt]


def select(job: Job, spills: Sequence[str], test_texts: Mapping[str, Sequence[str]], executor: Executor) -> Selection:
    """Compare all documents, write down which to drop, and count. Every step returns at once when an earlier attempt finished it."""
    if job.held_out is not None and not _held_out(job).exists():
        HeldOut.of(test_texts).save(_held_out(job))
    numbers = list(range(job.num_partitions))
    receipts = list(executor.map(partial(compare_partition, job, spills), numbers))
    pairs = np.zeros((0, 2), dtype=np.uint64)
    if job.corpus.near_duplicates is not None:
        linked = list(executor.map(partial(link_partition, job), numbers))
        pairs = np.concatenate([_load(_pairs(job, number)) for number in numbers])
        receipts += linked
    near_duplicates, smallest = _write_dropped(job, redundant(pairs))
    tasks = _report(job, test_texts, receipts[: job.num_partitions])
    contaminated = sum(receipt["contaminated"] for receipt in receipts[: job.num_partitions]) if job.corpus.contamination == "remove" else 0
    return Selection(contaminated, near_duplicates, smallest, tasks, receipts)


def compare_partition(job: Job, spills: Sequence[str], number: int) -> Receipt:
    """Look for test sets' n-grams in the documents of a hash partition; sign those that are left and spill their bands."""
    receipt = job.work / f"compare-{(job.held_out or '')[:16]}-{number:06d}.json"
    if receipt.exists():
        return receipt.read_json()
    watch = Stopwatch()
    with watch("shuffle"):
        documents = load_partition(job, spills, number)[0]
    with watch("words"):
        words = [hashes for batch in batches(document.text for document in documents) for hashes in word_hashes(batch)]
    contaminated = np.zeros(len(documents), dtype=np.bool_)
    result: Receipt = {"contaminated": 0, "documents_of_task": []}
    if job.held_out is not None:
        with watch("contamination"):
            hits, met = HeldOut.load(_held_out(job)).find(words)
            contaminated = hits.any(axis=1)
            _save(_met(job, number), met)
            result = {"contaminated": int(contaminated.sum()), "documents_of_task": hits.sum(axis=0).tolist()}
    dropped = contaminated if job.corpus.contamination == "remove" else np.zeros_like(contaminated)
    facts = np.zeros(len(documents), dtype=_FACTS)
    facts["split_hash"] = [document.split_hash for document in documents]
    facts["dropped"] = dropped
    _save(_facts(job, number), facts)
    if job.corpus.near_duplicates is not None:
        with watch("near_duplicates"):
            _sign(job, number, words, np.logical_not(dropped))
    result["seconds"] = watch.seconds
    receipt.write_json(result)
    return result


def link_partition(job: Job, number: int) -> Receipt:
    """Verify the candidates of one band partition and write down the pairs that are near-duplicates."""
    receipt = job.work / f"link-{number:06d}.json"
    if receipt.exists():
        return receipt.read_json()
    config = job.corpus.near_duplicates
    assert config is not None
    watch = Stopwatch()
    with watch("near_duplicates"):
        data = [read_group(_bands(job, source), number, job.num_partitions) for source in range(job.num_partitions)]
        groups = candidates(np.frombuffer(b"".join(data), dtype=BAND_RECORD))
        pairs = verified_pairs(groups, partial(_read_signatures, job, config.num_permutations), config.threshold)
        _save(_pairs(job, number), pairs)
    result: Receipt = {"pairs": len(pairs), "seconds": watch.seconds}
    receipt.write_json(result)
    return result


def _sign(job: Job, number: int, words: Sequence[UInt64Array], wanted: Bools) -> None:
    config = job.corpus.near_duplicates
    assert config is not None
    found = signatures(words, config)
    rows = np.flatnonzero(wanted & np.array([len(each) > 0 for each in words], dtype=np.bool_))
    records = band_records(found[rows], document_number(number, rows), config)
    place = (records["band"] >> np.uint64(32)) * np.uint64(job.num_partitions) >> np.uint64(32)
    order = np.argsort(place, kind="stable")
    ends = np.searchsorted(place[order], np.arange(job.num_partitions + 1, dtype=np.uint64)).tolist()
    ordered = records[order]
    _signatures(job, number).write_bytes(found.astype("<u4").tobytes())
    write_groups(_bands(job, number), [ordered[start:stop].tobytes() for start, stop in pairwise(ends)])


def _read_signatures(job: Job, width: int, documents: UInt64Array) -> Signatures:
    """Rows of the signature files for documents in ascending order; on a local disk only their pages are read."""
    partitions, rows = split_number(documents)
    found = np.zeros((len(documents), width), dtype=np.uint32)
    for number in np.unique(partitions).tolist():
        path = _signatures(job, number)
        stored: Any = np.memmap(path.url, "<u4", "r") if path.is_local else np.frombuffer(path.read_bytes(), "<u4")
        chosen = partitions == number
        found[chosen] = stored.reshape(-1, width)[rows[chosen]]
    return found


def _write_dropped(job: Job, near_duplicates: UInt64Array) -> tuple[int, int]:
    """Write each partition's dropped rows; return the number of near-duplicates and the smallest split hash of what is left."""
    partitions, rows = split_number(near_duplicates)
    smallest = 2**64 - 1
    for number in range(job.num_partitions):
        facts = _load(_facts(job, number))
        facts["dropped"][rows[partitions == number]] = True
        if job.drops:
            _save(job.dropped(number), np.flatnonzero(facts["dropped"]))
        left = facts["split_hash"][~facts["dropped"]]
        smallest = min(smallest, int(left.min())) if len(left) else smallest
    return len(near_duplicates), smallest


def _report(job: Job, test_texts: Mapping[str, Sequence[str]], receipts: Sequence[Receipt]) -> dict[str, Any]:
    if job.held_out is None:
        return {}
    held_out = HeldOut.load(_held_out(job))
    met = np.zeros(len(held_out.ngrams), dtype=np.bool_)
    for number in range(job.num_partitions):
        met |= _load(_met(job, number))
    documents = np.sum([receipt["documents_of_task"] for receipt in receipts], axis=0)
    return contamination_report(test_texts, held_out, documents.tolist(), met, removed=job.corpus.contamination == "remove")


def _held_out(job: Job) -> Location:
    return job.work / f"held-out-{(job.held_out or '')[:16]}.npz"


def _met(job: Job, number: int) -> Location:
    return job.work / f"met-{(job.held_out or '')[:16]}-{number:06d}.npy"


def _facts(job: Job, number: int) -> Location:
    return job.work / f"facts-{number:06d}.npy"


def _signatures(job: Job, number: int) -> Location:
    return job.work / f"signatures-{number:06d}.bin"


def _bands(job: Job, number: int) -> Location:
    return job.work / f"bands-{number:06d}.bin"


def _pairs(job: Job, number: int) -> Location:
    return job.work / f"pairs-{number:06d}.npy"


def _save(path: Location, array: NDArray[Any]) -> None:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, np.asarray(array), allow_pickle=False)
    path.write_bytes(buffer.getvalue())


def _load(path: Location) -> NDArray[Any]:
    return np.lib.format.read_array(io.BytesIO(path.read_bytes()), allow_pickle=False)
