"""Statistics of a corpus: the sample is fixed and fair, fill is what packing gives."""

import numpy as np
import pytest

from data_pipeline import corpus_statistics as statistics
from data_pipeline.chunks import cut_chunks
from data_pipeline.corpus_statistics import CorpusStatistics, Distribution, corpus_statistics, expected_fill, sampled_blocks
from data_pipeline.index import CorpusIndex
from data_pipeline.prepare import Prepared


@pytest.fixture
def whole(tiny_corpus: Prepared) -> CorpusStatistics:
    return corpus_statistics(CorpusIndex.open(tiny_corpus.folder))


def test_of_a_small_corpus_everything_is_counted(whole: CorpusStatistics, tiny_corpus: Prepared) -> None:
    index, counts = CorpusIndex.open(tiny_corpus.folder), tiny_corpus.summary
    assert whole.sampled_blocks == counts["train_blocks"]
    assert whole.sampled_documents == counts["train_documents"]
    assert sum(whole.document_tokens.counts) == counts["train_documents"]
    assert sum(whole.sentence_tokens.counts) == counts["train_sentences"]
    assert whole.document_tokens.mean == pytest.approx(counts["train_tokens"] / counts["train_documents"])
    assert whole.sentence_tokens.mean == pytest.approx(counts["train_tokens"] / counts["train_sentences"])
    blocks = index.read_blocks(index.blocks("train"))
    for row in whole.rows:
        chunks = [cut_chunks(block.sentence_ends, block.document_ends, row.sequence_length) for block in blocks]
        assert sum(row.row_tokens.counts) == sum(map(len, chunks)) == row.train_samples
        assert row.row_tokens.longest <= row.sequence_length
        single = sum(int((each.stop_piece - each.first_piece == 1).sum()) for each in chunks)
        assert row.share_without_pair == pytest.approx(single / row.train_samples, abs=0.03)  # of training; the statistic is of both splits


def test_the_sample_is_fixed_and_fair(monkeypatch: pytest.MonkeyPatch, tiny_corpus: Prepared, whole: CorpusStatistics) -> None:
    assert sampled_blocks(10).tolist() == list(range(10))
    chosen = sampled_blocks(1_000_000)
    assert len(set(chosen.tolist())) == statistics.SAMPLE_BLOCKS
    assert chosen.tolist() == sampled_blocks(1_000_000).tolist()
    assert 0.3 < chosen.mean() / 1_000_000 < 0.7
    monkeypatch.setattr(statistics, "SAMPLE_BLOCKS", 6)
    sample = corpus_statistics(CorpusIndex.open(tiny_corpus.folder))
    assert sample.sampled_blocks == 6
    assert sample.document_tokens.mean == pytest.approx(whole.document_tokens.mean, rel=0.25)
    assert sample.rows[1].fill_packed[64] == pytest.approx(whole.rows[1].fill_packed[64], abs=0.05)
    assert [row.train_samples for row in sample.rows] == [row.train_samples for row in whole.rows]


def test_fill_of_known_rows() -> None:
    """Four rows of 24 and four of 8, in 32 places: padded 16 of 24 on average, packed without a gap."""
    lengths = np.array([24, 8] * 4)
    assert expected_fill(lengths, 32, samples=8) == (pytest.approx(128 / 192), 1.0)
    assert expected_fill(lengths, 32, samples=2) == (pytest.approx(128 / 192), 1.0)
    assert expected_fill(np.array([20]), 32, samples=64) == (pytest.approx(20 / 24), pytest.approx(20 / 32))


def test_fill_grows_with_the_micro_batch(whole: CorpusStatistics) -> None:
    for row in whole.rows:
        assert row.fill_packed[16] <= row.fill_packed[64] + 0.01
        assert row.fill_packed[64] <= row.fill_packed[128] + 0.01
        assert all(0 < row.fill_padded[samples] <= packed + 0.01 <= 1.01 for samples, packed in row.fill_packed.items())


@pytest.mark.parametrize("lengths", [[1], [5, 5, 5], [1, 2, 3, 1000], list(range(1, 60))])
def test_every_length_has_a_bin(lengths: list[int]) -> None:
    for limit in (None, 1000):
        found = Distribution.of(np.array(lengths), limit)
        assert sum(found.counts) == len(lengths)
        assert len(found.edges) == len(found.counts) + 1
        assert list(found.edges) == sorted(set(found.edges))
        assert (found.longest, found.median) == (max(lengths), np.median(lengths))
