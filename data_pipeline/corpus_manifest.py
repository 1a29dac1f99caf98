"""Sums the receipts of a preparation up: index.bin and what corpus.json says of blocks, shards, tokens and documents."""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipeline.blocks import load_tables
from data_pipeline.errors import too_few_documents
from data_pipeline.index import FORMAT_VERSION, INDEX, record_dtype
from data_pipeline.masking import Vocabulary
from data_pipeline.partitions import Job, Receipt
from data_pipeline.selection import Selection


def write_index(job: Job, encoded: Sequence[Receipt], vocabulary: Vocabulary) -> dict[str, Any]:
    """Write index.bin, training blocks first; return what corpus.json says about blocks, shards and tokens."""
    shards: list[dict[str, Any]] = []
    tables: list[NDArray[np.void]] = []
    num_blocks = {"train": 0, "validation": 0}
    token_counts = np.zeros(vocabulary.size, dtype=np.int64)
    for split in num_blocks:
        for receipt in encoded:
            shard = receipt["splits"][split]["shard"]
            if shard is None:
                continue
            records, counts = load_tables(job, shard["name"])
            records["shard"] = len(shards)
            tables.append(records)
            num_blocks[split] += len(records)
            shards.append({**shard, "blocks": len(records)})
            if split == "train":
                token_counts[: len(counts)] += counts
    if not num_blocks["train"]:
        raise too_few_documents()
    data = np.concatenate(tables).astype(record_dtype(len(job.sequence_lengths))).tobytes()
    (job.folder / INDEX).write_bytes(data)
    return {
        "format_version": FORMAT_VERSION,
        "sequence_lengths": list(job.sequence_lengths),
        "block_tokens": job.block_tokens,
        "vocabulary": asdict(vocabulary),
        "unigram_entropy": _entropy(token_counts[vocabulary.ordinary_ids]),
        "counts": {f"{split}_blocks": count for split, count in num_blocks.items()},
        "digests": {"index": hashlib.sha256(data).hexdigest()},
        "shards": shards,
    }


def total_counts(read: Sequence[Receipt], selection: Selection | None, encoded: Sequence[Receipt]) -> dict[str, Any]:
    """Documents by step, kept and dropped, and what they hold; pure."""
    totals: dict[str, Any] = {name: sum(receipt["counts"][name] for receipt in read) for name in ("documents", "empty", "low_quality", "bytes")}
    for name in ("quality", "personal_data"):
        totals[name] = dict(sum((Counter[str](receipt[name]) for receipt in read), Counter[str]()))
    totals["duplicates"] = sum(receipt["duplicates"] for receipt in encoded)
    totals["contaminated"] = selection.contaminated if selection else 0
    totals["near_duplicates"] = selection.near_duplicates if selection else 0
    for split in ("train", "validation"):
        parts = [receipt["splits"][split] for receipt in encoded]
        totals["empty"] += sum(part["without_tokens"] for part in parts)
        for name in ("documents", "sentences", "tokens", "single_sentence_documents"):
            totals[f"{split}_{name}"] = sum(part[name] for part in parts)
        totals[f"{split}_pairs"] = [sum(column) for column in zip(*(part["pairs"] for part in parts), strict=True)]
    kept = totals["train_documents"] + totals["validation_documents"]
    single = totals.pop("train_single_sentence_documents") + totals.pop("validation_single_sentence_documents")
    totals["share_without_pair"] = round(single / max(kept, 1), 6)
    totals["corpus_bytes"] = sum(
        receipt["splits"][s]["shard"]["bytes"] for receipt in encoded for s in receipt["splits"] if receipt["splits"][s]["shard"]
    )
    return totals


def _entropy(counts: NDArray[np.int64]) -> float:
    """In nats, rounded so that the last bit of a logarithm cannot change the corpus' fingerprint."""
    share = counts[counts > 0] / max(int(counts.sum()), 1)
    return round(float(-(share * np.log(share)).sum()), 6)
