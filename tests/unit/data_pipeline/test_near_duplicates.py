"""MinHash: estimates are right, groups connect, and nothing depends on how documents lie in partitions."""

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.config import NearDuplicatesConfig
from data_pipeline.hashing import UInt64Array, mix64
from data_pipeline.near_duplicates import band_records, band_shape, candidates, document_number, redundant, signatures, split_number, verified_pairs
from data_pipeline.ngrams import ngram_hashes, word_hashes
from tests.support.text import generate_documents

CONFIG = NearDuplicatesConfig()


def _redundant(documents: Sequence[UInt64Array], config: NearDuplicatesConfig = CONFIG) -> list[int]:
    found = signatures(documents, config)
    numbers = np.arange(len(documents), dtype=np.uint64)
    groups = candidates(band_records(found, numbers, config))
    return redundant(verified_pairs(groups, lambda wanted: found[wanted.astype(np.int64)], config.threshold)).tolist()


def _words(text: str) -> UInt64Array:
    return word_hashes([text])[0]


@pytest.mark.parametrize("shared", [100, 300, 450])
def test_the_estimate_is_the_jaccard_similarity(shared: int) -> None:
    config = NearDuplicatesConfig(num_permutations=1024, shingle_words=1)
    left, right = np.arange(500), np.arange(500 - shared, 1000 - shared)
    first, second = signatures([mix64(left), mix64(right)], config)
    assert (first == second).mean() == pytest.approx(shared / (1000 - shared), abs=0.06)


def test_bands_find_what_is_alike_and_little_else() -> None:
    num_bands, width = band_shape(0.8, 128)
    assert num_bands * width <= 128
    found_at = {similarity: 1 - (1 - similarity**width) ** num_bands for similarity in (0.5, 0.95)}
    assert found_at[0.5] < 0.05
    assert found_at[0.95] > 0.95


def test_a_changed_copy_is_found_and_another_text_is_not() -> None:
    texts = [text for text in generate_documents(60, 3) if len(text.split()) > 150][:8]
    copies = [text.replace(text.split()[70], "otherwise", 1) for text in texts]
    documents = [_words(text) for text in [*texts, *copies]]
    assert _redundant(documents) == list(range(len(texts), 2 * len(texts)))


def test_a_chain_of_alike_documents_is_one_group() -> None:
    pairs = np.array([[1, 5], [5, 9], [2, 3], [3, 9 << 32]], dtype=np.uint64)
    assert redundant(pairs).tolist() == [3, 5, 9, 9 << 32]
    assert redundant(pairs[:0]).tolist() == []


def test_a_group_is_connected_although_its_smallest_member_is_like_none_of_the_others() -> None:
    sign = np.array([[1, 1, 1, 1], [2, 2, 2, 2], [2, 2, 2, 2]], dtype=np.uint32)
    group = np.arange(3, dtype=np.uint64)
    assert verified_pairs([group], lambda wanted: sign[wanted.astype(np.int64)], 0.8).tolist() == [[1, 2]]


@given(st.lists(st.sampled_from(generate_documents(6, 4)), min_size=2, max_size=8), st.permutations(range(8)))
def test_the_order_of_records_does_not_matter(texts: list[str], order: list[int]) -> None:
    records = band_records(signatures([_words(text) for text in texts], CONFIG), np.arange(len(texts), dtype=np.uint64), CONFIG)
    shuffled = np.concatenate([records[place :: len(order)] for place in order])
    assert [group.tolist() for group in candidates(records)] == [group.tolist() for group in candidates(shuffled)]


def test_numbers_of_documents() -> None:
    numbers = document_number(3, np.array([0, 7]))
    assert [each.tolist() for each in split_number(numbers)] == [[3, 3], [0, 7]]
    assert document_number(2, np.array([2**32 - 1]))[0] < numbers[0]


def test_normalised_words() -> None:
    assert _words("The Cat's, the—CAT").tolist() == _words("the cat s the cat").tolist()
    assert len(_words("日本語 is 3")) == 5
    assert len(_words("... — !")) == 0
    together = word_hashes(["one\ntwo", "", "three", "\n", "two one"])
    assert [len(each) for each in together] == [2, 0, 1, 0, 2]
    assert together[0].tolist() == together[4][::-1].tolist()
    assert word_hashes([]) == []


@given(st.lists(st.integers(0, 3), max_size=30), st.integers(1, 5))
def test_equal_runs_have_equal_hashes(words: list[int], n: int) -> None:
    hashes = ngram_hashes(np.array(words, dtype=np.uint64), n).tolist()
    runs = [tuple(words[start : start + n]) for start in range(len(words) - n + 1)]
    assert len(hashes) == len(runs)
    assert len(set(hashes)) == len(set(runs))
