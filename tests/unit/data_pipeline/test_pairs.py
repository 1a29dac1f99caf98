"""Next-sentence pairs: half are swapped, everything is used once, and lengths do not tell the label."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.metrics import roc_auc_score

from data_pipeline.chunks import SPECIAL_TOKENS, Chunks, cut_chunks
from data_pipeline.hashing import mix64
from data_pipeline.pairs import IN_ORDER, IS_NEXT, IS_RANDOM, NO_PAIR, SWAPPED, Samples, SentenceObjective, choose_partners, make_samples


def _chunks(num_documents: int, sequence_length: int, seed: int) -> Chunks:
    """Sentences log-normal around 20 tokens, documents log-normal around 12 sentences, as in English prose."""
    generator = np.random.Generator(np.random.PCG64(seed))
    num_sentences = np.maximum(1, np.round(generator.lognormal(2.5, 0.9, num_documents))).astype(int)
    lengths = np.clip(np.round(generator.lognormal(3, 0.6, num_sentences.sum())), 2, 120).astype(int)
    return cut_chunks(np.cumsum(lengths), np.cumsum(num_sentences), sequence_length)


def _samples(num_documents: int, sequence_length: int, seed: int, objective: SentenceObjective = "nsp") -> Samples:
    chunks = _chunks(num_documents, sequence_length, seed)
    return make_samples(chunks, mix64(seed, np.arange(len(chunks))), sequence_length, objective)


@given(st.integers(1, 60), st.sampled_from([16, 32, 128]), st.integers(0, 10**6))
def test_every_segment_is_used_once_and_fits(num_documents: int, sequence_length: int, seed: int) -> None:
    chunks = _chunks(num_documents, sequence_length, seed)
    samples = make_samples(chunks, mix64(seed, np.arange(len(chunks))), sequence_length, "nsp")
    segments = [(start, start + length) for start, length in zip(samples.a_start, samples.a_length, strict=True)]
    segments += [(start, start + length) for start, length in zip(samples.b_start, samples.b_length, strict=True) if length]
    segments.sort()
    assert segments[0][0] == 0
    assert segments[-1][1] == chunks.piece_ends[-1]
    assert all(left[1] == right[0] for left, right in pairwise(segments))
    assert samples.lengths.max() <= sequence_length
    assert (samples.a_length > 0).all()
    assert ((samples.b_length == 0) == (samples.labels == NO_PAIR)).all()
    follows = samples.b_start == samples.a_start + samples.a_length
    assert (follows[samples.labels == IS_NEXT]).all()
    document_of_token = np.repeat(chunks.document, chunks.token_start(chunks.stop_piece) - chunks.token_start(chunks.first_piece))
    random = samples.labels == IS_RANDOM
    assert (document_of_token[samples.a_start[random]] != document_of_token[samples.b_start[random]]).all()


@given(st.integers(0, 10**6), st.integers(2, 300))
def test_half_of_the_pairs_are_swapped(seed: int, num_pairs: int) -> None:
    generator = np.random.Generator(np.random.PCG64(seed))
    a_length, b_length = generator.integers(1, 20, num_pairs), generator.integers(1, 20, num_pairs)
    partner = choose_partners(a_length, b_length, np.arange(num_pairs), mix64(seed, np.arange(num_pairs)), limit=64)
    assert (partner[partner] == np.arange(num_pairs)).all()
    assert abs(np.count_nonzero(partner != np.arange(num_pairs)) - num_pairs / 2) <= 1


def test_one_document_gives_no_negatives() -> None:
    samples = make_samples(cut_chunks(np.arange(10, 400, 10), np.array([39]), 32), mix64(np.arange(20)), 32, "nsp")
    assert set(samples.labels.tolist()) <= {IS_NEXT, NO_PAIR}


def test_without_pairs_a_chunk_is_one_segment() -> None:
    chunks = _chunks(20, 64, 0)
    samples = make_samples(chunks, mix64(np.arange(len(chunks))), 64, "none")
    assert set(samples.labels.tolist()) == {NO_PAIR}
    assert (samples.a_length == chunks.token_start(chunks.stop_piece) - chunks.token_start(chunks.first_piece)).all()
    assert samples.lengths.max() <= 64 - SPECIAL_TOKENS + 2


@given(st.integers(1, 60), st.sampled_from([16, 32, 128]), st.integers(0, 10**6))
def test_sentence_order_swaps_the_segments_of_half_of_the_pairs(num_documents: int, sequence_length: int, seed: int) -> None:
    straight, ordered = (_samples(num_documents, sequence_length, seed, objective) for objective in ("nsp", "sop"))
    is_pair = ordered.labels != NO_PAIR
    assert (is_pair == (straight.labels != NO_PAIR)).all()
    first, second = ordered.a_start + ordered.a_length == ordered.b_start, ordered.b_start + ordered.b_length == ordered.a_start
    assert (first[ordered.labels == IN_ORDER]).all()
    assert (second[ordered.labels == SWAPPED]).all()
    assert abs(int((ordered.labels == SWAPPED).sum()) - is_pair.sum() / 2) <= 0.5
    assert ordered.lengths.max() <= sequence_length
    assert ordered.a_length.sum() + ordered.b_length.sum() == straight.a_length.sum() + straight.b_length.sum()


def test_windows_of_few_pairs_are_balanced_together() -> None:
    """Small corpora and many lanes make windows of a pair or two: what an odd one has too many of is left to a hash."""
    labels = np.concatenate([_samples(1, 64, seed, "sop").labels for seed in range(1500)])
    assert abs(labels[labels != NO_PAIR].mean() - 0.5) < 0.03


def test_other_keys_give_other_pairs() -> None:
    chunks = _chunks(100, 128, 0)
    one, two = (make_samples(chunks, mix64(epoch, np.arange(len(chunks))), 128, "nsp") for epoch in (0, 1))
    assert (one.labels != two.labels).any()
    assert (one.a_length != two.a_length).any()


@pytest.mark.parametrize(
    ("sequence_length", "num_documents", "num_windows"),
    [
        (128, 400, 24),
        (512, 1200, 24),
        pytest.param(64, 250, 60, marks=pytest.mark.full),
        pytest.param(128, 100, 200, marks=pytest.mark.full),
        pytest.param(512, 3000, 30, marks=pytest.mark.full),
    ],
)
@pytest.mark.parametrize("objective", ["nsp", "sop"])
def test_lengths_do_not_tell_the_label(sequence_length: int, num_documents: int, num_windows: int, objective: SentenceObjective) -> None:
    windows = [_samples(num_documents, sequence_length, seed, objective) for seed in range(num_windows)]
    pairs = [samples[np.flatnonzero(samples.labels != NO_PAIR)] for samples in windows]
    a, b = (np.concatenate([getattr(samples, name) for samples in pairs]) for name in ("a_length", "b_length"))
    labels = np.concatenate([samples.labels for samples in pairs])
    assert abs(labels.mean() - 0.5) < 0.01
    features = np.stack([a, b, a + b, a - b], axis=1)
    half = len(labels) // 2
    classifier = HistGradientBoostingClassifier(max_iter=30).fit(features[:half], labels[:half])
    assert roc_auc_score(labels[half:], classifier.predict_proba(features[half:])[:, 1]) < 0.52
    if objective == "sop":
        return
    full = a + b == sequence_length - SPECIAL_TOKENS  # rows without room are where a careless swap shows
    assert abs(labels[full].mean() - 0.5) < 0.1
