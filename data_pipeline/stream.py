"""The data stream: a function from a micro-batch's number to the micro-batch, and its loader. No state is ever saved from it."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, cast

import numpy as np

from data_pipeline.chunks import Chunks, cut_chunks
from data_pipeline.config import ObjectiveConfig, Phase
from data_pipeline.errors import ConfigError, DataCorruptError, MaskwrightError
from data_pipeline.hashing import mix64
from data_pipeline.index import TOKENIZER, CorpusIndex, Split
from data_pipeline.masking import Masking
from data_pipeline.micro_batch import MicroBatch, empty_micro_batch, step_digest
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
from data_pipeline.window import Finished, finish, joined
from data_pipeline.words import continues_word

__all__ = ["MicroBatch", "MicroBatchStream", "build_loader", "empty_micro_batch", "micro_batches_of_step", "step_digest"]

_NEIGHBOURS = 8
"""Samples of a window next to each other in length that change places; more shuffle better, fewer give micro-batches of equal numbers of tokens."""
_SPLIT_KEYS: dict[Split, int] = {"train": 0, "validation": 1}


@dataclass(frozen=True)
class _Held:
    """The window that a lane of a corpus was read from last."""

    epoch: int
    first: int
    """Offset within the lane's epoch of the first sample."""
    samples: Finished


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
            num_samples = self.mixture.indexes[corpus].num_samples("validation", phase.sequence_length)
            start, stop = nth * phase.micro_batch_size, min((nth + 1) * phase.micro_batch_size, num_samples)
            parts = list(self._read(corpus, phase, 0, start, stop))
        else:
            phase = next(phase for phase in reversed(self.phases) if phase.first_micro_batch <= number)
            depth, lane = divmod(number - phase.series_first_micro_batch, phase.num_lanes)
            start, stop = depth * phase.micro_batch_size, (depth + 1) * phase.micro_batch_size
            shares = self.mixture.shares
            corpora = range(len(self.mixture))
            parts = [part for corpus in corpora for part in self._read(corpus, phase, lane, *shares.positions(corpus, start, stop))]
        samples = joined(parts)
        return MicroBatch(number, samples, LAYOUTS[self.packing](samples.lengths, phase.sequence_length), self.mixture.vocabulary.pad)

    def _read(self, corpus: int, phase: Phase, lane: int, start: int, stop: int) -> Iterator[Finished]:
        """Positions [start, stop) of a lane's infinite sequence of samples of one corpus."""
        num_samples = self.mixture.indexes[corpus].num_samples(self.split, phase.sequence_length)
        lo, hi = lane_bounds(num_samples, self._num_lanes(corpus, phase), lane)
        for span in lane_spans(hi - lo, start, stop):
            offset = span.start
            while offset < span.stop:
                held = self._window(corpus, phase, lane, span.epoch, offset)
                rows = held.samples[offset - held.first : span.stop - held.first]
                yield rows
                offset += len(rows)

    def _num_lanes(self, corpus: int, phase: Phase) -> int:
        if self.split == "validation":
            return 1
        index = self.mixture.indexes[corpus]
        num_samples = index.num_samples("train", phase.sequence_length)
        if num_samples < phase.num_lanes:
            raise ConfigError(
                f"corpus {index.folder.name} is too small: {num_samples} training samples of length {phase.sequence_length}, "
                f"but a step has {phase.num_lanes} micro-batches",
                "Use more text, a smaller batch.global_batch_size or a larger batch.micro_batch_size.",
            )
        return phase.num_lanes

    @cached_property
    def _validation_order(self) -> np.ndarray[tuple[int, int], np.dtype[np.int64]]:
        """(V, 2): corpus and place within it of each validation micro-batch; any stretch holds the corpora in proportion to their sizes."""
        phase = self.phases[-1]
        counts = [-(-index.num_samples("validation", phase.sequence_length) // phase.micro_batch_size) for index in self.mixture.indexes]
        corpus = np.repeat(np.arange(len(counts)), counts)
        nth = np.concatenate([np.arange(count) for count in counts])
        return np.stack([corpus, nth], axis=1)[np.lexsort((corpus, (nth + 0.5) / np.repeat(counts, counts)))]

    def _key(self, corpus: int, series: int, epoch: int) -> int:
        """What every hash of an epoch starts from. Validation is the same in all series and runs of a seed."""
        return int(mix64(self.seed, _SPLIT_KEYS[self.split], 0 if self.split == "validation" else series, epoch, corpus))

    def _make_epoch(self, corpus: int, series: int, sequence_length: int, epoch: int) -> Epoch:
        index = self.mixture.indexes[corpus]
        samples, tokens = index.samples_per_block(self.split, sequence_length), index.blocks(self.split)["tokens"]
        return epoch_order(samples, tokens, self._key(corpus, series, epoch))

    def _window(self, corpus: int, phase: Phase, lane: int, epoch: int, offset: int) -> _Held:
        """The lane's window that holds `offset`, from memory when it was the last one asked for."""
        if phase.series != self._series:
            self._windows, self._series = {}, phase.series
        held = self._windows.get((corpus, lane))
        if held is not None and held.epoch == epoch and 0 <= offset - held.first < len(held.samples):
            return held
        order = self._epoch(corpus, phase.series, phase.sequence_length, epoch)
        num_samples = int(order.sample_ends[-1])
        bounds = lane_bounds(num_samples, self._num_lanes(corpus, phase), lane)
        window = find_window(order, bounds, offset, blocks_per_window(num_samples, len(order.blocks)))
        samples = self._load(self.mixture.indexes[corpus], window, self._key(corpus, phase.series, epoch), phase.sequence_length)
        self._windows[corpus, lane] = _Held(epoch, window.first, samples)
        return self._windows[corpus, lane]

    def _load(self, index: CorpusIndex, window: Window, key: int, length: int) -> Finished:
        """Read, cut into chunks, pair, shuffle, lay out and mask."""
        records = index.blocks(self.split)[window.blocks]
        expected = index.samples_per_block(self.split, length)[window.blocks]
        block = join_blocks([index.read_block(record) for record in records])
        chunks = cut_chunks(block.sentence_ends, block.document_ends, length)
        if len(chunks) != int(expected.sum()):
            raise DataCorruptError(f"{index.folder}: blocks and index disagree on the number of samples", "Prepare the corpus again.")
        firsts = np.cumsum(expected, dtype=np.int64) - expected
        chunk = np.arange(len(chunks)) - np.repeat(firsts, expected)
        keys = mix64(key, np.repeat(window.blocks, expected), chunk)
        rows = slice(window.skip, window.skip + window.num_samples)
        chosen = Chunks(chunks.piece_ends, chunks.first_piece[rows], chunks.stop_piece[rows], chunks.document[rows])
        samples = make_samples(chosen, keys[rows], length, self.objective.sentence_objective)
        ordered = samples[balanced_order(samples.lengths, samples.keys, binary_spread(window.first, len(samples)), _NEIGHBOURS)]
        return finish(block.ids, ordered, index.vocabulary, self._masking)

    @cached_property
    def _masking(self) -> Masking:
        vocabulary, unit = self.mixture.vocabulary, self.objective.mask_unit
        if unit == "token":
            return Masking.of(vocabulary, self.objective.mask_rate)
        definition = (self.mixture.indexes[0].folder / TOKENIZER / "tokenizer.json").read_bytes()
        return Masking.of(vocabulary, self.objective.mask_rate, unit, continues_word(definition, vocabulary.size))


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
