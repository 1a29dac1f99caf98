"""From sources to a prepared corpus: content-addressed, continued where it was killed, complete only when corpus.json is there."""

import hashlib
import importlib.metadata
import json
import time
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from data_pipeline import text
from data_pipeline.building import Build, Progress, TestTexts
from data_pipeline.claims import claimed
from data_pipeline.config import CorpusConfig, TokenizerConfig
from data_pipeline.contamination import held_out_digest, unreported
from data_pipeline.errors import NotFoundError
from data_pipeline.executor import Executor, InProcessExecutor
from data_pipeline.index import FORMAT_VERSION, MANIFEST
from data_pipeline.partitions import WORK
from data_pipeline.source_digests import describe_sources
from data_pipeline.storage import Location
from data_pipeline.tokenizer import tokenizer_digest

_RULES_VERSION = 6
"""Raise it when a module of the preparation changes what it writes."""
_DIGESTS = "corpora/.cache/source-digests.json"
_NOTHING: TestTexts = {}


@dataclass(frozen=True)
class Prepared:
    """The outcome of `prepare`."""

    folder: Location
    created: bool
    """False when the corpus was there already."""
    summary: dict[str, Any]
    """Counts of corpus.json with the sizes of the vocabulary (`vocabulary_size`, and `vocabulary_asked`, None where the tokenizer was given), and two
    things that are not in it, because a corpus is byte-identical however long it took: `seconds`, and `cpu_seconds` of each step, summed over all
    tasks (empty when the corpus was there already)."""


def find_prepared(
    corpus: CorpusConfig,
    tokenizer: TokenizerConfig,
    sequence_lengths: tuple[int, ...],
    storage: Location,
    *,
    test_texts: Callable[[], TestTexts] = lambda: _NOTHING,
) -> Location:
    """Folder of the corpus that these settings and sources make. Test texts are asked for only when documents like them are removed.

    Raises:
        NotFoundError: it has not been prepared, or a source is missing.
    """
    held_out = held_out_digest(test_texts()) if corpus.contamination == "remove" else None
    folder = _corpus_folder(corpus, storage, _identity(corpus, tokenizer, sequence_lengths, storage, InProcessExecutor(), held_out))
    if not (folder / MANIFEST).exists():
        raise NotFoundError(f"corpus {folder.name} is not prepared in {storage}", "Run `maskwright prepare CONFIG`.")
    return folder


def prepare(
    corpus: CorpusConfig,
    tokenizer: TokenizerConfig,
    sequence_lengths: tuple[int, ...],
    storage: Location,
    executor: Executor,
    progress: Progress,
    *,
    test_texts: Callable[[], TestTexts] = lambda: _NOTHING,
) -> Prepared:
    """Prepare the corpus, or return at once when it is there. Same inputs and settings, same bytes, whatever the executor.

    Documents that overlap with `test_texts` are reported in contamination.json or removed, as `corpus.contamination` says; a corpus that is
    there already, but was never compared with them, is read again and reported on.

    Raises:
        NotFoundError: a source is missing.
        ConfigError: nothing to read, a missing text column, an unsuitable tokenizer.
        DataCorruptError: text that is not UTF-8, a broken line or archive.
        ConflictError: another process prepares the same corpus.
        StorageError: the disk is full.
    """
    started_at = time.monotonic()
    texts = test_texts()
    held_out = held_out_digest(texts) if corpus.contamination == "remove" else None
    identity = _identity(corpus, tokenizer, sequence_lengths, storage, executor, held_out)
    folder = _corpus_folder(corpus, storage, identity)
    build = Build(corpus, tokenizer, tuple(sorted(set(sequence_lengths))), folder, executor, progress)
    created = not (folder / MANIFEST).exists()
    cpu_seconds: dict[str, float] = {}
    if created or unreported(folder, texts) or (folder / WORK).exists():  # killed while it removed its working files
        with claimed(folder / "claim.json", f"corpus {folder.name}"):
            if not (folder / MANIFEST).exists():  # the holder before us may have finished it
                cpu_seconds = build.run(texts, identity)
            elif missing := unreported(folder, texts):
                build.report(missing)
            _remove_torn_writes(folder)
            (folder / WORK).remove()
    manifest = (folder / MANIFEST).read_json()
    measured = {"seconds": round(time.monotonic() - started_at, 3), "cpu_seconds": {step: round(value, 3) for step, value in cpu_seconds.items()}}
    vocabulary = {"vocabulary_size": manifest["vocabulary"]["size"], "vocabulary_asked": manifest["config"]["tokenizer"].get("vocab_size")}
    return Prepared(folder, created, {**manifest["counts"], **vocabulary, **measured})


def _remove_torn_writes(folder: Location) -> None:
    """What processes that were killed while they wrote a file have left beside it; nobody else writes here. Other claimants' claims are theirs."""
    if folder.is_local:
        for path in folder.path.rglob(".*.tmp"):
            if not path.name.startswith(".claim.json."):
                path.unlink(missing_ok=True)


def _corpus_folder(corpus: CorpusConfig, storage: Location, identity: dict[str, Any]) -> Location:
    content = json.dumps([FORMAT_VERSION, identity], sort_keys=True)
    return storage / "corpora" / f"{corpus.label}-{hashlib.sha256(content.encode()).hexdigest()[:12]}"


def _identity(
    corpus: CorpusConfig,
    tokenizer: TokenizerConfig,
    sequence_lengths: tuple[int, ...],
    storage: Location,
    executor: Executor,
    held_out: str | None,
) -> dict[str, Any]:
    """All that decides the bytes of a corpus. Content stands for paths: of sources, of the tokenizer, of test sets that documents are removed for."""
    settings = {**corpus.model_dump(mode="json", exclude={"source", "name", "contamination"}), "removed_test_texts": held_out}
    settings["personal_data"] = sorted(set(corpus.personal_data))
    chosen: dict[str, Any]
    chosen = tokenizer.model_dump(exclude={"path"}) if tokenizer.path is None else {"digest": tokenizer_digest(tokenizer.path)}
    return {
        "config": {"corpus": settings, "tokenizer": chosen, "sequence_lengths": sorted(set(sequence_lengths))},
        "sources": describe_sources(corpus, storage / _DIGESTS, executor),
        "versions": _library_versions(corpus),
    }


def _library_versions(corpus: CorpusConfig) -> dict[str, Any]:
    """Versions of what changes the output."""
    names = ["ftfy", "tokenizers", *(["datasketch"] if corpus.near_duplicates else [])]
    versions = {name: importlib.metadata.version(name) for name in names}
    return {**versions, "unicode": unicodedata.unidata_version, "rules": [_RULES_VERSION, text.RULES_VERSION]}
