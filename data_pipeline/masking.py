"""Chooses the tokens to predict: by stateless hashes tokens, whole words or spans, 80 % [MASK], 10 % random, 10 % kept; or each next one (pure)."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from data_pipeline.chunks import IntArray
from data_pipeline.errors import ConfigError
from data_pipeline.hashing import UInt64Array, mix64, threshold64

MaskUnit = Literal["token", "whole_word", "span"]

_CHOOSE, _REPLACE, _LENGTH = 11, 12, 13
_HALF_WORD = np.uint64(32)
_LOW = np.uint64(0xFFFFFFFF)
_MAX_SPAN_WORDS = 10
_SPAN_STOP = 0.2
"""Span lengths are geometric with this, cut at 10 words: 3.8 on average (Joshi et al. 2020, section 3.1)."""


@dataclass(frozen=True)
class Vocabulary:
    """Token ids that have a meaning of their own, and the ordinary ones, which can be masked and drawn as replacements."""

    size: int
    pad: int
    unk: int
    cls: int
    sep: int
    mask: int | None
    """None: the tokenizer is made for causal models."""
    ordinary_ranges: tuple[tuple[int, int], ...]
    """Ordinary ids as ascending [start, stop) ranges: every real token that is neither special nor a placeholder."""

    @property
    def ordinary_ids(self) -> IntArray:
        """All ordinary ids, ascending."""
        return np.concatenate([np.arange(start, stop) for start, stop in self.ordinary_ranges])


@dataclass(frozen=True)
class Masking:
    """Tables for masking with one vocabulary, unit and rate."""

    mask_id: int
    is_ordinary: NDArray[np.bool_]
    ordinary_ids: IntArray
    rate: float
    unit: MaskUnit
    continues_word: NDArray[np.bool_] | None
    """For each id, whether the token continues the word of the token before, which special tokens never do; None when the unit is the token."""

    @classmethod
    def of(cls, vocabulary: Vocabulary, mask_rate: float, unit: MaskUnit = "token", continues_word: NDArray[np.bool_] | None = None) -> "Masking":
        """Tables for `vocabulary`; each ordinary token is chosen with probability `mask_rate`, whatever the unit.

        Raises:
            ConfigError: the vocabulary has no mask token.
        """
        if vocabulary.mask is None:
            raise ConfigError("the corpus' tokenizer has no mask token", "Choose `objective: clm`, or a tokenizer made for masked language models.")
        if unit != "token" and continues_word is None:
            raise ValueError(f"masking by {unit} needs to know which tokens continue a word")
        ordinary_ids = vocabulary.ordinary_ids
        is_ordinary = np.zeros(vocabulary.size, dtype=np.bool_)
        is_ordinary[ordinary_ids] = True
        continues = None if continues_word is None else continues_word & is_ordinary
        return cls(vocabulary.mask, is_ordinary, ordinary_ids, mask_rate, unit, continues)


@dataclass(frozen=True)
class Tokens:
    """Samples laid end to end, special tokens included."""

    ids: NDArray[np.integer]
    """(N,)"""
    lengths: IntArray
    """(B,) tokens of each sample."""
    second_starts: IntArray
    """(B,) position within its sample of the first token after the first segment's [SEP]: where a second segment would start."""
    keys: UInt64Array
    """(B,) identity of each sample within the run."""


def mask_tokens(tokens: Tokens, masking: Masking) -> tuple[IntArray, NDArray[np.integer]]:
    """Mask `tokens.ids` in place; return the positions chosen, (P,) ascending, and the tokens that were there.

    What happens to a sample depends on its key and its tokens only, not on its neighbours.
    """
    hashes = _position_hashes(tokens)
    chosen, unit_hashes = _UNITS[masking.unit](tokens, hashes, masking)
    positions = np.flatnonzero(chosen & masking.is_ordinary[tokens.ids])
    labels = tokens.ids[positions]
    action = mix64(unit_hashes[positions], _REPLACE)
    share = (action >> _HALF_WORD).astype(np.float64) / 2**32
    draw = action if masking.unit == "token" else mix64(hashes[positions], _REPLACE)
    drawn = ((draw & _LOW) * np.uint64(len(masking.ordinary_ids))) >> _HALF_WORD
    replaced = np.where(share < 0.8, masking.mask_id, np.where(share < 0.9, masking.ordinary_ids[drawn.astype(np.int64)], labels))
    tokens.ids[positions] = replaced.astype(tokens.ids.dtype)
    return positions, labels


def next_tokens(tokens: Tokens) -> tuple[IntArray, NDArray[np.integer]]:
    """What causal language modelling predicts: from every token but the last of a sample the next one. Returns as `mask_tokens` does."""
    ends = np.cumsum(tokens.lengths)
    positions = np.delete(np.arange(int(ends[-1])), ends - 1)
    return positions, tokens.ids[positions + 1]


def _position_hashes(tokens: Tokens) -> UInt64Array:
    ends = np.cumsum(tokens.lengths)
    within = np.arange(int(ends[-1])) - np.repeat(ends - tokens.lengths, tokens.lengths)
    return mix64(np.repeat(mix64(tokens.keys, _CHOOSE), tokens.lengths) ^ within.astype(np.uint64))


def _by_token(tokens: Tokens, hashes: UInt64Array, masking: Masking) -> tuple[NDArray[np.bool_], UInt64Array]:
    """Each token by its own hash (Devlin et al. 2019)."""
    del tokens
    return hashes < threshold64(masking.rate), hashes


def _by_word(tokens: Tokens, hashes: UInt64Array, masking: Masking) -> tuple[NDArray[np.bool_], UInt64Array]:
    """All tokens of a word by the hash of its first; each draws its own replacement, as in BERT's whole-word release."""
    is_first, word = _words(tokens, masking)
    return (hashes[is_first] < threshold64(masking.rate))[word], hashes


def _by_span(tokens: Tokens, hashes: UInt64Array, masking: Masking) -> tuple[NDArray[np.bool_], UInt64Array]:
    """Spans of whole words that share the action of their start; a span keeps to its segment (SpanBERT, Joshi et al. 2020).

    Every word, and ten places before each segment, may start a span; so a word at a segment's start is chosen as often as any other.
    """
    _, word = _words(tokens, masking)
    sample_starts = np.cumsum(tokens.lengths) - tokens.lengths
    segment_starts = np.stack([sample_starts, sample_starts + np.minimum(tokens.second_starts, tokens.lengths - 1)], axis=1).ravel()
    num_words = np.diff(word[segment_starts], append=word[-1] + 1)
    num_slots = num_words + _MAX_SPAN_WORDS  # ten places, then the words
    segment_slots = np.cumsum(num_slots) - num_slots
    within = np.arange(int(num_slots.sum())) - np.repeat(segment_slots, num_slots)
    keys = np.stack([mix64(tokens.keys, _LENGTH), mix64(tokens.keys, _LENGTH, 1)], axis=1).ravel()
    slots = mix64(np.repeat(keys, num_slots) ^ within.astype(np.uint64))
    starts = np.flatnonzero(slots < threshold64(span_start_probability(masking.rate)))
    lengths = np.searchsorted(_span_length_ends(), (mix64(slots[starts], _LENGTH) >> _HALF_WORD).astype(np.float64) / 2**32, side="right") + 1
    # Of the spans begun so far the one that reaches furthest covers a slot, if any does; none reaches over the ten places of a gap.
    reach = np.zeros(len(slots), dtype=np.int64)
    reach[starts] = ((starts + lengths) << 32) | starts
    slot_of_word = np.arange(int(num_words.sum())) + np.repeat(np.arange(1, len(num_words) + 1) * _MAX_SPAN_WORDS, num_words)
    furthest = np.maximum.accumulate(reach)[slot_of_word]
    covered = (furthest >> 32) > slot_of_word
    return covered[word], slots[furthest & 0xFFFFFFFF][word]


_UNITS: dict[MaskUnit, Callable[[Tokens, UInt64Array, Masking], tuple[NDArray[np.bool_], UInt64Array]]] = {
    "token": _by_token,
    "whole_word": _by_word,
    "span": _by_span,
}
"""Each returns, by token, whether it is chosen, and the hash that decides between [MASK], a random token and itself."""


def _words(tokens: Tokens, masking: Masking) -> tuple[NDArray[np.bool_], IntArray]:
    """(whether a token is the first of its word, word of each token). Special tokens are words: a word never crosses them."""
    assert masking.continues_word is not None
    continues = masking.continues_word[tokens.ids]
    continues[1:] &= masking.is_ordinary[tokens.ids[:-1]]
    continues[0] = False
    is_first = ~continues
    return is_first, np.cumsum(is_first) - 1


@cache
def span_start_probability(rate: float) -> float:
    """Probability with which a span starts at a word such that a word is covered with probability `rate`.

    A word stays uncovered when none of the last ten places starts a span that reaches it: 1 - rate = prod over k of (1 - p P(length > k)).
    """
    longer = 1 - np.concatenate([[0.0], _span_length_ends()])
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if 1 - np.prod(1 - middle * longer) < rate else (low, middle)
    return low


@cache
def _span_length_ends() -> NDArray[np.float64]:
    """P(length <= 1), …, P(length <= 9) of the geometric distribution cut at 10."""
    share = _SPAN_STOP * (1 - _SPAN_STOP) ** np.arange(_MAX_SPAN_WORDS)
    return np.cumsum(share / share.sum())[:-1]
