"""Turns documents into token ids, sentence by sentence."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import chain, repeat
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from data_pipeline.storage import Location

_MAX_WORDS = 1 << 19
"""Words kept with their ids, some 80 MB; then all are forgotten."""
_PART = re.compile(r"[A-Za-z0-9]+|[^A-Za-z0-9]")

IntArray = NDArray[np.int64]


@dataclass(frozen=True)
class EncodedDocuments:
    """Documents as arrays; no sentence and no document is empty."""

    ids: NDArray[np.integer]
    """Token ids, uint16 or uint32."""
    sentence_lengths: IntArray
    """Tokens of each sentence."""
    document_lengths: IntArray
    """Sentences of each document."""


@dataclass(frozen=True)
class Encoder:
    """A tokenizer set up for plain text: no special tokens are added, none are recognised in the text, nothing is cut."""

    tokenizer: Tokenizer
    vocabulary_size: int
    words: "_Words | None"
    """Remembers the ids of words, if a text's ids are the ids of its parts between spaces, one after the other."""

    @classmethod
    def load(cls, folder: Location) -> "Encoder":
        """Load from a corpus' tokenizer folder; the last one loaded in this process is kept, with the words that it remembers."""
        return _load((folder / "tokenizer.json").read_bytes())

    @property
    def dtype(self) -> np.dtype[Any]:
        """The smallest type that holds every id."""
        return np.dtype("<u2" if self.vocabulary_size <= 2**16 else "<u4")

    def encode(self, documents: Sequence[Sequence[str]]) -> EncodedDocuments:
        """Encode documents, given as sentences without line ends; sentences and documents without tokens are left out."""
        sentences = list(chain.from_iterable(documents))
        ids, lengths = self.words.encode(sentences) if self.words else _encode_texts(self.tokenizer, sentences)
        document = np.repeat(np.arange(len(documents)), [len(each) for each in documents])
        counts = np.bincount(document[lengths > 0], minlength=len(documents))
        return EncodedDocuments(ids.astype(self.dtype), lengths[lengths > 0], counts[counts > 0])


@dataclass
class _Words:
    """Ids of words that were met before.

    A tokenizer of the BERT family encodes what stands between spaces by itself, and natural text repeats its words: looking their ids up is
    several times faster than encoding them again, and gives the same ids.
    """

    tokenizer: Tokenizer
    numbers: dict[str, int] = field(default_factory=dict[str, int])
    lengths: IntArray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    ids: IntArray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    """The ids of all words, one after the other in the order of their numbers."""

    def encode(self, sentences: list[str]) -> tuple[IntArray, IntArray]:
        """Ids of all sentences, one after the other, and the number of each one's."""
        if not sentences:
            return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
        words = " \n ".join(sentences).split(" ")  # a line end is white space to the tokenizer: a word without ids between two sentences
        if len(self.numbers) > _MAX_WORDS:
            self.numbers, self.lengths, self.ids = {}, self.lengths[:0], self.ids[:0]
        numbers = np.fromiter(map(self.numbers.get, words, repeat(-1)), dtype=np.int64, count=len(words))
        unknown = np.flatnonzero(numbers < 0).tolist()
        if unknown:
            self._learn(list(dict.fromkeys(words[place] for place in unknown)))
            numbers[unknown] = [self.numbers[words[place]] for place in unknown]
        ends = np.cumsum(self.lengths[numbers])
        is_break = numbers == self.numbers.get("\n", -1)
        return self._ids_of(numbers), np.diff(np.concatenate([[0], ends[is_break], ends[-1:]]))

    def _learn(self, words: list[str]) -> None:
        """Encode new words, those with punctuation in parts: around it, too, BERT's tokenizers encode what they find by itself."""
        parts = [_PART.findall(word) if word.isascii() and word.isprintable() else [word] for word in words]
        new = [part for part in dict.fromkeys(chain.from_iterable(parts)) if part not in self.numbers]
        self._add(new, *_encode_texts(self.tokenizer, new))
        composed = [(word, found) for word, found in zip(words, parts, strict=True) if word not in self.numbers]
        numbers = np.array([self.numbers[part] for _, found in composed for part in found], dtype=np.int64)
        owner = np.repeat(np.arange(len(composed)), [len(found) for _, found in composed])
        lengths = np.bincount(owner, weights=self.lengths[numbers], minlength=len(composed)).astype(np.int64)
        self._add([word for word, _ in composed], self._ids_of(numbers), lengths)

    def _add(self, words: list[str], ids: IntArray, lengths: IntArray) -> None:
        self.numbers.update(zip(words, range(len(self.numbers), len(self.numbers) + len(words)), strict=True))
        self.ids, self.lengths = np.concatenate([self.ids, ids]), np.concatenate([self.lengths, lengths])

    def _ids_of(self, numbers: IntArray) -> IntArray:
        """The ids of words, one after the other."""
        first = np.cumsum(self.lengths) - self.lengths
        lengths = self.lengths[numbers]
        before = np.cumsum(lengths) - lengths
        return self.ids[np.arange(lengths.sum()) + np.repeat(first[numbers] - before, lengths)]


def _encode_texts(tokenizer: Any, texts: list[str]) -> tuple[IntArray, IntArray]:
    found = [encoding.ids for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
    return np.fromiter(chain.from_iterable(found), dtype=np.int64), np.array([len(ids) for ids in found], dtype=np.int64)


@lru_cache(maxsize=1)
def _load(definition: bytes) -> Encoder:
    tokenizer: Any = Tokenizer.from_str(definition.decode())
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True  # a document that says "[MASK]" gets the tokens of that text
    return Encoder(tokenizer, max(tokenizer.get_vocab().values()) + 1, _Words(tokenizer) if _is_by_word(tokenizer) else None)


def _is_by_word(tokenizer: Any) -> bool:
    """BERT's normaliser and pre-tokeniser look no further than a space; an added token could contain one."""
    definition = json.loads(tokenizer.to_str())
    parts = [(definition[part] or {"type": None})["type"] for part in ("normalizer", "pre_tokenizer")]
    return parts == ["BertNormalizer", "BertPreTokenizer"] and all(token["special"] for token in definition["added_tokens"])
