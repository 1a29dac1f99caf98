"""Several corpora as one: which positions of a lane come from which corpus, exactly by weight (the arithmetic is pure)."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from data_pipeline.config import DataConfig
from data_pipeline.errors import ConfigError, DataCorruptError
from data_pipeline.index import CorpusIndex, Split
from data_pipeline.masking import Vocabulary
from data_pipeline.storage import Location

FORMAT_VERSION = 1
MIXTURE = "mixture.json"
HORIZON = 1000
"""Samples of a lane over which the corpora's shares are exact."""


@dataclass(frozen=True)
class Shares:
    """A pattern of HORIZON positions, each of one corpus, repeated for ever. Lanes begin at different places of it."""

    counts: tuple[int, ...]
    """Positions of each corpus in the pattern."""
    before: NDArray[np.int64]
    """(C, HORIZON + 1) positions of each corpus among the first p of the pattern."""

    @classmethod
    def of(cls, weights: Sequence[float]) -> "Shares":
        """Counts by largest remainder, spread evenly: each position goes to the corpus that is furthest behind its share.

        Raises:
            ConfigError: a weight so small that its corpus would never be read.
        """
        exact = np.array(weights, dtype=np.float64) / sum(weights) * HORIZON
        counts = np.floor(exact).astype(np.int64)
        counts[np.argsort(counts - exact, kind="stable")[: HORIZON - int(counts.sum())]] += 1
        if not counts.all():
            raise ConfigError(
                f"mixture weights {', '.join(f'{weight:g}' for weight in weights)}: the smallest is less than 1 in {HORIZON} samples",
                "Raise it or leave the corpus out.",
            )
        used = np.zeros_like(counts)
        before = [used.copy()]
        for position in range(HORIZON):
            used[np.argmax(counts * (position + 1) - used * HORIZON)] += 1
            before.append(used.copy())
        return cls(tuple(counts.tolist()), np.stack(before, axis=1))

    def positions(self, corpus: int, start: int, stop: int, turn: int) -> tuple[int, int]:
        """What positions [start, stop) of a lane are in the lane's sequence of samples of one corpus. The lane begins `turn` places into the
        pattern."""
        before, first, last = (self._before(corpus, turn + position) for position in (0, start, stop))
        return first - before, last - before

    def _before(self, corpus: int, position: int) -> int:
        return position // HORIZON * self.counts[corpus] + int(self.before[corpus, position % HORIZON])


@dataclass(frozen=True)
class Mixture:
    """One or more opened corpora with one tokenizer, and the weights by which samples are drawn from them."""

    indexes: tuple[CorpusIndex, ...]
    weights: tuple[float, ...]

    @classmethod
    def open(cls, folder: Location, settings: DataConfig | None = None) -> "Mixture":
        """Open what `folder` holds: a corpus, or the mixture.json that names several beside it.

        Raises:
            NotFoundError, DataCorruptError: see `CorpusIndex.open`.
            ConfigError: the corpora were prepared with different tokenizers.
        """
        if not (folder / MIXTURE).exists():
            return cls.of(CorpusIndex.open(folder, settings))
        parts = _read(folder / MIXTURE)
        indexes = [CorpusIndex.open(folder.parent / name, settings) for name in parts]
        for index, (fingerprint, _) in zip(indexes, parts.values(), strict=True):
            if index.fingerprint != fingerprint:
                raise DataCorruptError(f"{index.folder} is not the corpus that {folder / MIXTURE} names", "Run `maskwright prepare` again.")
        return cls.join(indexes, [weight for _, weight in parts.values()])

    @classmethod
    def join(cls, indexes: Sequence[CorpusIndex], weights: Sequence[float]) -> "Mixture":
        """Corpora that were opened.

        Raises:
            ConfigError: two are the same, or have different tokenizers.
        """
        for nth, index in enumerate(indexes):
            if index.folder in [other.folder for other in indexes[:nth]]:
                raise ConfigError(f"corpus {index.folder.name} is in the mixture twice", "Give it once, with the sum of the weights.")
            if index.vocabulary != indexes[0].vocabulary or index.tokenizer_digest != indexes[0].tokenizer_digest:
                raise ConfigError(
                    f"corpora {indexes[0].folder.name} and {index.folder.name} have different tokenizers",
                    "Prepare both with the same tokenizer.path.",
                )
        return cls(tuple(indexes), tuple(weights))

    @classmethod
    def of(cls, index: CorpusIndex) -> "Mixture":
        """A single corpus."""
        return cls((index,), (1.0,))

    def __len__(self) -> int:
        return len(self.indexes)

    @cached_property
    def shares(self) -> Shares:
        """Who gets which positions. Raises ConfigError, see `Shares.of`."""
        return Shares.of(self.weights)

    @property
    def fingerprint(self) -> str:
        """Of a single corpus its own; of several, SHA-256 over theirs and the weights."""
        if len(self) == 1:
            return self.indexes[0].fingerprint
        parts = [f"{index.fingerprint} {count}\n" for index, count in zip(self.indexes, self.shares.counts, strict=True)]
        return hashlib.sha256("".join(parts).encode()).hexdigest()

    @property
    def tokenizer_digest(self) -> str:
        """See `CorpusIndex.tokenizer_digest`."""
        return self.indexes[0].tokenizer_digest

    @property
    def tokenizer_folder(self) -> str:
        """See `CorpusIndex.tokenizer_folder`."""
        return self.indexes[0].tokenizer_folder

    @property
    def vocabulary(self) -> Vocabulary:
        """Token ids of the tokenizer that all share."""
        return self.indexes[0].vocabulary

    @property
    def unigram_entropy(self) -> float:
        """Masked-LM loss, in nats, of a model that knows only each corpus' word frequencies: the weighted mean of the corpora's entropies."""
        shares = zip(self.indexes, self.weights, strict=True)
        return sum(index.unigram_entropy * weight for index, weight in shares) / sum(self.weights)

    def save(self, storage: Location) -> Location:
        """Write mixture.json, which names the corpora by fingerprint, into a folder beside theirs, named by its content; return the folder."""
        folder = storage / "corpora" / f"mixture-{self.fingerprint[:12]}"
        parts = [
            {"corpus": index.folder.name, "fingerprint": index.fingerprint, "weight": weight, f"samples_of_{HORIZON}": count}
            for index, weight, count in zip(self.indexes, self.weights, self.shares.counts, strict=True)
        ]
        (folder / MIXTURE).write_json({"format_version": FORMAT_VERSION, "corpora": parts})
        return folder

    def num_samples(self, split: Split, sequence_length: int) -> int:
        """Samples of all corpora, once each."""
        return sum(index.num_samples(split, sequence_length) for index in self.indexes)


def _read(path: Location) -> dict[str, tuple[str, float]]:
    """(fingerprint, weight) by name of the corpus' folder."""
    try:
        manifest = path.read_json()
        version = int(manifest["format_version"])
        parts = {str(part["corpus"]): (str(part["fingerprint"]), float(part["weight"])) for part in manifest["corpora"]}
    except (ValueError, KeyError, TypeError) as error:
        raise DataCorruptError(f"{path} is not a mixture: {error}", "Run `maskwright prepare` again.") from error
    if version > FORMAT_VERSION:
        raise DataCorruptError(f"{path} has format version {version}; this release reads up to {FORMAT_VERSION}", "Upgrade maskwright.")
    return parts
