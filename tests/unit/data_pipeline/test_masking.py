"""Masking: rates, units, special tokens, purity."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.hashing import mix64
from data_pipeline.masking import Masking, MaskUnit, Tokens, Vocabulary, mask_tokens, span_start_probability

VOCABULARY = Vocabulary(size=1200, pad=0, unk=1, cls=2, sep=3, mask=4, ordinary_ranges=((5, 900), (950, 1200)))
CONTINUES = np.arange(1200) >= 800  # a third of the ordinary tokens
UNITS: list[MaskUnit] = ["token", "whole_word", "span"]


def _masking(unit: MaskUnit, rate: float = 0.15) -> Masking:
    return Masking.of(VOCABULARY, rate, unit, CONTINUES)


def _tokens(num_samples: int, seed: int, longest: int = 128) -> Tokens:
    """Pairs of different lengths: [CLS] A [SEP] B [SEP]; every seventh token is [UNK]."""
    lengths = (mix64(seed, 1, np.arange(num_samples)) % np.uint64(longest - 15)).astype(np.int64) + 16
    firsts = lengths // 3 + 2
    ends = np.cumsum(lengths)
    ids = VOCABULARY.ordinary_ids[(mix64(seed, 2, np.arange(ends[-1])) % np.uint64(1145)).astype(np.int64)]
    ids[::7] = VOCABULARY.unk
    ids[ends - lengths], ids[ends - lengths + firsts - 1], ids[ends - 1] = VOCABULARY.cls, VOCABULARY.sep, VOCABULARY.sep
    return Tokens(ids.astype(np.uint16), lengths, firsts, mix64(seed, 99, np.arange(num_samples)))


def _masked(tokens: Tokens, masking: Masking) -> tuple[Tokens, np.ndarray, np.ndarray]:
    copy = replace(tokens, ids=tokens.ids.copy())
    return copy, *mask_tokens(copy, masking)


@pytest.mark.parametrize("rate", [0.15, 0.4])
@pytest.mark.parametrize("unit", UNITS)
def test_rates_and_replacements(unit: MaskUnit, rate: float) -> None:
    tokens = _tokens(6000, 0)
    masked, positions, labels = _masked(tokens, _masking(unit, rate))
    assert (np.diff(positions) > 0).all()
    assert (tokens.ids[positions] == labels).all()
    ordinary = np.isin(tokens.ids, VOCABULARY.ordinary_ids)
    assert abs(len(positions) / ordinary.sum() - rate) < 0.004
    now = masked.ids[positions]
    assert abs((now == VOCABULARY.mask).mean() - 0.8) < 0.012
    assert abs((now == labels).mean() - 0.1) < 0.012
    random = now[(now != VOCABULARY.mask) & (now != labels)]
    assert set(np.unique(random)) <= set(VOCABULARY.ordinary_ids)
    assert len(np.unique(random)) > 1000  # drawn from the whole vocabulary, not from the tokens of the batch
    assert random.max() > 1190
    untouched = np.ones(len(tokens.ids), dtype=bool)
    untouched[positions] = False
    assert (masked.ids[untouched] == tokens.ids[untouched]).all()


@pytest.mark.parametrize("unit", UNITS)
def test_every_place_of_a_row_is_chosen_as_often(unit: MaskUnit) -> None:
    """Spans that could only start inside a segment would spare its first words."""
    tokens = _tokens(30_000, 3, longest=40)
    _, positions, _ = _masked(tokens, _masking(unit, 0.2))
    chosen = np.zeros(len(tokens.ids), dtype=bool)
    chosen[positions] = True
    ordinary = np.isin(tokens.ids, VOCABULARY.ordinary_ids)
    starts = np.cumsum(tokens.lengths) - tokens.lengths
    for place in (starts + 1, starts + 2, starts + tokens.second_starts, starts + tokens.second_starts + 1, starts + tokens.lengths - 2):
        there = place[ordinary[place]]
        assert abs(chosen[there].mean() - 0.2) < 0.012


@given(st.integers(0, 10**6), st.sampled_from([0.05, 0.15, 0.9]), st.sampled_from(UNITS))
def test_special_tokens_are_never_chosen(seed: int, rate: float, unit: MaskUnit) -> None:
    _, _, labels = _masked(_tokens(8, seed), _masking(unit, rate))
    assert not set(labels.tolist()) & {0, 1, 2, 3, 4}


@given(st.integers(0, 10**6), st.integers(0, 5), st.sampled_from(UNITS))
def test_a_sample_does_not_depend_on_its_neighbours(seed: int, sample: int, unit: MaskUnit) -> None:
    tokens, masking = _tokens(6, seed), _masking(unit)
    together, _, _ = _masked(tokens, masking)
    stop = int(np.cumsum(tokens.lengths)[sample])
    own, rows = slice(stop - int(tokens.lengths[sample]), stop), slice(sample, sample + 1)
    alone, _, _ = _masked(Tokens(tokens.ids[own], tokens.lengths[rows], tokens.second_starts[rows], tokens.keys[rows]), masking)
    assert (alone.ids == together.ids[own]).all()


@pytest.mark.parametrize("unit", UNITS)
def test_other_keys_give_other_masks(unit: MaskUnit) -> None:
    tokens = _tokens(50, 0)
    _, first, _ = _masked(tokens, _masking(unit))
    _, second, _ = _masked(replace(tokens, keys=mix64(tokens.keys, 1)), _masking(unit))
    assert len(set(first.tolist()) & set(second.tolist())) < 0.3 * len(first)


def _words(tokens: Tokens) -> np.ndarray:
    """Number of each token's word, by the definition: a continuation belongs to the token before, unless that is special."""
    words: list[int] = []
    for place, token in enumerate(tokens.ids.tolist()):
        glued = place > 0 and CONTINUES[token] and tokens.ids[place - 1] in VOCABULARY.ordinary_ids
        words.append(words[-1] if glued else len(words))
    return np.array(words)


@pytest.mark.parametrize("unit", ["whole_word", "span"])
def test_words_are_chosen_whole(unit: MaskUnit) -> None:
    tokens = _tokens(300, 5)
    _, positions, _ = _masked(tokens, _masking(unit, 0.3))
    words = _words(tokens)
    assert np.isin(words, words[positions]).sum() == len(positions)
    sizes = np.bincount(words[positions])
    assert sizes.max() >= 3


@pytest.mark.parametrize("unit", ["whole_word", "span"])
def test_special_tokens_are_words_of_their_own(unit: MaskUnit) -> None:
    """Where words begin with a mark, as in byte-level BPE, the names of special tokens have none: they look like continuations."""
    tokens, looks_continued = _tokens(300, 5), CONTINUES.copy()
    looks_continued[:5] = True
    masked, positions, _ = _masked(tokens, _masking(unit, 0.3))
    marked, marked_positions, _ = _masked(tokens, Masking.of(VOCABULARY, 0.3, unit, looks_continued))
    assert (positions.tolist(), masked.ids.tolist()) == (marked_positions.tolist(), marked.ids.tolist())


def test_spans_are_as_long_as_spanbert_says_and_keep_to_their_segment() -> None:
    tokens = _tokens(4000, 6)
    masked, positions, _ = _masked(replace(tokens, ids=np.where(CONTINUES[tokens.ids] | (tokens.ids == 1), 7, tokens.ids)), _masking("span", 0.05))
    chosen = np.zeros(len(masked.ids), dtype=bool)
    chosen[positions] = True
    runs = np.diff(np.flatnonzero(np.diff(np.concatenate([[0], chosen.view(np.int8), [0]]))))[::2]
    assert 3.5 < runs.mean() < 4.3  # 3.8, a little more where two spans touch, less at the ends of segments
    assert (runs <= 10).mean() > 0.97
    one_action = np.flatnonzero(chosen[1:] & chosen[:-1])
    is_mask = masked.ids == VOCABULARY.mask
    assert (is_mask[one_action] == is_mask[one_action + 1]).mean() > 0.97  # a span shares its action


def test_span_start_probability_gives_the_rate() -> None:
    for rate in (0.05, 0.15, 0.4, 0.8):
        longer = [sum(0.8**k for k in range(length, 10)) / sum(0.8**k for k in range(10)) for length in range(10)]
        uncovered = np.prod([1 - span_start_probability(rate) * share for share in longer])
        assert 1 - uncovered == pytest.approx(rate, abs=1e-9)


def test_words_need_a_table() -> None:
    with pytest.raises(ValueError, match="which tokens continue a word"):
        Masking.of(VOCABULARY, 0.15, "span")
