"""What damage to shards goes unnoticed, case by case: stock webdataset with one .npy per document beside ours."""

import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from shutil import rmtree
from typing import Any

import webdataset

from benchmarks.claims import Claim, Goal, make_claim
from benchmarks.corpora import make_corpus
from benchmarks.damages import CASES, Case, copy_data_set
from benchmarks.environments import WEBDATASET
from benchmarks.harness import Options, run_benchmark
from benchmarks.small_corpora import Read, SmallCorpus, open_ours, open_ours_later, open_stock, write_small_corpora
from data_pipeline.errors import DataCorruptError

NAME = "data_corruption"
TITLE = "Damaged shards: how often documents are lost or changed without an error"
OUTCOMES = ("refused", "lost silently", "changed silently", "no effect")
_SILENT = OUTCOMES[1:3]
_GOAL = Goal("ours", "≤", 0)
_TRIES, _SHORT_TRIES = 400, 40

Outcomes = Counter[str]


@dataclass(frozen=True)
class Reader:
    """One way to read a data set whole."""

    name: str
    folder: Callable[[SmallCorpus], Path]
    open: Callable[[Path], Read]
    """Called before the damage is done; what it returns is called after."""
    error: type[Exception]
    """What counts as noticing the damage. Any other error of ours is a bug and ends the benchmark."""


_OURS = Reader("ours", lambda corpus: corpus.ours, open_ours_later, DataCorruptError)
_STOCK = Reader("stock webdataset", lambda corpus: corpus.stock, open_stock(), Exception)
READERS = (
    _OURS,
    Reader("ours, damaged after it was opened", lambda corpus: corpus.ours, open_ours, DataCorruptError),
    _STOCK,
    Reader("stock webdataset, handler=reraise_exception", lambda corpus: corpus.stock, open_stock(handler=webdataset.reraise_exception), Exception),
)


def main(options: Options) -> list[Claim]:
    """Damage copies of small data sets in every way, and read them."""
    corpus = make_corpus(options)
    tries = _SHORT_TRIES if options.short else _TRIES
    found: dict[str, dict[str, Outcomes]] = {}
    with tempfile.TemporaryDirectory(prefix="maskwright-bench-") as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        own, foreign = write_small_corpora(corpus, Path(folder))
        for case in CASES:
            options.progress(case.name)
            found[case.name] = {reader.name: outcomes(case, reader, own, foreign, tries, Path(folder) / "copy") for reader in READERS}
    _print(options, found)
    return _claims({**options.environment, "corpus": corpus.description}, found)


def outcomes(case: Case, reader: Reader, own: SmallCorpus, foreign: SmallCorpus, tries: int, copy: Path) -> Outcomes:
    """What the reader makes of each damage of a case."""
    folder = reader.folder(own)
    expected = reader.open(folder)()
    counts: Outcomes = Counter()
    for damage in case.damages(folder, reader.folder(foreign), tries):
        copy_data_set(folder, copy)
        read = reader.open(copy)
        damage(copy)
        try:
            counts[judge(expected, read())] += 1
        except reader.error:
            counts["refused"] += 1
        rmtree(copy)
    return counts


def judge(expected: Sequence[bytes], found: Sequence[bytes]) -> str:
    """What became of the documents when no error was raised; pure."""
    if list(found) == list(expected):
        return "no effect"
    return "lost silently" if Counter(found) < Counter(expected) else "changed silently"


def _silent_percent(counts: Outcomes) -> list[float]:
    total = counts.total()
    return [100 * sum(counts[outcome] for outcome in _SILENT) / total] if total else []


def _claims(environment: dict[str, Any], found: dict[str, dict[str, Outcomes]]) -> list[Claim]:
    claims: list[Claim] = []
    for case, by_reader in found.items():
        ours, stock = by_reader[_OURS.name], by_reader[_STOCK.name]
        details = {**environment, "outcomes": {name: dict(counts) for name, counts in by_reader.items()}}
        label = WEBDATASET.label if stock.total() else "webdataset has no index"
        claims.append(make_claim(f"unnoticed: {case}", "%", details, _silent_percent(ours), _silent_percent(stock), label, _GOAL))
    return claims


def _print(options: Options, found: dict[str, dict[str, Outcomes]]) -> None:
    rows = [
        (case, reader, str(counts.total()), *(str(counts[outcome]) for outcome in OUTCOMES))
        for case, by_reader in found.items()
        for reader, counts in by_reader.items()
        if counts.total()
    ]
    options.table("What a reader makes of damage", ("damage", "reader", "tries", *OUTCOMES), rows)


if __name__ == "__main__":
    run_benchmark(NAME, TITLE, main)
