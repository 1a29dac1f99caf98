"""A ledger of made-up corpora in memory: every token once an epoch at any number of lanes, in mixtures, through warm-ups and around damage."""

from collections import defaultdict
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.chunks import cut_chunks
from data_pipeline.config import BatchConfig, DataConfig, ObjectiveConfig, Phase, PhaseConfig
from data_pipeline.errors import DataCorruptError
from data_pipeline.index import CorpusIndex, record_dtype
from data_pipeline.micro_batch import MicroBatch
from data_pipeline.mixture import Mixture
from data_pipeline.pairs import SentenceObjective
from data_pipeline.shards import Block
from data_pipeline.storage import Location
from data_pipeline.stream import MicroBatchStream

LENGTH = 16
SPECIAL = 5
VOCABULARY_SIZE = 1_000_000


class _InMemory(CorpusIndex):
    """A corpus of blocks that were never written; those in `damaged` cannot be read."""

    def read_block(self, record: np.void) -> Block:
        number = int(record["number"])
        if number in self.manifest["damaged"]:
            raise DataCorruptError("damaged on purpose", "Restore it.", "train-000000.tar", number)
        return self.manifest["blocks"][number]


def _corpus(number: int, num_blocks: int, damaged: set[int]) -> _InMemory:
    """Blocks of short documents in which every token occurs once, and in no other corpus either."""
    random = np.random.default_rng(number)
    blocks: list[Block] = []
    records = np.zeros(num_blocks, dtype=record_dtype(1))
    first = SPECIAL + number * VOCABULARY_SIZE // 4
    for block_number in range(num_blocks):
        document_ends = np.cumsum(random.integers(1, 6, random.integers(1, 4)))
        sentence_ends = np.cumsum(random.integers(1, 20, document_ends[-1]))
        block = Block(np.arange(first, first + sentence_ends[-1], dtype=np.uint32), sentence_ends, document_ends)
        first += len(block.ids)
        blocks.append(block)
        num_samples = len(cut_chunks(sentence_ends, document_ends, LENGTH))
        records[block_number] = (0, 0, 0, block_number, 1, len(block.ids), len(document_ends), [num_samples])
    manifest: dict[str, Any] = {
        "sequence_lengths": [LENGTH],
        "counts": {"train_blocks": num_blocks},
        "vocabulary": {"size": VOCABULARY_SIZE, "pad": 0, "unk": 1, "cls": 2, "sep": 3, "mask": 4, "ordinary_ranges": [(SPECIAL, VOCABULARY_SIZE)]},
        "blocks": blocks,
        "damaged": damaged,
    }
    return _InMemory(Location.at(f"/nowhere/{number}"), manifest, str(number), records, DataConfig(on_damage="skip"))


def _phases(lanes: int, micro_batch: int, warm_up: int) -> tuple[Phase, ...]:
    """Steps of one micro-batch, then of all lanes."""
    later = (PhaseConfig(from_step=warm_up, global_batch_size=lanes * micro_batch),)
    return BatchConfig(global_batch_size=micro_batch, micro_batch_size=micro_batch, sequence_length=LENGTH, phases=later).phases_until(5000)


def _tokens(batch: MicroBatch) -> list[list[int]]:
    """The ordinary tokens of each sample, masks undone."""
    ids = batch.samples.token_ids.astype(np.int64)
    ids[batch.samples.mlm_positions] = batch.mlm_labels
    stops = batch.lengths.cumsum()
    return [[token for token in ids[stop - length : stop].tolist() if token >= SPECIAL] for stop, length in zip(stops, batch.lengths, strict=True)]


@settings(max_examples=25)
@given(
    st.lists(st.integers(1, 8), min_size=1, max_size=3),
    st.integers(1, 4),
    st.integers(1, 5),
    st.integers(1, 30),
    st.sampled_from(["nsp", "sop", "none"]),
    st.lists(st.floats(0.2, 1), min_size=3, max_size=3),
)
def test_every_token_once_an_epoch(
    sizes: list[int], lanes: int, micro_batch: int, warm_up: int, objective: SentenceObjective, weights: list[float]
) -> None:
    corpora = [_corpus(number, size, set()) for number, size in enumerate(sizes)]
    corpora = [corpus for corpus in corpora if corpus.num_samples("train", LENGTH) >= lanes] or [_corpus(0, 4, set())]
    mixture = Mixture(tuple(corpora), tuple(weights[: len(corpora)]))
    stream = MicroBatchStream(mixture, ObjectiveConfig(mask_rate=0.3, sentence_objective=objective), _phases(lanes, micro_batch, warm_up), seed=1)
    read: dict[tuple[int, int], list[list[int]]] = defaultdict(list)
    counts = [corpus.num_samples("train", LENGTH) for corpus in corpora]
    while any(len(read[corpus, lane]) < 2 * (count // lanes + 1) for corpus, count in enumerate(counts) for lane in range(lanes)):
        depth = max((sum(len(read[corpus, lanes - 1]) for corpus in range(len(corpora))) // micro_batch), 0)
        for lane in range(lanes):
            batch = stream[depth * lanes + lane]
            assert batch.num_samples == micro_batch
            for tokens in _tokens(batch):
                corpus = next(n for n, each in enumerate(corpora) if tokens[0] in range(each.manifest["blocks"][0].ids[0], _end(each)))
                read[corpus, lane].append(tokens)
    for corpus, count in enumerate(counts):
        ends = [count * lane // lanes for lane in range(lanes + 1)]
        for epoch in (0, 1):
            seen = [
                token
                for lane in range(lanes)
                for sample in read[corpus, lane][epoch * (ends[lane + 1] - ends[lane]) : (epoch + 1) * (ends[lane + 1] - ends[lane])]
                for token in sample
            ]
            assert sorted(seen) == list(range(corpora[corpus].manifest["blocks"][0].ids[0], _end(corpora[corpus])))


def _end(corpus: CorpusIndex) -> int:
    return int(corpus.manifest["blocks"][-1].ids[-1]) + 1


@settings(max_examples=40)
@given(st.integers(1, 10), st.integers(1, 4), st.sets(st.integers(0, 9)), st.sampled_from(["nsp", "sop", "none"]), st.integers(0, 10**6))
def test_around_damage_everything_else_is_read_once_and_purely(
    num_blocks: int, lanes: int, damaged: set[int], objective: SentenceObjective, seed: int
) -> None:
    corpus = _corpus(0, num_blocks, damaged)
    count = corpus.num_samples("train", LENGTH)
    lanes = min(lanes, count)
    phases = _phases(lanes, 1, warm_up=3)
    stream = MicroBatchStream(corpus, ObjectiveConfig(sentence_objective=objective), phases, seed)
    numbers = [depth * lanes + lane for lane in range(lanes) for depth in range(count * (lane + 1) // lanes - count * lane // lanes)]
    batches = [stream[number] for number in numbers]
    whole = [token for number, block in enumerate(corpus.manifest["blocks"]) if number not in damaged for token in block.ids.tolist()]
    assert sorted(token for batch in batches for tokens in _tokens(batch) for token in tokens) == whole
    assert {block.block for batch in batches for block in batch.skipped} == damaged & set(range(num_blocks))
    afresh = MicroBatchStream(corpus, stream.objective, phases, seed)
    assert all(afresh[number].digest == batch.digest for number, batch in list(zip(numbers, batches, strict=True))[::-3])
