"""Turns documents into token ids, sentence by sentence."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from data_pipeline.storage import Location
from data_pipeline.text import split_sentences

EncodedDocuments = list[list[list[int]]]
"""Documents as lists of sentences, sentences as lists of token ids; none of them empty."""


@dataclass(frozen=True)
class Encoder:
    """A tokenizer set up for plain text: no special tokens are added, none are recognised in the text, nothing is cut."""

    tokenizer: Tokenizer
    vocabulary_size: int

    @classmethod
    def load(cls, folder: Location) -> "Encoder":
        """Load from a corpus' tokenizer folder."""
        tokenizer: Any = Tokenizer.from_str((folder / "tokenizer.json").read_bytes().decode())
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.encode_special_tokens = True  # a document that says "[MASK]" gets the tokens of that text
        return cls(tokenizer, max(tokenizer.get_vocab().values()) + 1)

    @property
    def dtype(self) -> np.dtype[Any]:
        """The smallest type that holds every id."""
        return np.dtype("<u2" if self.vocabulary_size <= 2**16 else "<u4")

    def encode(self, texts: Sequence[str]) -> EncodedDocuments:
        """Encode documents; sentences and documents without tokens are left out."""
        split = [split_sentences(text) for text in texts]
        flat = [sentence for sentences in split for sentence in sentences]
        tokenizer: Any = self.tokenizer
        encoded = iter(tokenizer.encode_batch_fast(flat, add_special_tokens=False))
        documents = [[ids for _ in sentences if (ids := next(encoded).ids)] for sentences in split]
        return [document for document in documents if document]
