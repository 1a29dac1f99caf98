"""Quality rules for documents after Gopher (Rae et al. 2021, table A1) and C4 (Raffel et al. 2020, section 2.2); pure."""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice

from data_pipeline.config import QualityConfig
from data_pipeline.text import split_sentences

STOP_WORDS = frozenset({"the", "be", "to", "of", "and", "that", "have", "with"})
_SYMBOL = re.compile(r"#|\.\.\.|…")
_BULLETS = ("-", "*", "•", "‣", "◦", "▪", "●", "–")


@dataclass(frozen=True)
class Measured:
    """A document and what the rules measure of it, each computed when first asked for."""

    text: str

    @cached_property
    def words(self) -> list[str]:
        """Between white space, as in the papers."""
        return self.text.split()

    @cached_property
    def lines(self) -> list[str]:
        """Lines that are not blank."""
        return [line for line in self.text.split("\n") if line.strip()]

    @cached_property
    def paragraphs(self) -> list[str]:
        """What stands between blank lines."""
        return [paragraph for paragraph in re.split(r"\n\s*\n", self.text) if paragraph.strip()]

    @property
    def mean_word_length(self) -> float:
        """Characters a word."""
        return sum(map(len, self.words)) / max(len(self.words), 1)

    @property
    def symbol_word_ratio(self) -> float:
        """Hash signs and ellipses a word."""
        return len(_SYMBOL.findall(self.text)) / max(len(self.words), 1)

    @property
    def alphabetic_words(self) -> float:
        """Share of words with at least one letter."""
        return _share(sum(word.isalpha() or any(map(str.isalpha, word)) for word in self.words), len(self.words))

    def num_stop_words(self, enough: int) -> int:
        """Occurrences of English stop words, counted up to `enough`."""
        return sum(1 for _ in islice((word for word in self.words if word.lower() in STOP_WORDS), enough))

    @property
    def bullet_lines(self) -> float:
        """Share of lines that begin with a bullet."""
        return _share(sum(line.lstrip().startswith(_BULLETS) for line in self.lines), len(self.lines))

    @property
    def ellipsis_lines(self) -> float:
        """Share of lines that end with an ellipsis."""
        return _share(sum(line.rstrip().endswith(("...", "…")) for line in self.lines), len(self.lines))

    def top_ngram(self, n: int) -> float:
        """Share of the words' characters in the most frequent n-gram; zero when none occurs twice."""
        counts = Counter(zip(*(self.words[start:] for start in range(n)), strict=False))
        most = max(counts.values(), default=0)
        if most < 2:
            return 0.0
        longest = max(sum(map(len, words)) for words, count in counts.items() if count == most)
        return _share(most * longest, sum(map(len, self.words)))


def repeated(parts: Sequence[str]) -> tuple[float, float]:
    """Share of the parts, and of their characters, in parts that occurred before."""
    seen: set[str] = set()
    again: list[str] = []
    for part in parts:
        if part in seen:
            again.append(part)
        seen.add(part)
    return _share(len(again), len(parts)), _share(sum(map(len, again)), sum(map(len, parts)))


_Rule = Callable[[Measured, QualityConfig], bool]


def _outside(value: float, least: float | None, most: float | None = None) -> bool:
    return (least is not None and value < least) or (most is not None and value > most)


RULES: dict[str, _Rule] = {
    "words": lambda m, c: _outside(len(m.words), c.min_words, c.max_words),
    "characters": lambda m, c: _outside(len(m.text), c.min_characters, c.max_characters),
    "mean_word_length": lambda m, c: _outside(m.mean_word_length, c.min_mean_word_length, c.max_mean_word_length),
    "symbol_word_ratio": lambda m, c: _outside(m.symbol_word_ratio, None, c.max_symbol_word_ratio),
    "alphabetic_words": lambda m, c: _outside(m.alphabetic_words, c.min_alphabetic_words),
    "stop_words": lambda m, c: _outside(m.num_stop_words(c.min_stop_words or 0), c.min_stop_words),
    "bullet_lines": lambda m, c: _outside(m.bullet_lines, None, c.max_bullet_lines),
    "ellipsis_lines": lambda m, c: _outside(m.ellipsis_lines, None, c.max_ellipsis_lines),
    "repeated_lines": lambda m, c: _repeats(m.lines, c.max_repeated_lines, c.max_repeated_line_characters),
    "repeated_paragraphs": lambda m, c: _repeats(m.paragraphs, c.max_repeated_paragraphs, c.max_repeated_paragraph_characters),
    "top_2gram": lambda m, c: c.max_top_2gram is not None and m.top_ngram(2) > c.max_top_2gram,
    "top_3gram": lambda m, c: c.max_top_3gram is not None and m.top_ngram(3) > c.max_top_3gram,
    "top_4gram": lambda m, c: c.max_top_4gram is not None and m.top_ngram(4) > c.max_top_4gram,
    "sentences": lambda m, c: c.min_sentences is not None and len(split_sentences(m.text)) < c.min_sentences,
    "banned_phrases": lambda m, c: any(phrase.lower() in m.text.lower() for phrase in c.banned_phrases),
}
"""By the name that corpus.json counts them under; each tells whether a document fails it."""


def failed_rules(text: str, config: QualityConfig) -> list[str]:
    """Names of all rules that the document fails; it is kept when there is none."""
    return list(_failed(Measured(text), config))


def _failed(measured: Measured, config: QualityConfig) -> Iterator[str]:
    return (name for name, fails in RULES.items() if fails(measured, config))


def _repeats(parts: Sequence[str], most: float | None, most_characters: float | None) -> bool:
    share, characters = repeated(parts)
    return _outside(share, None, most) or _outside(characters, None, most_characters)


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
