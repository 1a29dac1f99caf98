"""The chunk rule: chunks cover every document once, in order, and fit a row."""

from itertools import pairwise

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.chunks import SPECIAL_TOKENS, cut_chunks

DOCUMENTS = st.lists(st.lists(st.integers(1, 90), min_size=1, max_size=12), min_size=1, max_size=12)


def _greedy(documents: list[list[int]], limit: int) -> list[tuple[int, int, int, int]]:
    """(document, first token, token past the last, pieces) of each chunk: the rule, written as a loop; documents of odd length from their end."""
    chunks: list[tuple[int, int, int, int]] = []
    before = 0
    for number, sentences in enumerate(documents):
        pieces = [min(limit, length - cut) for length in sentences for cut in range(0, length, limit)]
        total = sum(pieces)
        start = size = count = 0
        for piece in pieces if total % 2 == 0 else reversed(pieces):
            if size + piece > limit:
                chunks.append((number, start, start + size, count))
                start, size, count = start + size, 0, 0
            size, count = size + piece, count + 1
        chunks.append((number, start, start + size, count))
        for at, (owner, first, last, pieces_in) in enumerate(chunks):
            if owner == number:
                low, high = (first, last) if total % 2 == 0 else (total - last, total - first)
                chunks[at] = (owner, before + low, before + high, pieces_in)
        before += total
    return chunks


@given(DOCUMENTS, st.integers(16, 64))
def test_chunks_are_the_greedy_ones(documents: list[list[int]], sequence_length: int) -> None:
    sentence_ends = np.cumsum([length for sentences in documents for length in sentences]).astype(np.uint32)
    document_ends = np.cumsum([len(sentences) for sentences in documents]).astype(np.uint32)
    chunks = cut_chunks(sentence_ends, document_ends, sequence_length)
    start, stop = chunks.token_start(chunks.first_piece), chunks.token_start(chunks.stop_piece)
    found = list(zip(chunks.document, start, stop, chunks.stop_piece - chunks.first_piece, strict=True))
    assert [tuple(map(int, chunk)) for chunk in found] == _greedy(documents, sequence_length - SPECIAL_TOKENS)
    assert ((stop - start) <= sequence_length - SPECIAL_TOKENS).all()
    bounds = sorted(zip(start.tolist(), stop.tolist(), strict=True))
    assert bounds[0][0] == 0
    assert bounds[-1][1] == sentence_ends[-1]
    assert all(one[1] == two[0] for one, two in pairwise(bounds))
