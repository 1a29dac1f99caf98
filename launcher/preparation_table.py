"""What `prepare` did, step by step, as rows of a table, and what it could not do (pure)."""

from collections.abc import Iterator, Mapping
from typing import Any

Row = tuple[str, ...]

_STEPS: Mapping[str, tuple[str, ...]] = {
    "read": ("read",),
    "repair Unicode": ("clean",),
    "quality": ("quality",),
    "personal data": ("personal_data",),
    "shuffle, exact duplicates": ("spill", "shuffle"),
    "contamination": ("words", "contamination"),
    "near-duplicates": ("near_duplicates",),
    "tokenizer": ("tokenizer",),
    "sentences": ("sentences",),
    "encode": ("encode",),
    "blocks and shards": ("blocks", "write", "index"),
}
"""What people see, and the names under which it is measured."""

_ALWAYS_ON = {"repair Unicode", "shuffle, exact duplicates"}


def step_rows(summary: Mapping[str, Any]) -> Iterator[Row]:
    """Step, documents that it dropped, what it found, CPU seconds of all tasks; a step that was not asked for is left out."""
    dropped = {
        "repair Unicode": summary["empty"],
        "quality": summary["low_quality"],
        "shuffle, exact duplicates": summary["duplicates"],
        "contamination": summary["contaminated"],
        "near-duplicates": summary["near_duplicates"],
    }
    found = {
        "read": f"{summary['documents']:,} documents, {summary['bytes'] / 1e6:,.1f} MB",
        "quality": _counted(summary["quality"]),
        "personal data": _counted(summary["personal_data"]),
        "sentences": f"{summary['train_sentences'] + summary['validation_sentences']:,} sentences",
        "encode": f"{summary['train_tokens'] + summary['validation_tokens']:,} tokens",
        "blocks and shards": f"{summary['train_blocks'] + summary['validation_blocks']:,} blocks, {summary['corpus_bytes'] / 1e6:,.1f} MB",
    }
    for step, names in _STEPS.items():
        seconds = sum(summary["cpu_seconds"].get(name, 0.0) for name in names)
        if step in _ALWAYS_ON or seconds >= 0.005 or dropped.get(step) or found.get(step):
            yield step, f"{dropped[step]:,}" if step in dropped else "", found.get(step, ""), f"{seconds:.2f}" if summary["cpu_seconds"] else ""


def split_rows(summary: Mapping[str, Any]) -> Iterator[Row]:
    """Split, documents, sentences, tokens."""
    for split in ("train", "validation"):
        yield split, *(f"{summary[f'{split}_{name}']:,}" for name in ("documents", "sentences", "tokens"))


def too_little_text(size: int, asked: int | None) -> str | None:
    """That the text did not give as many tokens as `tokenizer.vocab_size` asks for; None where it did, or the tokenizer was given."""
    if asked is None or size >= asked:
        return None
    return f"The tokenizer has {size:,} tokens, fewer than tokenizer.vocab_size {asked:,}: there is too little text for more."


def contamination_rows(tasks: Mapping[str, Mapping[str, Any]]) -> Iterator[Row]:
    """Task, documents that share a run of words with its test set, test texts found in documents, test texts."""
    for name, task in sorted(tasks.items()):
        said = "removed" if task["removed"] else "kept"
        yield name, f"{task['documents']:,} {said}" if task["documents"] else "0", f"{task['test_texts_found']:,}", f"{task['test_texts']:,}"


def _counted(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])))
