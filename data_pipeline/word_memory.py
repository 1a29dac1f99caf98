"""Remembers the integers that a slow function gives to words: natural text repeats its words, and looking one up is many times faster."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import repeat
from typing import Any

import numpy as np
from numpy.typing import NDArray

_MAX_WORDS = 1 << 19
"""Words that are kept, some 80 MB; then all are forgotten."""
_BREAK = "\n"

IntArray = NDArray[np.int64]
Runs = tuple[NDArray[Any], IntArray]
"""Runs of integers, one after the other, and the length of each."""


@dataclass
class WordMemory:
    """A function of words, any number of integers each, that is computed once for each word. It must be pure and give nothing for a line end."""

    function: Callable[[list[str]], Runs]
    numbers: dict[str, int] = field(default_factory=dict[str, int], repr=False)
    runs: Runs = field(default_factory=lambda: (np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)), repr=False)
    """Of all words, in the order of their numbers."""

    def of_words(self, words: list[str]) -> Runs:
        """The runs of some words."""
        return self._select(self._look_up(words))

    def of_texts(self, texts: Sequence[str]) -> Runs:
        """The runs of texts without line ends, each made of those of its words between spaces."""
        if not texts:
            return self.runs[0][:0], self.runs[1][:0]
        numbers = self._look_up(f" {_BREAK} ".join(texts).split(" "))
        values, lengths = self._select(numbers)
        ends = np.cumsum(lengths)
        return values, np.diff(np.concatenate([[0], ends[numbers == self.numbers.get(_BREAK, -1)], ends[-1:]]))

    def _look_up(self, words: list[str]) -> IntArray:
        if len(self.numbers) > _MAX_WORDS:
            self.numbers, self.runs = {}, (self.runs[0][:0], self.runs[1][:0])
        numbers = np.fromiter(map(self.numbers.get, words, repeat(-1)), dtype=np.int64, count=len(words))
        unknown = np.flatnonzero(numbers < 0).tolist()
        if unknown:
            self._learn(list(dict.fromkeys(words[place] for place in unknown)))
            numbers[unknown] = [self.numbers[words[place]] for place in unknown]
        return numbers

    def _learn(self, words: list[str]) -> None:
        values, lengths = self.function(words)
        self.numbers.update(zip(words, range(len(self.numbers), len(self.numbers) + len(words)), strict=True))
        known = self.runs if len(self.runs[1]) else (values[:0], lengths[:0])
        self.runs = np.concatenate([known[0], values]), np.concatenate([known[1], lengths])

    def _select(self, numbers: IntArray) -> Runs:
        values, all_lengths = self.runs
        first = np.cumsum(all_lengths) - all_lengths
        lengths = all_lengths[numbers]
        before = np.cumsum(lengths) - lengths
        return values[np.arange(lengths.sum()) + np.repeat(first[numbers] - before, lengths)], lengths
