"""Cuts documents at sentence boundaries into chunks that fit a row (pure)."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

SPECIAL_TOKENS = 3
"""[CLS] A [SEP] B [SEP]: what a row holds beside the tokens of its chunk. Single segments keep to the same limit, so that the
number of samples does not depend on the objective."""

IntArray = NDArray[np.int64]


@dataclass(frozen=True)
class Chunks:
    """Chunks of some documents: chunk c is the pieces first_piece[c] .. stop_piece[c]-1.

    A piece is a sentence, or a part of one that is longer than a row.
    """

    piece_ends: IntArray
    """Cumulative token ends of the pieces."""
    first_piece: IntArray
    stop_piece: IntArray
    document: IntArray
    """Document of each chunk, counted from 0."""

    def __len__(self) -> int:
        return len(self.first_piece)

    def token_start(self, piece: IntArray) -> IntArray:
        """First token of each piece; of the piece past the last one, the number of tokens."""
        return np.where(piece > 0, self.piece_ends[piece - 1], 0)


def cut_chunks(sentence_ends: NDArray[np.integer], document_ends: NDArray[np.integer], sequence_length: int) -> Chunks:
    """Pack the sentences of each document greedily into chunks of at most `sequence_length - SPECIAL_TOKENS` tokens.

    `sentence_ends` are cumulative token counts, `document_ends` cumulative sentence counts. The chunks of a document cover its tokens once.
    Documents of an odd number of tokens are packed from their end: greedy chunks begin with a sentence that did not fit before, a long one,
    and if all did, the lengths of two segments would tell their order.
    """
    limit = sequence_length - SPECIAL_TOKENS
    piece_ends, stops = _cut_long_sentences(sentence_ends.astype(np.int64), document_ends.astype(np.int64), limit)
    starts = np.concatenate([[0], stops[:-1]])
    document_of_piece = np.repeat(np.arange(len(stops)), stops - starts)
    from_end = (np.diff(piece_ends[stops - 1], prepend=0) % 2 == 1)[document_of_piece]
    mirror = (starts + stops - 1)[document_of_piece] - np.arange(len(piece_ends))
    lengths = np.diff(piece_ends, prepend=0)
    ends = np.cumsum(np.where(from_end, lengths[mirror], lengths))
    next_piece = np.minimum(np.searchsorted(ends, np.concatenate([[0], ends[:-1]]) + limit, side="right"), stops[document_of_piece])
    first = _walk(next_piece.tolist())
    stop = next_piece[first]
    mirrored = from_end[first]
    first_piece, stop_piece = np.where(mirrored, mirror[stop - 1], first), np.where(mirrored, mirror[first] + 1, stop)
    return Chunks(piece_ends, first_piece, stop_piece, document_of_piece[first])


def _cut_long_sentences(sentence_ends: IntArray, document_ends: IntArray, limit: int) -> tuple[IntArray, IntArray]:
    lengths = np.diff(sentence_ends, prepend=0)
    if not (lengths > limit).any():
        return sentence_ends, document_ends
    num_pieces = -(-lengths // limit)
    cumulative = np.cumsum(num_pieces)
    nth = np.arange(cumulative[-1]) - np.repeat(cumulative - num_pieces, num_pieces) + 1
    piece_ends = np.repeat(sentence_ends - lengths, num_pieces) + np.minimum(nth * limit, np.repeat(lengths, num_pieces))
    return piece_ends, cumulative[document_ends - 1]


def _walk(next_piece: list[int]) -> IntArray:
    """Follow the pointers from piece 0: a step per chunk, cheaper in plain Python than any array trick."""
    first: list[int] = []
    piece = 0
    while piece < len(next_piece):
        first.append(piece)
        piece = next_piece[piece]
    return np.array(first, dtype=np.int64)
