"""What a corpus looks like: its counts, and lengths and expected fill from a fixed sample of its blocks."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipeline.chunks import cut_chunks
from data_pipeline.hashing import mix64
from data_pipeline.index import CorpusIndex
from data_pipeline.packing import pack_rows, pad_rows
from data_pipeline.shards import Block

SAMPLE_BLOCKS = 64
"""Blocks that are read: quick for any corpus, and fair, since documents were shuffled over all blocks."""
MICRO_BATCH_SIZES = (16, 64, 128)
_MAX_SAMPLES = 20_000
_BINS = 32
_SAMPLE_KEY, _SHUFFLE_KEY = 0x5E11, 0x5F1E


@dataclass(frozen=True)
class Distribution:
    """Of some lengths in tokens: a few numbers, and a histogram; bin i holds the lengths edges[i] .. edges[i + 1] - 1."""

    mean: float
    median: float
    p5: float
    p95: float
    p99: float
    longest: int
    edges: tuple[int, ...]
    counts: tuple[int, ...]

    @classmethod
    def of(cls, lengths: NDArray[np.integer], limit: int | None = None) -> "Distribution":
        """The distribution of lengths of 1 or more, at least one of them: in bins of equal ratio, or of equal width up to `limit`."""
        p5, median, p95, p99 = (float(value) for value in np.quantile(lengths, (0.05, 0.5, 0.95, 0.99)))
        shortest, longest = int(lengths.min()), int(lengths.max())
        ends = np.linspace(0, limit, _BINS + 1) if limit is not None else np.geomspace(shortest, longest, _BINS + 1)
        edges = np.unique([*np.ceil(ends[:-1]).astype(np.int64), (limit or longest) + 1])
        counts, _ = np.histogram(lengths, edges)
        return cls(float(lengths.mean()), median, p5, p95, p99, longest, tuple(map(int, edges.tolist())), tuple(map(int, counts.tolist())))


@dataclass(frozen=True)
class RowStatistics:
    """Samples of one sequence length."""

    sequence_length: int
    train_samples: int
    """Of the whole corpus."""
    validation_samples: int
    share_without_pair: float
    """Samples of one sentence, which carry no label of the sentence objective; of the whole corpus."""
    row_tokens: Distribution
    """Tokens of a row of the sample, special tokens included."""
    fill_padded: dict[int, float]
    """Share of places that hold a token, by samples per micro-batch: a row each, as long as the longest."""
    fill_packed: dict[int, float]
    """The same with `batch.packing: rows`."""


@dataclass(frozen=True)
class CorpusStatistics:
    """See the fields; `counts` are those of corpus.json, of the whole corpus."""

    name: str
    fingerprint: str
    sources: tuple[str, ...]
    vocabulary_size: int
    vocabulary_asked: int | None
    """`tokenizer.vocab_size`; None where the tokenizer was given."""
    unigram_entropy: float
    shards: int
    counts: dict[str, Any]
    sampled_blocks: int
    sampled_documents: int
    """A document longer than a block lies in parts, which count here and in `document_tokens`."""
    document_tokens: Distribution
    sentence_tokens: Distribution
    rows: tuple[RowStatistics, ...]

    def to_json(self) -> dict[str, Any]:
        """JSON object with the names of the fields."""
        return asdict(self)


def corpus_statistics(index: CorpusIndex) -> CorpusStatistics:
    """Read `SAMPLE_BLOCKS` training blocks, chosen by a hash of their number: the same ones each time.

    Raises:
        DataCorruptError: one is damaged. UnreachableError: its store gave no answer in time.
    """
    chosen = sampled_blocks(len(index.blocks("train")))
    blocks = index.read_blocks(index.blocks("train")[chosen])
    documents = np.concatenate([np.diff(block.sentence_ends[block.document_ends.astype(np.int64) - 1], prepend=0) for block in blocks])
    return CorpusStatistics(
        name=index.folder.name,
        fingerprint=index.fingerprint,
        sources=tuple(str(source.get("name", source)) for source in index.manifest.get("sources", ())),
        vocabulary_size=index.vocabulary.size,
        vocabulary_asked=index.manifest["config"]["tokenizer"].get("vocab_size"),
        unigram_entropy=index.unigram_entropy,
        shards=len(index.manifest["shards"]),
        counts=dict(index.manifest["counts"]),
        sampled_blocks=len(blocks),
        sampled_documents=len(documents),
        document_tokens=Distribution.of(documents),
        sentence_tokens=Distribution.of(np.concatenate([np.diff(block.sentence_ends, prepend=0) for block in blocks])),
        rows=tuple(_row_statistics(index, blocks, nth) for nth in range(len(index.sequence_lengths))),
    )


def sampled_blocks(num_blocks: int) -> NDArray[np.int64]:
    """Numbers of the blocks to read, ascending; pure."""
    keys = mix64(_SAMPLE_KEY, np.arange(num_blocks))
    return np.sort(np.argsort(keys, kind="stable")[:SAMPLE_BLOCKS])


def expected_fill(lengths: NDArray[np.int64], sequence_length: int, samples: int) -> tuple[float, float]:
    """Share of places that hold a token when the rows of these lengths come in micro-batches of `samples`: padded, and packed; pure."""
    used = padded = packed = 0
    for start in range(0, len(lengths) - len(lengths) % samples or len(lengths), samples):
        part = lengths[start : start + samples]
        used += int(part.sum())
        padded += pad_rows(part, sequence_length).num_places
        packed += pack_rows(part, sequence_length).num_places
    return used / padded, used / packed


def _row_statistics(index: CorpusIndex, blocks: Sequence[Block], nth: int) -> RowStatistics:
    length = index.sequence_lengths[nth]
    rows = np.concatenate([_row_tokens(block, length) for block in blocks])
    rows = rows[np.argsort(mix64(_SHUFFLE_KEY, np.arange(len(rows))), kind="stable")][:_MAX_SAMPLES]
    fill = {samples: expected_fill(rows, length, samples) for samples in MICRO_BATCH_SIZES}
    train, validation = index.num_samples("train", length), index.num_samples("validation", length)
    pairs = int(index.manifest["counts"]["train_pairs"][nth]) + int(index.manifest["counts"]["validation_pairs"][nth])
    return RowStatistics(
        sequence_length=length,
        train_samples=train,
        validation_samples=validation,
        share_without_pair=round(1 - pairs / max(train + validation, 1), 6),
        row_tokens=Distribution.of(rows, limit=length),
        fill_padded={samples: round(padded, 4) for samples, (padded, _) in fill.items()},
        fill_packed={samples: round(packed, 4) for samples, (_, packed) in fill.items()},
    )


def _row_tokens(block: Block, length: int) -> NDArray[np.int64]:
    """Tokens of each row, with [CLS] and a [SEP] behind each segment."""
    chunks = cut_chunks(block.sentence_ends, block.document_ends, length)
    tokens = chunks.token_start(chunks.stop_piece) - chunks.token_start(chunks.first_piece)
    return tokens + 2 + (chunks.stop_piece - chunks.first_piece > 1)
