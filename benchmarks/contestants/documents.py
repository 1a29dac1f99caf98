"""The documents that every contestant reads: one flat array of token ids with [SEP] after each sentence, and where each document ends.

This neutral form is made once from a prepared corpus; each peer's data set is written from it, so all have the same documents in the same
order. A document is then one array, from which sentences can be told: the smallest item a peer can store.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

IDS, ENDS, ABOUT, TOKENIZER = "ids.npy", "ends.npy", "about.json", "tokenizer"


@dataclass(frozen=True)
class Documents:
    """A folder of documents in the neutral form, memory-mapped."""

    folder: Path
    ids: NDArray[np.integer]
    ends: NDArray[np.int64]
    vocabulary: dict[str, Any]
    """Fields of `data_pipeline.masking.Vocabulary`."""

    @classmethod
    def open(cls, folder: str | Path) -> "Documents":
        """Open what `write_documents` wrote."""
        folder = Path(folder)
        about = json.loads((folder / ABOUT).read_text())
        return cls(folder, np.load(folder / IDS, mmap_mode="r"), np.load(folder / ENDS), about["vocabulary"])

    def __len__(self) -> int:
        return len(self.ends)

    def __iter__(self) -> Iterator[NDArray[np.integer]]:
        start = 0
        for end in self.ends.tolist():
            yield self.ids[start:end]
            start = end


def write_documents(folder: Path, documents: Iterator[NDArray[np.integer]], vocabulary: dict[str, Any]) -> None:
    """Write documents in the neutral form; the file that says what they are comes last."""
    arrays = list(documents)
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / IDS, np.concatenate(arrays))
    np.save(folder / ENDS, np.cumsum([len(array) for array in arrays], dtype=np.int64))
    (folder / ABOUT).write_text(json.dumps({"vocabulary": vocabulary}))


def with_separators(
    ids: NDArray[np.integer], sentence_ends: NDArray[np.integer], document_ends: NDArray[np.integer], sep: int
) -> Iterator[NDArray[np.integer]]:
    """The documents of a block, each sentence followed by [SEP]; pure."""
    joined = np.insert(ids, sentence_ends.astype(np.int64), sep)
    ends = sentence_ends.astype(np.int64)[document_ends.astype(np.int64) - 1] + document_ends
    start = 0
    for end in ends.tolist():
        yield joined[start:end]
        start = end
