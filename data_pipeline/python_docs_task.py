"""Owns the labelled task of `python-docs`: which package does this docstring belong to; pure but for `write_task`."""

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from data_pipeline.python_docs import (
    TASK_PACKAGES,
    Document,
    hash_percent,
    is_task_document,
    list_task_partitions,
    package_of,
    read_partition,
)

ROWS_PER_CLASS: Mapping[str, int] = {"train": 180, "dev": 50, "test": 120}
"""Upper bounds: a class with fewer documents gives fewer rows."""

MAX_WORDS = 60
"""Rows are cut here, so that every model and TF-IDF see the same text: about a hundred tokens."""

NEUTRAL_WORD = "name"
"""Stands for everything that would give the package away."""

_MIN_WORDS = 12
_MAX_ROWS_PER_MODULE = 12  # one big module must not be the class
_SPLIT_ENDS = {"train": 52, "dev": 64, "test": 100}  # per cent of the modules, cumulative
_ALIASES = {
    "matplotlib", "mpl", "plt", "pylab", "pyplot", "networkx", "nx", "numpy", "np", "pandas", "pd", "ray", "rllib",
    "scipy", "sp", "sklearn", "scikit", "sympy", "torch", "pytorch", "cpython", "python", "stdlib",
}  # fmt: skip
_URL = r"https?://\S+"
_DOTTED = r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)+(?:\(\))?"
_IDENTIFIER = r"\w*(?:_\w|[a-z][A-Z]|\d[A-Za-z])\w*(?:\(\))?"  # snake_case, camelCase, Conv2d
_GIVE_AWAY = re.compile(rf"(?:{_URL}|{_DOTTED}|\b{_IDENTIFIER}|\b(?i:{'|'.join(sorted(_ALIASES))})(?:-learn)?\b)")
_REPEATED = re.compile(rf"\b{NEUTRAL_WORD}(?:\W{{0,3}}{NEUTRAL_WORD}\b)+")


@dataclass(frozen=True)
class TaskRow:
    """One labelled example."""

    text: str
    label: str
    """Name of the package."""


def mask_give_aways(text: str) -> str:
    """The text with package names, dotted paths and identifiers replaced by NEUTRAL_WORD; pure."""
    masked = _REPEATED.sub(NEUTRAL_WORD, _GIVE_AWAY.sub(NEUTRAL_WORD, text))
    return " ".join(masked.split()[:MAX_WORDS])


def split_of(module: str) -> str:
    """`train`, `dev` or `test`: a module is on one side, so that its near-identical docstrings are; pure."""
    percent = hash_percent("task split", module)
    return next(split for split, end in _SPLIT_ENDS.items() if percent < end)


def task_rows(documents: Iterable[Document], pretraining_texts: Iterable[str] = ()) -> dict[str, list[TaskRow]]:
    """The rows of each split, whatever the order of `documents`; pure.

    Documents that are not of the task are passed over; so is every text that occurs in `pretraining_texts` (modules
    copy from each other) and every row whose text was seen before, in any split. Raises ValueError for fewer than
    two classes.
    """
    seen = {_digest(text) for text in pretraining_texts}
    rows: dict[str, list[TaskRow]] = {split: [] for split in _SPLIT_ENDS}
    taken: Counter[tuple[str, str]] = Counter()
    for document in sorted(filter(is_task_document, documents), key=lambda d: (_digest(d.text), d.source)):
        row = TaskRow(mask_give_aways(document.text), package_of(document.module))
        split, digests = split_of(document.module), {_digest(document.text), _digest(row.text)}
        is_full = taken[split, row.label] >= ROWS_PER_CLASS[split] or taken["", document.module] >= _MAX_ROWS_PER_MODULE
        if is_full or digests & seen or len(row.text.split()) < _MIN_WORDS:
            continue
        seen |= digests
        taken.update([(split, row.label), ("", document.module)])
        rows[split].append(row)
    if len({row.label for row in rows["train"]}) < 2:
        raise ValueError(f"python-docs task: expected at least 2 of {sorted(TASK_PACKAGES)} installed, found fewer")
    return rows


def write_task(folder: Path, documents: Iterable[Document] | None = None, pretraining_texts: Iterable[str] = ()) -> None:
    """Writes `train.jsonl`, `dev.jsonl` and `test.jsonl` (columns `text`, `label`, a package name), each whole or not at all.

    Without `documents` the held-out modules are read here, a few seconds on one core. Same inputs, same bytes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for split, rows in task_rows(held_out_documents() if documents is None else documents, pretraining_texts).items():
        lines = (json.dumps({"text": row.text, "label": row.label}, ensure_ascii=False) + "\n" for row in rows)
        partial = folder / f".{split}.jsonl.partial-{os.getpid()}"
        with partial.open("w", encoding="utf-8", newline="\n") as file:
            file.writelines(lines)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(folder / f"{split}.jsonl")


def held_out_documents() -> Iterator[Document]:
    """All documents of the task, read in this process."""
    return chain.from_iterable(read_partition(part, held_out=True) for part in list_task_partitions())


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
