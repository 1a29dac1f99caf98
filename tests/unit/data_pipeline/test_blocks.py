"""Blocks hold whole documents, or parts of documents that are longer than a block."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.blocks import cut_blocks
from data_pipeline.encoding import EncodedDocuments

DOCUMENTS = st.lists(st.lists(st.integers(1, 30), min_size=1, max_size=40), min_size=1, max_size=20)


@given(DOCUMENTS, st.integers(10, 400))
def test_blocks_cover_the_documents_and_are_of_bounded_size(documents: list[list[int]], block_tokens: int) -> None:
    sentences = np.array([length for document in documents for length in document])
    encoded = EncodedDocuments(np.arange(sentences.sum(), dtype=np.uint32), sentences, np.array([len(document) for document in documents]))
    blocks = list(cut_blocks(encoded, block_tokens))
    assert np.concatenate([block.ids for block in blocks]).tolist() == encoded.ids.tolist()
    lengths = np.concatenate([np.diff(block.sentence_ends.astype(np.int64), prepend=0) for block in blocks])
    assert lengths.tolist() == sentences.tolist()
    longest = int(sentences.max())
    assert all(len(block.ids) < 2 * block_tokens + longest for block in blocks)
    assert all(len(block.ids) >= block_tokens for block in blocks[:-1])

    ends = set(np.cumsum(encoded.document_lengths).tolist())
    first = 0
    for block in blocks:
        inside = {first + int(end) for end in block.document_ends}
        last = first + len(block.sentence_ends)
        assert inside - {last} == {end for end in ends if first < end < last}  # one document is one document in its block
        assert last in inside
        first = last
    assert (
        len(blocks) == 1
        or max(sum(document) for document in documents) > block_tokens
        or all(sum(len(block.sentence_ends) for block in blocks[: nth + 1]) in ends for nth in range(len(blocks)))
    )


def test_a_document_is_cut_only_where_a_block_is_full() -> None:
    encoded = EncodedDocuments(np.zeros(70, dtype=np.uint16), np.array([10, 10, 10, 10, 10, 10, 10]), np.array([2, 5]))
    assert [block.document_ends.tolist() for block in cut_blocks(encoded, 50)] == [[2, 7]]
    assert [block.document_ends.tolist() for block in cut_blocks(encoded, 25)] == [[2, 5], [2]]
    assert [block.document_ends.tolist() for block in cut_blocks(encoded, 15)] == [[2], [2], [3]]
