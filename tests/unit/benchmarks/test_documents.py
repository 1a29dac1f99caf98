"""The neutral documents are the same text as our blocks, and plain Python makes the same kind of samples from them."""

import random
from itertools import pairwise
from pathlib import Path

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.contestants.assembly import windows, without_separators
from benchmarks.contestants.documents import Documents, with_separators, write_documents
from benchmarks.contestants.hugging_face import cut, encode, examples, sentences, split_pair

SEP, CLS = 3, 2

_DOCUMENTS = st.lists(st.lists(st.lists(st.integers(5, 99), min_size=1, max_size=12), min_size=1, max_size=6), min_size=1, max_size=6)


def _arrays(documents: list[list[list[int]]]) -> list[np.ndarray]:
    flat = [sentence for document in documents for sentence in document]
    ids = np.array([token for sentence in flat for token in sentence], dtype="<u2")
    sentence_ends = np.cumsum([len(sentence) for sentence in flat]).astype("<u4")
    document_ends = np.cumsum([len(document) for document in documents]).astype("<u4")
    return list(with_separators(ids, sentence_ends, document_ends, SEP))


@given(_DOCUMENTS)
def test_separators_keep_documents_and_sentences(documents: list[list[list[int]]]) -> None:
    arrays = _arrays(documents)
    assert [sentences(array, SEP) for array in arrays] == documents


@given(_DOCUMENTS)
def test_our_masking_gets_the_sentences_back(documents: list[list[list[int]]]) -> None:
    tokens, sentence_ends, document_ends = without_separators(_arrays(documents), SEP)
    cut_at = [0, *sentence_ends.tolist()]
    found = [tokens[start:end].tolist() for start, end in pairwise(cut_at)]
    starts = [0, *document_ends.tolist()]
    assert [found[start:end] for start, end in pairwise(starts)] == documents


def test_windows_hold_every_document_once() -> None:
    arrays = [np.arange(length) for length in (5, 1, 9, 2, 2)]
    found = list(windows(iter(arrays), 6))
    assert [[len(array) for array in window] for window in found] == [[5, 1], [9], [2, 2]]


def test_documents_are_written_and_opened(tmp_path: Path) -> None:
    arrays = _arrays([[[5, 6], [7]], [[8, 9, 10]]])
    write_documents(tmp_path / "documents", iter(arrays), {"sep": SEP})
    opened = Documents.open(tmp_path / "documents")
    assert len(opened) == 2
    assert [array.tolist() for array in opened] == [[5, 6, 3, 7, 3], [8, 9, 10, 3]]
    assert opened.vocabulary == {"sep": SEP}


@given(_DOCUMENTS, st.integers(4, 20))
def test_chunks_cover_the_document_and_fit(documents: list[list[list[int]]], limit: int) -> None:
    for document in documents:
        chunks = list(cut(document, limit))
        assert [token for chunk in chunks for piece in chunk for token in piece] == [token for sentence in document for token in sentence]
        assert all(sum(map(len, chunk)) <= limit for chunk in chunks)


def test_a_pair_is_a_chunk_cut_between_two_pieces() -> None:
    first, second = split_pair([[5], [6, 7], [8]], random.Random(1))
    assert [*first, *(second or [])] == [5, 6, 7, 8]
    assert split_pair([[5, 6]], random.Random(1)) == ([5, 6], None)


def test_an_encoded_pair() -> None:
    example = encode([5, 6], [7], 1, CLS, SEP)
    assert example["input_ids"] == [CLS, 5, 6, SEP, 7, SEP]
    assert example["token_type_ids"] == [0, 0, 0, 0, 1, 1]
    assert example["special_tokens_mask"] == [1, 0, 0, 1, 0, 1]
    assert example["next_sentence_label"] == 1


@given(_DOCUMENTS)
def test_rows_fit_and_singles_have_no_label(documents: list[list[list[int]]]) -> None:
    for example in examples(iter(_arrays(documents)), CLS, SEP, 16):
        assert len(example["input_ids"]) <= 16
        assert len(example["input_ids"]) == len(example["token_type_ids"]) == len(example["special_tokens_mask"])
        assert (example["next_sentence_label"] == -100) == (sum(example["token_type_ids"]) == 0)
