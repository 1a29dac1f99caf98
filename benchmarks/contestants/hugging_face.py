"""A peer's documents to batches as users of run_mlm and of BERT's sentence pairs write it: plain Python lists, then Hugging Face's collator.

The same work as ours: whole sentences up to the row's length, half of the pairs with the second segment of another document, 15 % of the
tokens masked, rows padded to a multiple of 8. `special_tokens_mask` is given, which the collator's documentation recommends for speed.
"""

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

MASK_RATE = 0.15
_NEIGHBOURS = 256

Example = dict[str, Any]
Pair = tuple[list[int], list[int] | None]


def make_collator(folder: str) -> Any:
    """The collator with the tokenizer of a folder; made before anything is timed."""
    from transformers import AutoTokenizer, DataCollatorForLanguageModeling

    return DataCollatorForLanguageModeling(AutoTokenizer.from_pretrained(folder), mlm_probability=MASK_RATE, pad_to_multiple_of=8)


def batches(
    documents: Iterator[NDArray[np.integer]], collate: Any, vocabulary: dict[str, Any], sequence_length: int, batch_size: int
) -> Iterator[dict[str, Any]]:
    """Finished batches: input_ids, token_type_ids, attention_mask, labels, next_sentence_label as tensors."""
    pending: list[Example] = []
    for example in examples(documents, vocabulary["cls"], vocabulary["sep"], sequence_length):
        pending.append(example)
        if len(pending) == batch_size:
            yield collate(pending)
            pending = []


def examples(documents: Iterator[NDArray[np.integer]], cls: int, sep: int, sequence_length: int) -> Iterator[Example]:
    """One example a chunk; a chunk of one sentence is a single segment without a label."""
    generator = random.Random(0)
    earlier: list[list[int]] = []
    for array in documents:
        chunks = list(cut(sentences(array, sep), sequence_length - 3))
        pairs = [split_pair(chunk, generator) for chunk in chunks]
        for first, second in pairs:
            if second is None:
                yield encode(first, None, -100, cls, sep)
            elif earlier and generator.random() < 0.5:
                room = sequence_length - 3 - len(first)
                yield encode(first, generator.choice(earlier)[:room], 1, cls, sep)
            else:
                yield encode(first, second, 0, cls, sep)
        earlier = (earlier + [second for _, second in pairs if second])[-_NEIGHBOURS:]


def sentences(array: NDArray[np.integer], sep: int) -> list[list[int]]:
    """Sentences of a document, cut at its separators."""
    ids = array.tolist()
    ends = np.flatnonzero(array == sep).tolist()
    start, found = 0, []
    for end in ends:
        found.append(ids[start:end])
        start = end + 1
    return found


def cut(document: list[list[int]], limit: int) -> Iterator[list[list[int]]]:
    """Greedy chunks of whole sentences; a sentence longer than a row is cut into pieces."""
    chunk: list[list[int]] = []
    length = 0
    for sentence in document:
        for start in range(0, len(sentence), limit):
            piece = sentence[start : start + limit]
            if chunk and length + len(piece) > limit:
                yield chunk
                chunk, length = [], 0
            chunk.append(piece)
            length += len(piece)
    if chunk:
        yield chunk


def split_pair(chunk: list[list[int]], generator: random.Random) -> Pair:
    """A random cut between two sentences; None for the second segment of a single sentence."""
    if len(chunk) == 1:
        return chunk[0], None
    at = generator.randrange(1, len(chunk))
    return [token for piece in chunk[:at] for token in piece], [token for piece in chunk[at:] for token in piece]


def encode(first: list[int], second: list[int] | None, label: int, cls: int, sep: int) -> Example:
    """[CLS] A [SEP] B [SEP] with segments and the mask of special tokens."""
    ids = [cls, *first, sep]
    special = [1] + [0] * len(first) + [1]
    segments = [0] * len(ids)
    if second is not None:
        ids += [*second, sep]
        special += [0] * len(second) + [1]
        segments += [1] * (len(second) + 1)
    return {"input_ids": ids, "token_type_ids": segments, "special_tokens_mask": special, "next_sentence_label": label}
