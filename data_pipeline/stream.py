"""The data stream: a function from a micro-batch's number to the micro-batch, and its loader. No state is ever saved from it."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from data_pipeline.chunks import Chunks, cut_chunks
from data_pipeline.config import ObjectiveConfig, Phase
from data_pipeline.errors import ConfigError, DataCorruptError, MaskwrightError
from data_pipeline.hashing import mix64
from data_pipeline.index import CorpusIndex, Split
from data_pipeline.masking import Masking
from data_pipeline.micro_batch import MicroBatch, assemble, empty_micro_batch, step_digest
from data_pipeline.order import Epoch, Window, blocks_per_window, epoch_order, find_window, lane_bounds, lane_spans, micro_batches_of_step
from data_pipeline.pairs import Samples, make_samples
from data_pipeline.shards import Block

__all__ = ["MicroBatch", "MicroBatchStream", "build_loader", "empty_micro_batch", "micro_batches_of_step", "step_digest"]

_SPLIT_KEYS: dict[Split, int] = {"train": 0, "validation": 1}


@dataclass(frozen=True)
class LoadedWindow:
    """The samples of a window in shuffled order and the tokens that they point into."""

    first: int
    """Offset within the lane's epoch of the first sample."""
    tokens: NDArray[np.integer]
    samples: Samples


class MicroBatchStream:
    """Map-style: `stream[n]` is micro-batch n of the run, the same for every world size, worker and restart.

    Keeps the last window of every lane that it has served, about WINDOW_SAMPLES samples each, and the order of the last two epochs.
    """

    def __init__(self, index: CorpusIndex, objective: ObjectiveConfig, phases: tuple[Phase, ...], seed: int, split: Split = "train") -> None:
        self.index = index
        self.objective = objective
        self.phases = phases
        self.seed = seed
        self.split: Split = split
        self._masking: Masking | None = None
        self._windows: dict[tuple[int, int], tuple[int, LoadedWindow]] = {}  # (phase, lane) -> (epoch, window)
        self._epoch = lru_cache(maxsize=2)(self._make_epoch)

    def __getstate__(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("index", "objective", "phases", "seed", "split")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)

    def __len__(self) -> int:
        if self.split == "validation":
            return self.num_validation_micro_batches
        return sum(phase.num_steps * phase.num_micro_batches for phase in self.phases)

    @property
    def num_validation_micro_batches(self) -> int:
        """Micro-batches that cover the validation split once, in the shape of the last phase; the last one may hold fewer samples."""
        phase = self.phases[-1]
        return -(-self.index.num_samples("validation", phase.sequence_length) // phase.micro_batch_size)

    def __getitem__(self, number: int) -> MicroBatch:
        """Micro-batch `number`.

        Raises:
            IndexError: there is no such micro-batch.
            ConfigError: the corpus has fewer samples than a step has micro-batches.
            DataCorruptError: a block that is needed is damaged.
        """
        if not 0 <= number < len(self):
            raise IndexError(f"micro-batch {number} is not in 0..{len(self) - 1}")
        phase_number, lane, start, stop = self._locate(number)
        num_samples = self.index.num_samples(self.split, self.phases[phase_number].sequence_length)
        lo, hi = lane_bounds(num_samples, self._num_lanes(phase_number), lane)
        parts: list[tuple[NDArray[np.integer], Samples]] = []
        for span in lane_spans(hi - lo, start, stop):
            offset = span.start
            while offset < span.stop:
                window = self._window(phase_number, lane, span.epoch, offset)
                rows = window.samples[offset - window.first : span.stop - window.first]
                parts.append((window.tokens, rows))
                offset += len(rows)
        if self._masking is None:
            self._masking = Masking.of(self.index.vocabulary, self.objective.mask_rate)
        return assemble(number, parts, self.index.vocabulary, self._masking)

    def _locate(self, number: int) -> tuple[int, int, int, int]:
        """(phase, lane, start, stop): the samples of a micro-batch as positions in the infinite sequence of a lane."""
        if self.split == "validation":
            phase = self.phases[-1]
            start = number * phase.micro_batch_size
            stop = min(start + phase.micro_batch_size, self.index.num_samples("validation", phase.sequence_length))
            return len(self.phases) - 1, 0, start, stop
        phase_number = max(nth for nth, phase in enumerate(self.phases) if phase.first_micro_batch <= number)
        phase = self.phases[phase_number]
        depth, lane = divmod(number - phase.first_micro_batch, phase.num_micro_batches)
        return phase_number, lane, depth * phase.micro_batch_size, (depth + 1) * phase.micro_batch_size

    def _num_lanes(self, phase_number: int) -> int:
        if self.split == "validation":
            return 1
        phase = self.phases[phase_number]
        num_samples = self.index.num_samples("train", phase.sequence_length)
        if num_samples < phase.num_micro_batches:
            raise ConfigError(
                f"corpus {self.index.folder.name} is too small: {num_samples} training samples of length {phase.sequence_length}, "
                f"but a step has {phase.num_micro_batches} micro-batches",
                "Use more text, a smaller batch.global_batch_size or a larger batch.micro_batch_size.",
            )
        return phase.num_micro_batches

    def _key(self, phase_number: int, epoch: int) -> int:
        """What every hash of an epoch starts from. Validation is the same in all phases and runs of a seed."""
        return int(mix64(self.seed, _SPLIT_KEYS[self.split], 0 if self.split == "validation" else phase_number, epoch))

    def _make_epoch(self, phase_number: int, epoch: int) -> Epoch:
        samples = self.index.samples_per_block(self.split, self.phases[phase_number].sequence_length)
        return epoch_order(samples, self._key(phase_number, epoch))

    def _window(self, phase_number: int, lane: int, epoch: int, offset: int) -> LoadedWindow:
        """The lane's window that holds `offset`, from memory when it was the last one asked for."""
        held_epoch, held = self._windows.get((phase_number, lane), (-1, None))
        if held is not None and held_epoch == epoch and 0 <= offset - held.first < len(held.samples):
            return held
        length = self.phases[phase_number].sequence_length
        order = self._epoch(phase_number, epoch)
        bounds = lane_bounds(int(order.sample_ends[-1]), self._num_lanes(phase_number), lane)
        window = find_window(order, bounds, offset, blocks_per_window(int(order.sample_ends[-1]), len(order.blocks)))
        loaded = self._load(window, self._key(phase_number, epoch), length)
        self._windows = {key: value for key, value in self._windows.items() if key[0] == phase_number}
        self._windows[(phase_number, lane)] = (epoch, loaded)
        return loaded

    def _load(self, window: Window, key: int, length: int) -> LoadedWindow:
        """Read, cut into chunks, pair and shuffle."""
        records = self.index.blocks(self.split)[window.blocks]
        expected = self.index.samples_per_block(self.split, length)[window.blocks]
        block = join_blocks([self.index.read_block(record) for record in records])
        chunks = cut_chunks(block.sentence_ends, block.document_ends, length)
        if len(chunks) != int(expected.sum()):
            raise DataCorruptError(f"{self.index.folder}: blocks and index disagree on the number of samples", "Prepare the corpus again.")
        firsts = np.cumsum(expected, dtype=np.int64) - expected
        chunk = np.arange(len(chunks)) - np.repeat(firsts, expected)
        keys = mix64(key, np.repeat(window.blocks, expected), chunk)
        rows = slice(window.skip, window.skip + window.num_samples)
        chosen = Chunks(chunks.piece_ends, chunks.first_piece[rows], chunks.stop_piece[rows], chunks.document[rows])
        samples = make_samples(chosen, keys[rows], length, with_pairs=self.objective.sentence_objective == "nsp")
        return LoadedWindow(window.first, block.ids, samples[np.argsort(samples.keys, kind="stable")])


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
