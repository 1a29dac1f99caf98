"""The stream is a function of the micro-batch's number: pure, complete, the same for any world size, offset and worker."""

import pickle
import shutil
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import pytest

from data_pipeline.chunks import cut_chunks
from data_pipeline.config import BatchConfig, DataConfig, ObjectiveConfig, Phase, PhaseConfig
from data_pipeline.errors import ConfigError, DataCorruptError
from data_pipeline.index import CorpusIndex, Split
from data_pipeline.inspection import inspect_steps
from data_pipeline.micro_batch import MicroBatch, empty_micro_batch, step_digest
from data_pipeline.order import micro_batches_of_step, rank_micro_batches
from data_pipeline.packing import Packing, pack_rows, unpad
from data_pipeline.prepare import Prepared
from data_pipeline.shards import Block
from data_pipeline.storage import Location
from data_pipeline.stream import MicroBatchStream, build_loader
from data_pipeline.tokenizer import load_tokenizer

Segment = tuple[int, ...]


@pytest.fixture(scope="module")
def index(tiny_corpus: Prepared) -> CorpusIndex:
    return CorpusIndex.open(tiny_corpus.folder)


def _phases(
    global_batch: int = 24, micro_batch: int = 4, length: int = 32, steps: int = 1000, later: tuple[PhaseConfig, ...] = ()
) -> tuple[Phase, ...]:
    return BatchConfig(global_batch_size=global_batch, micro_batch_size=micro_batch, sequence_length=length, phases=later).phases_until(steps)


def _same(one: MicroBatch, two: MicroBatch) -> bool:
    names = ("input_ids", "token_type_ids", "position_ids", "sample_ids", "lengths", "mlm_positions", "mlm_labels", "nsp_labels")
    return one.number == two.number and all(np.array_equal(getattr(one, name), getattr(two, name)) for name in names)


def _segments(batch: MicroBatch) -> list[tuple[Segment, Segment, int]]:
    """(A, B, label) of each row, masks undone."""
    ids = batch.input_ids.copy()
    ids.reshape(-1)[batch.mlm_positions] = batch.mlm_labels
    rows: list[tuple[Segment, Segment, int]] = []
    for row, types, length, label in zip(ids, batch.token_type_ids, batch.lengths, batch.nsp_labels, strict=True):
        num_b = int(types.sum())
        a = row[1 : length - num_b - 1]
        rows.append((tuple(a.tolist()), tuple(row[length - num_b : length - 1].tolist()) if num_b else (), int(label)))
    return rows


def _epoch(stream: MicroBatchStream, phase: Phase, epoch: int) -> list[MicroBatch]:
    """With one sample per micro-batch, the micro-batches of an epoch."""
    num_samples, lanes = stream.mixture.num_samples("train", phase.sequence_length), phase.num_micro_batches
    lengths = [num_samples * (lane + 1) // lanes - num_samples * lane // lanes for lane in range(lanes)]
    return [stream[depth * lanes + lane] for lane in range(lanes) for depth in range(epoch * lengths[lane], (epoch + 1) * lengths[lane])]


def _chunks(index: CorpusIndex, length: int) -> Counter[Segment]:
    return _chunks_of(index, index.blocks("train"), length)


def _chunks_of(index: CorpusIndex, records: np.ndarray, length: int) -> Counter[Segment]:
    chunks: Counter[Segment] = Counter()
    for record in records:
        block = index.read_block(record)
        cut = cut_chunks(block.sentence_ends, block.document_ends, length)
        bounds = zip(cut.token_start(cut.first_piece), cut.token_start(cut.stop_piece), strict=True)
        chunks.update(tuple(block.ids[start:stop].tolist()) for start, stop in bounds)
    return chunks


@pytest.mark.parametrize("lanes", [5, pytest.param(1, marks=pytest.mark.full), pytest.param(64, marks=pytest.mark.full)])
def test_an_epoch_uses_every_chunk_once(index: CorpusIndex, lanes: int) -> None:
    phases = _phases(lanes, 1, 64, steps=10_000)
    stream = MicroBatchStream(index, ObjectiveConfig(sentence_objective="none"), phases, seed=5)
    expected = _chunks(index, 64)
    orders = []
    for epoch in (0, 1):
        found = [row for batch in _epoch(stream, phases[0], epoch) for row in _segments(batch)]
        assert all(b == () and label == -100 for _, b, label in found)
        assert Counter(a for a, _, _ in found) == expected
        orders.append([a for a, _, _ in found])
    assert orders[0] != orders[1]


def test_causal_samples_predict_every_next_token_of_every_chunk_once(index: CorpusIndex) -> None:
    phases = _phases(5, 1, 64, steps=10_000)
    clm, mlm = (
        MicroBatchStream(index, ObjectiveConfig.model_validate(each), phases, seed=5, packing="rows")
        for each in ("clm", {"sentence_objective": "none"})
    )
    found: Counter[Segment] = Counter()
    for batch in _epoch(clm, phases[0], 0):
        ids = batch.input_ids.reshape(-1)
        assert batch.num_masked == batch.num_tokens - 1
        assert (ids[batch.mlm_positions + 1] == batch.mlm_labels).all()
        assert (ids[0], batch.mlm_labels[-1]) == (index.vocabulary.cls, index.vocabulary.sep)
        found[tuple(batch.mlm_labels[:-1].tolist())] += 1
    assert found == _chunks(index, 64)
    assert clm[3].digest != mlm[3].digest
    assert clm[3].lengths.tolist() == mlm[3].lengths.tolist()  # the order of the samples is the same


def test_several_causal_samples_of_a_micro_batch_do_not_predict_each_other(index: CorpusIndex) -> None:
    batch = MicroBatchStream(index, ObjectiveConfig.model_validate("clm"), _phases(24, 8, 64), seed=5)[7]
    assert batch.num_masked == batch.num_tokens - batch.num_samples
    assert (batch.mlm_labels == index.vocabulary.cls).sum() == 0
    assert (batch.mlm_labels == index.vocabulary.sep).sum() == batch.num_samples


def test_pairs_of_an_epoch_cover_the_corpus(index: CorpusIndex) -> None:
    phases = _phases(4, 1, 64, steps=10_000)
    rows = [row for batch in _epoch(MicroBatchStream(index, ObjectiveConfig(), phases, seed=5), phases[0], 0) for row in _segments(batch)]
    chunks = _chunks(index, 64)
    tokens = Counter(token for chunk, count in chunks.items() for token in chunk for _ in range(count))
    assert Counter(token for a, b, _ in rows for token in a + b) == tokens
    # What is not swapped is a chunk of the corpus; what is swapped is (all but surely) not.
    assert all(a + b in chunks for a, b, label in rows if label != 1)
    swapped = [a + b in chunks for a, b, label in rows if label == 1]
    assert sum(swapped) < 0.01 * len(swapped)
    labels = [label for _, _, label in rows if label >= 0]
    assert abs(sum(labels) / len(labels) - 0.5) < 0.01


def test_same_chunk_other_masks_in_the_next_epoch(index: CorpusIndex) -> None:
    phases = _phases(2, 1, 64, steps=10_000)
    stream = MicroBatchStream(index, ObjectiveConfig(sentence_objective="none"), phases, seed=5)
    masks: list[dict[Segment, Segment]] = []
    for epoch in (0, 1):
        batches = _epoch(stream, phases[0], epoch)
        masks.append({_segments(batch)[0][0]: tuple(batch.mlm_positions.tolist()) for batch in batches if batch.num_tokens > 20})
    shared = set(masks[0]) & set(masks[1])
    assert len(shared) > 500
    assert sum(masks[0][chunk] == masks[1][chunk] for chunk in shared) < 0.1 * len(shared)


def test_layout_of_a_micro_batch(index: CorpusIndex) -> None:
    stream = MicroBatchStream(index, ObjectiveConfig(), _phases(length=64), seed=1)
    vocabulary = index.vocabulary
    for number in range(40):
        batch = stream[number]
        rows, width = batch.input_ids.shape
        assert (rows, width % 8) == (4, 0)
        assert width <= 64
        assert width - batch.lengths.max() < 8
        assert (np.diff(batch.mlm_positions) > 0).all()
        assert {array.dtype for array in (batch.input_ids, batch.token_type_ids, batch.lengths, batch.mlm_positions)} == {np.dtype(np.int64)}
        assert (batch.input_ids[:, 0] == vocabulary.cls).all()
        for row, types, length, label in zip(batch.input_ids, batch.token_type_ids, batch.lengths, batch.nsp_labels, strict=True):
            assert row[length - 1] == vocabulary.sep
            assert (row[length:] == vocabulary.pad).all()
            assert (types[length:] == 0).all()
            assert np.count_nonzero(row == vocabulary.sep) == (1 if label == -100 else 2)
            assert (types.sum() == 0) == (label == -100)
        assert batch.num_masked == len(batch.mlm_positions)
        assert batch.num_pairs == (batch.nsp_labels >= 0).sum()


def test_any_number_at_any_time_in_any_order(index: CorpusIndex) -> None:
    phases = _phases(later=(PhaseConfig(from_step=500, sequence_length=64, global_batch_size=8),))
    steady = MicroBatchStream(index, ObjectiveConfig(), phases, seed=9)
    numbers = [*range(2985, 3015), 17, 2999, 0, 3500, len(steady) - 1, 2990]
    read = {number: steady[number] for number in numbers}
    for number in numbers[::4]:
        assert _same(MicroBatchStream(index, ObjectiveConfig(), phases, seed=9)[number], read[number])
    again = pickle.loads(pickle.dumps(steady))
    assert all(_same(again[number], read[number]) for number in reversed(numbers))
    assert len({batch.digest for batch in read.values()}) == len(read)
    with pytest.raises(IndexError):
        steady[len(steady)]


def test_micro_batches_straddle_windows_and_epochs(index: CorpusIndex) -> None:
    """A lane read with micro-batches of 7 is the lane read with micro-batches of 1."""
    length = index.num_samples("train", 64) // 2
    ones = MicroBatchStream(index, ObjectiveConfig(), _phases(2, 1, 64, steps=9000), seed=3)
    sevens = MicroBatchStream(index, ObjectiveConfig(), _phases(14, 7, 64), seed=3)
    first = length // 7 - 2
    for depth in range(first, first + 5):
        expected = [row for position in range(7 * depth, 7 * depth + 7) for row in _segments(ones[2 * position])]
        assert _segments(sevens[2 * depth]) == expected
    assert pytest.approx(length, abs=20) == 7 * (first + 2)


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.full), pytest.param(2**40, marks=pytest.mark.full)])
def test_every_world_size_sees_the_same_steps(index: CorpusIndex, seed: int) -> None:
    phases = _phases(later=(PhaseConfig(from_step=300, sequence_length=64),))
    stream = MicroBatchStream(index, ObjectiveConfig(), phases, seed)
    for first_step in (0, 299, 777):
        expected = list(inspect_steps(stream, phases, first_step, 3, world_size=1, rank=None))
        assert [set(line) for line in expected] == [{"step", "digest", "num_samples", "num_tokens", "skipped_blocks"}] * 3
        assert [line["num_samples"] for line in expected] == [24] * 3
        for world_size in (2, 3, 4, 6):
            assert list(inspect_steps(stream, phases, first_step, 3, world_size, rank=None)) == expected
    parts = [next(inspect_steps(stream, phases, 777, 1, world_size=4, rank=rank)) for rank in range(4)]
    assert sum(int(part["digest"], 16) for part in parts) % 2**64 == int(expected[0]["digest"], 16)
    assert sum(part["num_tokens"] for part in parts) == expected[0]["num_tokens"]


def test_seed_rate_and_phase_matter(index: CorpusIndex) -> None:
    phases = _phases(length=64)
    digests = {
        MicroBatchStream(index, objective, phases, seed)[0].digest
        for objective, seed in [
            (ObjectiveConfig(), 0),
            (ObjectiveConfig(), 1),
            (ObjectiveConfig(mask_rate=0.3), 0),
            (ObjectiveConfig(sentence_objective="none"), 0),
        ]
    }
    assert len(digests) == 4


def test_digest_ignores_the_layout_and_sees_everything_else(index: CorpusIndex) -> None:
    batch = MicroBatchStream(index, ObjectiveConfig(), _phases(length=64), seed=1)[3]
    assert replace(batch, layout=unpad(batch.lengths, 64)).digest == replace(batch, layout=pack_rows(batch.lengths, 64)).digest == batch.digest

    def changed(**fields: Any) -> int:
        return replace(batch, samples=replace(batch.samples, **fields)).digest

    samples = batch.samples
    other_ids = samples.token_ids.copy()
    other_ids[1] += 1
    other = [
        changed(token_ids=other_ids),
        changed(mlm_labels=samples.mlm_labels + 1),
        changed(mlm_positions=np.append(samples.mlm_positions[:-1], samples.mlm_positions[-1] - 1)),
        changed(first_lengths=samples.first_lengths - 1),
        changed(nsp_labels=batch.nsp_labels[::-1] + 5),
    ]
    assert len({batch.digest, *other}) == 6


@pytest.mark.parametrize("packing", ["rows", "unpadded"])
def test_packing_changes_rows_and_nothing_else(index: CorpusIndex, packing: Packing) -> None:
    phases = _phases(64, 16, 64)
    padded, packed = (MicroBatchStream(index, ObjectiveConfig(), phases, 1, packing=each)[5] for each in ("none", packing))
    assert padded.digest == packed.digest
    assert packed.fill > padded.fill
    assert packed.fill > 0.8
    ids, types, positions, samples = (
        table.reshape(-1) for table in (packed.input_ids, packed.token_type_ids, packed.position_ids, packed.sample_ids)
    )
    assert packed.input_ids.shape[1] == 64 if packing == "rows" else packed.input_ids.shape[0] == 1
    for sample, length in enumerate(padded.lengths):
        own = np.flatnonzero(samples == sample + 1)
        assert own.tolist() == list(range(own[0], own[0] + length))
        assert own[0] == packed.starts[sample]
        assert positions[own].tolist() == list(range(length))
        assert (ids[own] == padded.input_ids[sample, :length]).all()
        assert (types[own] == padded.token_type_ids[sample, :length]).all()
    assert (ids[samples == 0] == index.vocabulary.pad).all()
    row, column = np.divmod(padded.mlm_positions, padded.layout.width)
    assert (packed.mlm_positions == packed.starts[row] + column).all()
    assert (packed.mlm_labels == padded.mlm_labels).all()


def test_micro_batches_of_a_step_have_nearly_equal_numbers_of_tokens(index: CorpusIndex) -> None:
    phases = _phases(2 * 64, 64, 64, steps=30)
    stream = MicroBatchStream(index, ObjectiveConfig(), phases, 1)
    tokens = np.array([stream[number].num_tokens for number in range(60)]).reshape(-1, 2)
    assert (tokens.max(axis=1) / tokens.min(axis=1)).mean() < 1.05


@pytest.mark.parametrize("unit", ["whole_word", "span"])
def test_words_of_the_corpus_are_masked_whole(index: CorpusIndex, unit: Literal["whole_word", "span"]) -> None:
    stream = MicroBatchStream(index, ObjectiveConfig(mask_unit=unit, mask_rate=0.2), _phases(64, 64, 64), seed=1)
    tokens: dict[int, str] = {number: token for token, number in load_tokenizer(index.tokenizer_folder).get_vocab().items()}
    masked = total = 0
    for number in range(20):
        samples = stream[number].samples
        chosen = np.zeros(len(samples.token_ids), dtype=bool)
        chosen[samples.mlm_positions] = True
        original = samples.token_ids.copy()
        original[samples.mlm_positions] = samples.mlm_labels
        words = [tokens[token] for token in original.tolist()]
        together = [place for place in range(1, len(words)) if words[place].startswith("##") and not words[place - 1].startswith("[")]
        assert together
        assert all(chosen[place] == chosen[place - 1] for place in together)
        masked, total = masked + int(chosen.sum()), total + sum(not word.startswith("[") for word in words)
    assert abs(masked / total - 0.2) < 0.01


def test_a_warm_up_of_the_batch_size_keeps_the_epoch(index: CorpusIndex) -> None:
    """Steps of 2, then 4, then 8 micro-batches read what steps of 8 from the start would have read."""
    later = (PhaseConfig(from_step=10, global_batch_size=16), PhaseConfig(from_step=20, global_batch_size=32))
    warming = _phases(8, 4, 64, later=later)
    steady = MicroBatchStream(index, ObjectiveConfig(), _phases(32, 4, 64), seed=3)
    stream = MicroBatchStream(index, ObjectiveConfig(), warming, seed=3)
    assert [len(micro_batches_of_step(warming, step)) for step in (0, 10, 20)] == [2, 4, 8]
    assert all(stream[number].digest == steady[number].digest for number in range(0, 100, 7))


def test_step_digest_depends_on_position_not_on_order() -> None:
    assert step_digest([(0, 5), (1, 7)]) == step_digest([(1, 7), (0, 5)])
    assert step_digest([(0, 5), (1, 7)]) != step_digest([(0, 7), (1, 5)])
    assert step_digest([(0, 5), (1, 7)]) == (step_digest([(0, 5)]) + step_digest([(1, 7)])) % 2**64


def test_empty_micro_batch(index: CorpusIndex) -> None:
    empty = empty_micro_batch(index.vocabulary)
    assert (empty.num_samples, empty.num_tokens, empty.num_masked, empty.num_pairs) == (1, 2, 0, 0)
    assert empty.input_ids.tolist() == [[2, 3, 0, 0, 0, 0, 0, 0]]


def test_validation_is_finite_and_fixed(index: CorpusIndex) -> None:
    phases = _phases(later=(PhaseConfig(from_step=500, sequence_length=64),))
    stream = MicroBatchStream(index, ObjectiveConfig(), phases, seed=4, split="validation")
    batches = [stream[number] for number in range(len(stream))]
    assert len(stream) == stream.num_validation_micro_batches
    assert sum(batch.num_samples for batch in batches) == index.num_samples("validation", 64)
    assert all(_same(stream[number], batches[number]) for number in reversed(range(len(stream))))
    tokens = sum(len(a) + len(b) for batch in batches for a, b, _ in _segments(batch))
    assert tokens == int(index.blocks("validation")["tokens"].sum())


def test_too_small_a_corpus_is_refused(index: CorpusIndex) -> None:
    num_samples = index.num_samples("train", 64)
    stream = MicroBatchStream(index, ObjectiveConfig(), _phases(num_samples + 1, 1, 64), seed=0)
    with pytest.raises(ConfigError, match=rf"too small: {num_samples} training samples of length 64, but a step has {num_samples + 1}"):
        stream[0]


def test_an_unprepared_length_is_refused(index: CorpusIndex) -> None:
    with pytest.raises(ConfigError, match="prepared for sequence lengths 32, 64, not 48"):
        MicroBatchStream(index, ObjectiveConfig(), _phases(length=48), seed=0)[0]


class _SummingIndex(CorpusIndex):
    """Counts how often the samples of all blocks are added up: of ten trillion tokens that is a pass over a gigabyte."""

    sums: ClassVar[Counter[tuple[str, int]]] = Counter()

    def num_samples(self, split: Split, sequence_length: int) -> int:
        self.sums[split, sequence_length] += 1
        return super().num_samples(split, sequence_length)


def test_a_micro_batch_costs_no_pass_over_the_index(index: CorpusIndex) -> None:
    summing = _SummingIndex(index.folder, index.manifest, index.fingerprint, index.records)
    phases = _phases(later=(PhaseConfig(from_step=500, sequence_length=64),))
    for split in ("train", "validation"):
        stream = MicroBatchStream(summing, ObjectiveConfig(), phases, seed=2, split=split)
        for number in range(len(stream) // 2, len(stream), len(stream) // 5):
            stream[number], stream[number - 1], stream[number // 3]
    assert set(summing.sums.values()) == {1}


class _CountingIndex(CorpusIndex):
    """Counts the bytes of the blocks that are read."""

    bytes_read: ClassVar[Counter[str]] = Counter()

    def read_block(self, record: np.void) -> Block:
        self.bytes_read["train"] += int(record["bytes"])
        return super().read_block(record)


@pytest.mark.parametrize("world_size", [1, 2])
def test_an_epoch_reads_the_corpus_about_once(index: CorpusIndex, world_size: int) -> None:
    """Two lanes over 18 blocks: only the block on the lanes' border is read twice."""
    phases = _phases(8, 4, 64)
    counting = _CountingIndex(index.folder, index.manifest, index.fingerprint, index.records)
    counting.bytes_read.clear()
    for rank in range(world_size):
        stream = MicroBatchStream(counting, ObjectiveConfig(), phases, seed=2)
        for step in range(index.num_samples("train", 64) // 8):
            numbers = micro_batches_of_step(phases, step)
            for position in rank_micro_batches(2, rank, world_size):
                stream[numbers[position]]
    assert counting.bytes_read["train"] <= 1.1 * int(index.blocks("train")["bytes"].sum())


@pytest.mark.parametrize("workers", [0, 1, pytest.param(2, marks=pytest.mark.full)])
def test_loader_keeps_the_order(index: CorpusIndex, workers: int) -> None:
    stream = MicroBatchStream(index, ObjectiveConfig(), _phases(), seed=6)
    numbers = [4, 5, 10, 11, 3]
    loaded = list(build_loader(stream, iter(numbers), workers))
    assert [batch.number for batch in loaded] == numbers
    assert all(_same(batch, stream[batch.number]) for batch in loaded)


def test_documents_are_shuffled_across_a_window(index: CorpusIndex) -> None:
    """Neighbouring samples of a lane rarely come from neighbouring chunks of one document."""
    stream = MicroBatchStream(index, ObjectiveConfig(sentence_objective="none"), _phases(1, 1, 64), seed=0)
    order = [_segments(stream[number])[0][0] for number in range(400)]
    chunks = [chunk for record in index.blocks("train") for chunk in [index.read_block(record)]]
    place: dict[Segment, int] = {}
    for block in chunks:
        cut = cut_chunks(block.sentence_ends, block.document_ends, 64)
        for start, stop in zip(cut.token_start(cut.first_piece), cut.token_start(cut.stop_piece), strict=True):
            place[tuple(block.ids[start:stop].tolist())] = len(place)
    assert sum(abs(place[one] - place[two]) == 1 for one, two in pairwise(order)) < 10


def test_damaged_blocks_are_skipped_alone_and_named(index: CorpusIndex, tmp_path: Path) -> None:
    folder = Location.at(shutil.copytree(index.folder.url, tmp_path / "corpus"))
    damaged = index.blocks("train")[[3, 7]]
    for record in damaged:
        shard = Path(folder.url) / index.manifest["shards"][int(record["shard"])]["name"]
        data = bytearray(shard.read_bytes())
        data[int(record["offset"]) + 700] ^= 1
        shard.write_bytes(data)
    phases = _phases(5, 1, 64, steps=10_000)
    objective = ObjectiveConfig(sentence_objective="none")
    with pytest.raises(DataCorruptError, match="block"):
        _epoch(MicroBatchStream(CorpusIndex.open(folder), objective, phases, seed=5), phases[0], 0)
    stream = MicroBatchStream(CorpusIndex.open(folder, DataConfig(on_damage="skip")), objective, phases, seed=5)
    for epoch in (0, 1):
        batches = _epoch(stream, phases[0], epoch)
        found = Counter(a for batch in batches if batch.num_tokens > 2 for a, _, _ in _segments(batch))
        assert found == _chunks(index, 64) - _chunks_of(index, damaged, 64)
        skipped = {(block.block, block.samples) for batch in batches for block in batch.skipped}
        assert skipped == {(int(record["number"]), int(record["samples"][1])) for record in damaged}
    for world_size in (1, 2):
        told = [name for line in inspect_steps(stream, phases, 0, len(batches) // 5, world_size, rank=None) for name in line["skipped_blocks"]]
        assert sorted(told) == sorted({block.name for batch in batches for block in batch.skipped}), "each once"
    middle = stream.mixture.num_samples("train", 64) // 2
    again = MicroBatchStream(stream.mixture, objective, phases, seed=5)[middle]
    assert again.digest == stream[middle].digest


class _DamagedIndex(CorpusIndex):
    """Every block is damaged."""

    def read_block(self, record: np.void) -> Block:
        raise DataCorruptError("damaged on purpose", "Restore it.")

    def __reduce__(self) -> tuple[Any, ...]:
        return (_DamagedIndex, (self.folder, self.manifest, self.fingerprint, np.array(self.records)))


@pytest.mark.parametrize("workers", [0, 1])
def test_loader_passes_errors_on_whole(index: CorpusIndex, workers: int) -> None:
    damaged = _DamagedIndex(index.folder, index.manifest, index.fingerprint, index.records)
    stream = MicroBatchStream(damaged, ObjectiveConfig(), _phases(), seed=6)
    with pytest.raises(DataCorruptError, match="damaged on purpose") as caught:
        next(build_loader(stream, iter([0]), workers))
    assert caught.value.remedy == "Restore it."
