"""A micro-batch as arrays, its digest, and the digest of a step that ranks can add up in any order (pure)."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from data_pipeline.chunks import IntArray
from data_pipeline.hashing import mix64
from data_pipeline.masking import Vocabulary
from data_pipeline.packing import Layout, pad_rows
from data_pipeline.pairs import NO_PAIR
from data_pipeline.window import Finished


@dataclass(frozen=True, order=True)
class SkippedBlock:
    """A damaged block that was left out, see `data.on_damage`."""

    corpus: str
    shard: str
    block: int
    """Number within the shard."""
    samples: int
    cause: str

    @property
    def name(self) -> str:
        """Which block it is, among all corpora of a run."""
        return f"{self.corpus}/{self.shard}:{self.block}"


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """B samples laid end to end, and how they are laid into R rows of T places: what the model computes does not depend on the rows."""

    number: int
    """Number within the run; -1 of an empty micro-batch."""
    samples: Finished
    layout: Layout
    pad_id: int
    skipped: tuple[SkippedBlock, ...] = ()
    """Blocks found damaged while this micro-batch was read; it and the ones after it have fewer samples."""

    @property
    def num_samples(self) -> int:
        """B."""
        return len(self.samples)

    @property
    def num_tokens(self) -> int:
        """Tokens without padding, N."""
        return len(self.samples.token_ids)

    @property
    def num_masked(self) -> int:
        """Tokens to predict, P."""
        return len(self.samples.mlm_labels)

    @property
    def num_pairs(self) -> int:
        """Samples with a sentence label."""
        return int(np.count_nonzero(self.nsp_labels != NO_PAIR))

    @property
    def fill(self) -> float:
        """Share of the R * T places that hold a token."""
        return self.num_tokens / self.layout.num_places

    @property
    def lengths(self) -> IntArray:
        """(B,) tokens of each sample, special tokens included."""
        return self.samples.lengths

    @property
    def starts(self) -> IntArray:
        """(B,) flat place in R*T of each sample's [CLS]."""
        return self.layout.starts

    @property
    def nsp_labels(self) -> IntArray:
        """(B,) 0: B follows A. 1: it does not (nsp: of another document; sop: swapped). -100: a single segment."""
        return self.samples.nsp_labels

    @property
    def mlm_labels(self) -> IntArray:
        """(P,) the tokens that were masked."""
        return self.samples.mlm_labels.astype(np.int64)

    @cached_property
    def places(self) -> IntArray:
        """(N,) flat place in R*T of each token, sample by sample."""
        return self.layout.places(self.lengths)

    @property
    def mlm_positions(self) -> IntArray:
        """(P,) flat place in R*T of each masked token, sample by sample."""
        return self.places[self.samples.mlm_positions]

    @property
    def input_ids(self) -> IntArray:
        """(R, T), masking applied, padded with [PAD]."""
        return self._rows(self.samples.token_ids, self.pad_id)

    @property
    def token_type_ids(self) -> IntArray:
        """(R, T): 1 for the second segment and its [SEP]."""
        samples = self.samples
        lengths = np.stack([samples.first_lengths, samples.lengths - samples.first_lengths], axis=1).ravel()
        return self._rows(np.repeat(np.tile([0, 1], self.num_samples), lengths), 0)

    @property
    def position_ids(self) -> IntArray:
        """(R, T): position within the sample; 0 where there is none."""
        return self._rows(np.arange(self.num_tokens) - np.repeat(np.cumsum(self.lengths) - self.lengths, self.lengths), 0)

    @property
    def sample_ids(self) -> IntArray:
        """(R, T): number of the sample from 1 to B, 0 for padding. Attention stays within equal numbers."""
        return self._rows(np.repeat(np.arange(1, self.num_samples + 1), self.lengths), 0)

    def _rows(self, values_N: NDArray[np.integer], padding: int) -> IntArray:
        flat = np.full(self.layout.num_places, padding, dtype=np.int64)
        flat[self.places] = values_N
        return flat.reshape(self.layout.num_rows, self.layout.width)

    @property
    def digest(self) -> int:
        """64 bits over token ids, segments, masks, labels and sentence labels in sample order; the layout does not enter."""
        samples = self.samples
        arrays = (samples.lengths, samples.token_ids, samples.first_lengths, samples.mlm_positions, samples.mlm_labels, samples.nsp_labels)
        digest = hashlib.blake2b(digest_size=8)
        for array in arrays:
            digest.update(len(array).to_bytes(4, "little") + array.astype("<i4").tobytes())
        return int.from_bytes(digest.digest(), "little")


def step_digest(parts: Iterable[tuple[int, int]]) -> int:
    """Digest of a step from (position within the step, digest) of its micro-batches: a sum modulo 2^64, so that ranks can add theirs up."""
    return sum(int(mix64(position, digest)) for position, digest in parts) % 2**64


def empty_micro_batch(vocabulary: Vocabulary) -> MicroBatch:
    """One row [CLS] [SEP] without labels: what a rank computes, with weight zero, when it has no micro-batch left in a step."""
    ids, length = np.array([vocabulary.cls, vocabulary.sep], dtype=np.uint32), np.array([2])
    nothing = np.zeros(0, dtype=np.int64)
    samples = Finished(ids, length, length, nothing, nothing, np.array([NO_PAIR]))
    return MicroBatch(-1, samples, pad_rows(length, 2), vocabulary.pad)
