"""The data stream: a function from a micro-batch's number to the micro-batch, and its loader. No state is ever saved from it."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cache, cached_property, lru_cache, partial
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from data_pipeline.chunks import Chunks, cut_chunks
from data_pipeline.config import ObjectiveConfig, Phase
from data_pipeline.errors import ConfigError, DataCorruptError, MaskwrightError
from data_pipeline.hashing import mix64
from data_pipeline.index import TOKENIZER, CorpusIndex, Split
from data_pipeline.masking import Masking, mask_tokens, next_tokens
from data_pipeline.micro_batch import MicroBatch, SkippedBlock, empty_micro_batch, step_digest
from data_pipeline.mixture import Mixture
from data_pipeline.order import (
    Epoch,
    Window,
    balanced_order,
    binary_spread,
    blocks_per_window,
    epoch_order,
    find_window,
    lane_bounds,
    lane_spans,
    micro_batches_of_step,
)
from data_pipeline.packing import LAYOUTS, Packing
from data_pipeline.pairs import make_samples
from data_pipeline.shards import Block
from data_pipeline.window import EMPTY, Choose, Finished, finish, joined
from data_pipeline.words import continues_word

__all__ = ["MicroBatch", "MicroBatchStream", "build_loader", "empty_micro_batch", "micro_batches_of_step", "step_digest"]

_NEIGHBOURS = 8
"""Samples of a window next to each other in length that change places; more shuffle better, fewer give micro-batches of equal numbers of tokens."""
_SPLIT_KEYS: dict[Split, int] = {"train": 0, "validation": 1}


@dataclass
class _Held:
    """The window that a lane of a corpus was read from last."""

    epoch: int
    window: Window
    samples: Finished
    """Fewer than the window has places where blocks were skipped."""
    skipped: tuple[SkippedBlock, ...]
    """Not yet told of."""
    is_next_wanted: bool = True
    """Whether nobody has asked yet for the blocks of the window after it."""

    def rows(self, start: int, stop: int) -> Finished:
        """The samples at places [start, stop) of the window: as many as places, but for skipped ones, whose gaps are spread evenly."""
        first, last = (place * len(self.samples) // self.window.num_samples for place in (start, stop))
        return self.samples[first:last]


class MicroBatchStream:
    """Map-style: `stream[n]` is micro-batch n of the run, the same for every world size, worker and restart.

    Keeps the last window of every lane that it has served, about WINDOW_SAMPLES samples each, and the order of the last two epochs.
    """

    def __init__(
        self,
        corpora: CorpusIndex | Mixture,
        objective: ObjectiveConfig,
        phases: tuple[Phase, ...],
        seed: int,
        split: Split = "train",
        packing: Packing = "none",
    ) -> None:
        self.mixture = Mixture.of(corpora) if isinstance(corpora, CorpusIndex) else corpora
        self.objective = objective
        self.phases = phases
        self.seed = seed
        self.split: Split = split
        self.packing: Packing = packing
        self._series = -1  # of the windows held
        self._windows: dict[tuple[int, int], _Held] = {}  # by (corpus, lane)
        self._epoch = lru_cache(maxsize=2 * len(self.mixture))(self._make_epoch)
        self._num_samples = cache(self._count_samples)

    def __reduce__(self) -> tuple[Any, ...]:
        return (MicroBatchStream, (self.mixture, self.objective, self.phases, self.seed, self.split, self.packing))

    def __len__(self) -> int:
        if self.split == "validation":
            return self.num_validation_micro_batches
        return sum(phase.num_steps * phase.num_micro_batches for phase in self.phases)

    @property
    def num_validation_micro_batches(self) -> int:
        """Micro-batches that cover the validation split once, in the shape of the last phase; a corpus' last one may hold fewer samples."""
        return len(self._validation_order)

    def __getitem__(self, number: int) -> MicroBatch:
        """Micro-batch `number`.

        Raises:
            IndexError: there is no such micro-batch.
            ConfigError: a corpus has fewer samples than there are lanes, or its tokenizer does not suit `objective.mask_unit`.
            DataCorruptError: a block that is needed is damaged.
        """
        if not 0 <= number < len(self):
            raise IndexError(f"micro-batch {number} is not in 0..{len(self) - 1}")
        if self.split == "validation":
            phase = self.phases[-1]
            corpus, nth = self._validation_order[number].tolist()
            start = nth * phase.micro_batch_size
            stop = min(start + phase.micro_batch_size, self._num_samples(corpus, "validation", phase.sequence_length))
            held = list(self._read(corpus, phase, 0, start, stop))
        else:
            phase = next(phase for phase in reversed(self.phases) if phase.first_micro_batch <= number)
            depth, lane = divmod(number - phase.series_first_micro_batch, phase.num_lanes)
            start, stop = depth * phase.micro_batch_size, (depth + 1) * phase.micro_batch_size
            turn = lane * phase.micro_batch_size  # micro-batches side by side continue the pattern, so that every step holds the corpora by weight
            places = [self.mixture.shares.positions(corpus, start, stop, turn) for corpus in range(len(self.mixture))]
            held = [each for corpus, (first, last) in enumerate(places) for each in self._read(corpus, phase, lane, first, last)]
        parts, skipped = [part for part, _ in held if len(part)], tuple(block for _, blocks in held for block in blocks)
        if not parts:
            return replace(empty_micro_batch(self.mixture.vocabulary), number=number, skipped=skipped)
        samples, layout = joined(parts), LAYOUTS[self.packing]
        return MicroBatch(number, samples, layout(samples.lengths, phase.sequence_length), self.mixture.vocabulary.pad, skipped)

    def forget_windows(self) -> None:
        """Give up the memory of all lanes, for who is done with them; what is asked for next is read again."""
        self._windows.clear()

    def _read(self, corpus: int, phase: Phase, lane: int, start: int, stop: int) -> Iterator[tuple[Finished, tuple[SkippedBlock, ...]]]:
        """Positions [start, stop) of a lane's infinite sequence of samples of one corpus, and blocks that were found damaged on the way."""
        num_samples = self._num_samples(corpus, self.split, phase.sequence_length)
        lo, hi = lane_bounds(num_samples, self._num_lanes(corpus, phase), lane)
        for span in lane_spans(hi - lo, start, stop):
            offset = span.start
            while offset < span.stop:
                held = self._window(corpus, phase, lane, span.epoch, offset)
                end = held.window.first + held.window.num_samples
                last = min(span.stop, end)
                yield held.rows(offset - held.window.first, last - held.window.first), held.skipped
                held.skipped = ()
                if held.is_next_wanted and 2 * (end - last) < held.window.num_samples:
                    self._prefetch(corpus, phase, lane, *((span.epoch, end) if end < hi - lo else (span.epoch + 1, 0)))
                    held.is_next_wanted = False
                offset = last

    def _num_lanes(self, corpus: int, phase: Phase) -> int:
        if self.split == "validation":
            return 1
        num_samples = self._num_samples(corpus, "train", phase.sequence_length)
        if num_samples < phase.num_lanes:
            raise ConfigError(
                f"corpus {self.mixture.indexes[corpus].folder.name} is too small: {num_samples} training samples of length {phase.sequence_length}, "
                f"but a step has {phase.num_lanes} micro-batches",
                "Use more text, a smaller batch.global_batch_size or a larger batch.micro_batch_size.",
            )
        return phase.num_lanes

    @cached_property
    def _validation_order(self) -> np.ndarray[tuple[int, int], np.dtype[np.int64]]:
        """(V, 2): corpus and place within it of each validation micro-batch; any stretch holds the corpora in proportion to their sizes."""
        phase = self.phases[-1]
        sizes = [self._num_samples(corpus, "validation", phase.sequence_length) for corpus in range(len(self.mixture))]
        counts = [-(-size // phase.micro_batch_size) for size in sizes]
        corpus = np.repeat(np.arange(len(counts)), counts)
        nth = np.concatenate([np.arange(count) for count in counts])
        return np.stack([corpus, nth], axis=1)[np.lexsort((corpus, (nth + 0.5) / np.repeat(counts, counts)))]

    def _key(self, corpus: int, series: int, epoch: int) -> int:
        """What every hash of an epoch starts from. Validation is the same in all series and runs of a seed."""
        return int(mix64(self.seed, _SPLIT_KEYS[self.split], 0 if self.split == "validation" else series, epoch, corpus))

    def _count_samples(self, corpus: int, split: Split, sequence_length: int) -> int:
        """Samples of an epoch of one corpus; a pass over its whole index."""
        return self.mixture.indexes[corpus].num_samples(split, sequence_length)

    def _make_epoch(self, corpus: int, series: int, sequence_length: int, epoch: int) -> Epoch:
        index = self.mixture.indexes[corpus]
        samples, tokens = index.samples_per_block(self.split, sequence_length), index.blocks(self.split)["tokens"]
        return epoch_order(samples, tokens, self._key(corpus, series, epoch))

    def _window(self, corpus: int, phase: Phase, lane: int, epoch: int, offset: int) -> _Held:
        """The lane's window that holds `offset`, from memory when it was the last one asked for."""
        if phase.series != self._series:
            self._windows, self._series = {}, phase.series
        held = self._windows.get((corpus, lane))
        if held is None or held.epoch != epoch or not 0 <= offset - held.window.first < held.window.num_samples:
            window = self._find(corpus, phase, lane, epoch, offset)
            key = self._key(corpus, phase.series, epoch)
            held = _Held(epoch, window, *self._load(self.mixture.indexes[corpus], window, key, phase.sequence_length))
            self._windows[corpus, lane] = held
        return held

    def _find(self, corpus: int, phase: Phase, lane: int, epoch: int, offset: int) -> Window:
        order = self._epoch(corpus, phase.series, phase.sequence_length, epoch)
        num_samples = int(order.sample_ends[-1])
        bounds = lane_bounds(num_samples, self._num_lanes(corpus, phase), lane)
        return find_window(order, bounds, offset, blocks_per_window(num_samples, len(order.blocks)))

    def _prefetch(self, corpus: int, phase: Phase, lane: int, epoch: int, offset: int) -> None:
        """Ask a store for the blocks of a lane's next window, when half of the present one is used."""
        index = self.mixture.indexes[corpus]
        if not index.folder.is_local:
            index.prefetch(index.blocks(self.split)[self._find(corpus, phase, lane, epoch, offset).blocks])

    def _load(self, index: CorpusIndex, window: Window, key: int, length: int) -> tuple[Finished, tuple[SkippedBlock, ...]]:
        """Read, cut into chunks, pair, shuffle, lay out and mask; blocks that were skipped leave no samples."""
        records = index.blocks(self.split)[window.blocks]
        expected = index.samples_per_block(self.split, length)[window.blocks]
        blocks, skipped = self._read_blocks(index, records, expected)
        if not blocks:
            return EMPTY, skipped
        block = join_blocks(list(blocks.values()))
        chunks = cut_chunks(block.sentence_ends, block.document_ends, length)
        # Places of the window's blocks one after the other; those of skipped blocks have no chunk.
        firsts = np.cumsum(expected, dtype=np.int64) - expected
        present = np.array(list(blocks))
        counts = expected[present]
        if len(chunks) != int(counts.sum()):
            raise DataCorruptError(f"{index.folder}: blocks and index disagree on the number of samples", "Prepare the corpus again.")
        nth = np.arange(len(chunks)) - np.repeat(np.cumsum(counts, dtype=np.int64) - counts, counts)
        place = nth + np.repeat(firsts[present], counts)
        rows = np.flatnonzero((place >= window.skip) & (place < window.skip + window.num_samples))
        if not len(rows):
            return EMPTY, skipped
        keys = mix64(key, np.repeat(window.blocks[present], counts), nth)[rows]
        chosen = Chunks(chunks.piece_ends, chunks.first_piece[rows], chunks.stop_piece[rows], chunks.document[rows])
        samples = make_samples(chosen, keys, length, self.objective.sentence_objective)
        ordered = samples[balanced_order(samples.lengths, samples.keys, binary_spread(window.first, len(samples)), _NEIGHBOURS)]
        return finish(block.ids, ordered, index.vocabulary, self._choose), skipped

    def _read_blocks(
        self, index: CorpusIndex, records: NDArray[np.void], expected: NDArray[np.integer]
    ) -> tuple[dict[int, Block], tuple[SkippedBlock, ...]]:
        """Blocks by their place in the window; under `data.on_damage: skip` without damaged ones. An unreachable store is no damage."""
        if index.settings.on_damage == "fail":
            return dict(enumerate(index.read_blocks(records))), ()
        index.prefetch(records)
        blocks: dict[int, Block] = {}
        skipped: list[SkippedBlock] = []
        for place, record in enumerate(records):
            try:
                blocks[place] = index.read_block(record)
            except DataCorruptError as error:
                if error.shard is None or error.block is None:
                    raise
                skipped.append(SkippedBlock(index.folder.name, error.shard, error.block, int(expected[place]), error.cause))
        return blocks, tuple(skipped)

    @cached_property
    def _choose(self) -> Choose:
        if self.objective.kind == "clm":
            return next_tokens
        vocabulary, unit, continues = self.mixture.vocabulary, self.objective.mask_unit, None
        if unit != "token":
            definition = (self.mixture.indexes[0].folder / TOKENIZER / "tokenizer.json").read_bytes()
            continues = continues_word(definition, vocabulary.size)
        return partial(mask_tokens, masking=Masking.of(vocabulary, self.objective.mask_rate, unit, continues))


def join_blocks(blocks: list[Block]) -> Block:
    """Several blocks as one; pure."""
    num_tokens = np.cumsum([0, *(len(block.ids) for block in blocks)])
    num_sentences = np.cumsum([0, *(len(block.sentence_ends) for block in blocks)])
    return Block(
        np.concatenate([block.ids for block in blocks]),
        np.concatenate([block.sentence_ends + start for block, start in zip(blocks, num_tokens, strict=False)]),
        np.concatenate([block.document_ends + start for block, start in zip(blocks, num_sentences, strict=False)]),
    )


def build_loader(stream: MicroBatchStream, numbers: Iterable[int], workers: int) -> Iterator[MicroBatch]:
    """Micro-batches of `numbers`, in that order, under the stock DataLoader: 0 workers make them here, others ahead of time."""
    from torch.utils.data import DataLoader

    dataset: Any = _Errors(stream)
    collate: Any = _unchanged
    loader = DataLoader(
        dataset,
        sampler=numbers,
        batch_size=None,
        collate_fn=collate,
        num_workers=workers,
        multiprocessing_context="forkserver" if workers else None,
    )
    return _raising(cast("Iterable[MicroBatch | MaskwrightError]", loader))


@dataclass(frozen=True)
class _Errors:
    """The stream with known errors as values: torch would make a RuntimeError of one that a worker raises, and its remedy would be lost."""

    stream: MicroBatchStream

    def __getitem__(self, number: int) -> MicroBatch | MaskwrightError:
        try:
            return self.stream[number]
        except MaskwrightError as error:
            return error


def _raising(results: Iterable[MicroBatch | MaskwrightError]) -> Iterator[MicroBatch]:
    for result in results:
        if isinstance(result, MaskwrightError):
            raise result
        yield result


def _unchanged(result: MicroBatch | MaskwrightError) -> MicroBatch | MaskwrightError:
    return result
