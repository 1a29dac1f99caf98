"""Near-duplicates by MinHash and banding: signatures, candidates, verified pairs, groups (pure).

A document is the set of its runs of `shingle_words` words. Two documents agree in a place of their signatures with the probability of their
Jaccard similarity (Broder 1997); they become candidates when they agree in all places of a band. Nothing depends on how documents lie in partitions.
"""

from collections.abc import Callable, Sequence
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipeline.config import NearDuplicatesConfig
from data_pipeline.hashing import UInt64Array, mix64
from data_pipeline.ngrams import ngram_hashes

BAND_RECORD = np.dtype([("band", "<u8"), ("document", "<u8")])
"""A band of a signature, hashed with its number, and the document's number (`document_number`)."""
_SEED = 1
_HIGH = np.uint64(32)

Signatures = NDArray[np.uint32]


def document_number(partition: int, rows: NDArray[np.integer]) -> UInt64Array:
    """Number of the documents at `rows` of a hash partition: ascending in the order of the documents' keys."""
    return rows.astype(np.uint64) | (np.uint64(partition) << _HIGH)


def split_number(documents: UInt64Array) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Partitions and rows, see `document_number`."""
    return (documents >> _HIGH).astype(np.int64), (documents & np.uint64(2**32 - 1)).astype(np.int64)


def signatures(documents: Sequence[UInt64Array], config: NearDuplicatesConfig) -> Signatures:
    """MinHash signatures (documents × permutations) of documents given as hashes of their words; a short document is one shingle."""
    from datasketch import MinHash

    permutations: Any = MinHash(config.num_permutations, seed=_SEED, scheme="affine32").permutations
    result = np.zeros((len(documents), config.num_permutations), dtype=np.uint32)
    for row, words in enumerate(documents):
        shingles = ngram_hashes(words, min(config.shingle_words, max(len(words), 1))) >> _HIGH
        minhash: Any = MinHash(config.num_permutations, seed=_SEED, scheme="affine32", permutations=permutations, hashfunc=int)
        minhash.update_batch(shingles.tolist())
        result[row] = minhash.hashvalues
    return result


@cache
def band_shape(threshold: float, num_permutations: int) -> tuple[int, int]:
    """(bands, places in each) that err least, false candidates and missed pairs together, at the threshold."""
    from datasketch import MinHashLSH

    lsh: Any = MinHashLSH(threshold=threshold, num_perm=num_permutations)
    return int(lsh.b), int(lsh.r)


def band_records(found: Signatures, documents: UInt64Array, config: NearDuplicatesConfig) -> NDArray[np.void]:
    """A record for each band of each document."""
    num_bands, width = band_shape(config.threshold, config.num_permutations)
    records = np.zeros((num_bands, len(documents)), dtype=BAND_RECORD)
    for band in range(num_bands):
        records["band"][band] = mix64(band, *found[:, band * width : (band + 1) * width].T)
        records["document"][band] = documents
    return records.ravel()


def candidates(records: NDArray[np.void]) -> list[UInt64Array]:
    """Groups of two or more documents that share a band, each ascending, without repetition."""
    ordered = np.sort(records, order=("band", "document"))
    bounds = np.flatnonzero(np.concatenate([[True], ordered["band"][1:] != ordered["band"][:-1], [True]])) if len(ordered) else np.zeros(0, np.int64)
    groups = {tuple(ordered["document"][start:stop].tolist()) for start, stop in pairwise(bounds.tolist()) if stop - start > 1}
    return [np.array(group, dtype=np.uint64) for group in sorted(groups)]


def verified_pairs(groups: Sequence[UInt64Array], look_up: Callable[[UInt64Array], Signatures], threshold: float) -> UInt64Array:
    """Pairs (rows of two, the smaller first) whose estimated similarity reaches the threshold.

    In a group the smallest document is compared with all others, then the smallest of those unlike it with the rest, and so on: enough to
    connect what is alike, without comparing all with all.
    """
    members = np.unique(np.concatenate(groups)) if groups else np.zeros(0, dtype=np.uint64)
    found = look_up(members)
    pairs: set[tuple[int, int]] = set()
    for group in groups:
        rest = group
        while len(rest) > 1:
            places = np.searchsorted(members, rest)
            alike = (found[places[1:]] == found[places[0]]).mean(axis=1) >= threshold
            pairs.update((int(rest[0]), int(other)) for other in rest[1:][alike])
            rest = rest[1:][~alike]
    return np.array(sorted(pairs), dtype=np.uint64).reshape(-1, 2)


def redundant(pairs: UInt64Array) -> UInt64Array:
    """All documents of each connected group but the smallest, ascending."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    if not len(pairs):
        return np.zeros(0, dtype=np.uint64)
    documents, ends = np.unique(pairs, return_inverse=True)
    ends = ends.reshape(-1, 2)
    graph: Any = coo_array((np.ones(len(ends), dtype=np.bool_), (ends[:, 0], ends[:, 1])), shape=(len(documents), len(documents)))
    group: NDArray[np.integer] = connected_components(graph, directed=False)[1]
    first = np.unique(group, return_index=True)[1]  # of each group the smallest, because documents are ascending
    return np.delete(documents, first)
