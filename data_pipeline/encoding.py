"""Turns documents into token ids, sentence by sentence."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from data_pipeline.storage import Location
from data_pipeline.word_memory import IntArray, Runs, WordMemory

_PART = re.compile(r"[A-Za-z0-9]+|[^A-Za-z0-9]")


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
    words: WordMemory | None
    """Remembers the ids of words; None if a text's ids are not those of its parts between spaces, one after the other."""

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
        ids, lengths = self.words.of_texts(sentences) if self.words else _encode_texts(self.tokenizer, sentences)
        document = np.repeat(np.arange(len(documents)), [len(each) for each in documents])
        counts = np.bincount(document[lengths > 0], minlength=len(documents))
        return EncodedDocuments(ids.astype(self.dtype), lengths[lengths > 0], counts[counts > 0])


def _encode_texts(tokenizer: Any, texts: list[str]) -> Runs:
    found = [encoding.ids for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
    return np.fromiter(chain.from_iterable(found), dtype=np.int64), np.array([len(ids) for ids in found], dtype=np.int64)


def _encode_words(parts: WordMemory, words: list[str]) -> Runs:
    """Words with punctuation in parts: around it, too, BERT's tokenizers encode what they find by itself."""
    split = [_PART.findall(word) if word.isascii() and word.isprintable() else [word] for word in words]
    ids, lengths = parts.of_words(list(chain.from_iterable(split)))
    word = np.repeat(np.arange(len(words)), [len(found) for found in split])
    return ids, np.bincount(word, weights=lengths, minlength=len(words)).astype(np.int64)


@lru_cache(maxsize=1)
def _load(definition: bytes) -> Encoder:
    tokenizer: Any = Tokenizer.from_str(definition.decode())
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True  # a document that says "[MASK]" gets the tokens of that text
    words = WordMemory(partial(_encode_words, WordMemory(partial(_encode_texts, tokenizer)))) if _is_by_word(tokenizer) else None
    return Encoder(tokenizer, max(tokenizer.get_vocab().values()) + 1, words)


def _is_by_word(tokenizer: Any) -> bool:
    """BERT's normaliser and pre-tokeniser look no further than a space; an added token could contain one."""
    definition = json.loads(tokenizer.to_str())
    parts = [(definition[part] or {"type": None})["type"] for part in ("normalizer", "pre_tokenizer")]
    return parts == ["BertNormalizer", "BertPreTokenizer"] and all(token["special"] for token in definition["added_tokens"])
