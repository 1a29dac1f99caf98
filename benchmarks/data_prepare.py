"""(d) Megabytes of text prepared by second on one core beside the tokenizer's own batch encoding; the cost of each step; peak memory."""

import json
import sys
import tempfile
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from benchmarks.children import Contestant, Runs, measure
from benchmarks.claims import Claim, Goal, make_claim, middle, number
from benchmarks.contestants.documents import TOKENIZER
from benchmarks.corpora import BenchCorpus, corpus_config, make_corpus
from benchmarks.harness import Options, run_benchmark
from benchmarks.machine import installed_version
from data_pipeline.reading import read_documents
from data_pipeline.sources import list_inputs

NAME = "data_prepare"
TITLE = "(d) Preparing text"
_COPIES = 4
_WHOLE, _LARGE = "prepare", f"prepare, {_COPIES} times the text"
_ENCODE, _FAST = "encode_batch", "encode_batch_fast"
_MODULE = "benchmarks.contestants.preparing"
_RATE, _FLAT = Goal("ratio", "≥", 0.6), Goal("ratio", "≤", 1.1)


def main(options: Options) -> list[Claim]:
    """Prepare the text as a .jsonl file, with the tokenizer that was trained on it: training one is not part of the rate."""
    corpus = make_corpus(options)
    with tempfile.TemporaryDirectory(prefix="maskwright-bench-") as folder:
        options.progress("writing the text once and four times")
        once, large = (_write(options, Path(folder) / f"text-{copies}.jsonl", copies) for copies in (1, _COPIES))
        contestants = [
            _contestant(_WHOLE, "whole", once, corpus),
            _contestant(_ENCODE, _ENCODE, once, corpus),
            _contestant(_FAST, _FAST, once, corpus),
        ]
        runs = measure(contestants, options.rounds, options.progress)
        runs |= measure([_contestant(_LARGE, "whole", large, corpus)], 1, options.progress)
    _print(options, runs)
    return _claims(options, corpus, runs)


def _contestant(name: str, function: str, source: str, corpus: BenchCorpus) -> Contestant:
    arguments = {"source": source, "tokenizer": f"{corpus.documents}/{TOKENIZER}"}
    return Contestant(name, sys.executable, f"{_MODULE}:{function}", arguments, is_ours=True)


def _write(options: Options, path: Path, copies: int) -> str:
    """The documents of the text as JSON lines; each copy says which one it is, so that none is a duplicate of another."""
    with path.open("w", encoding="utf-8") as file:
        for copy in range(copies):
            ending = f"\n\nCopy {copy}." if copy else ""
            for text in _texts(options):
                file.write(json.dumps({"text": text + ending}, ensure_ascii=False) + "\n")
    return str(path)


def _texts(options: Options) -> Iterator[str]:
    config = corpus_config(options)
    documents = (text for partition in list_inputs(config).partitions for text in read_documents(partition))
    return islice(documents, config.max_documents)


def _claims(options: Options, corpus: BenchCorpus, runs: dict[str, Runs]) -> list[Claim]:
    label = f"tokenizers {installed_version('tokenizers')}"
    environment = {**options.environment, "corpus": corpus.description, "cpu_seconds_by_step": runs[_WHOLE].measurements[0]["steps"]}
    encoded = runs[_ENCODE].measurements[0]
    distinct, raw = encoded["distinct_bytes"] / 1e6, encoded["raw_bytes"] / 1e6
    seconds = runs[_WHOLE].values("cpu_s")
    ours = [distinct / second for second in seconds]
    claims = [
        make_claim(f"prepare, against {name} of the same sentences", "MB/s", environment, ours, _rates(runs[name], distinct), label, goal)
        for name, goal in ((_ENCODE, _RATE), (_FAST, None))
    ]
    claims.append(make_claim("prepare, duplicates counted as text", "MB/s", environment, [raw / second for second in seconds]))
    once, large = ([value / 1e6 for value in runs[name].values("peak_bytes")] for name in (_WHOLE, _LARGE))
    words = f"peak memory of prepare, {_COPIES * raw:,.0f} MB against {raw:,.0f} MB of text"
    return [*claims, make_claim(words, "MB", environment, large, once, "the same, less text", _FLAT)]


def _rates(runs: Runs, megabytes: float) -> list[float]:
    return [megabytes / second for second in runs.values("cpu_s")]


def _print(options: Options, runs: dict[str, Runs]) -> None:
    whole = runs[_WHOLE]
    steps = {step: middle([found["steps"].get(step, 0.0) for found in whole.measurements]) or 0.0 for step in whole.measurements[0]["steps"]}
    total = middle(whole.values("cpu_s")) or 0.0
    rows = [(step, f"{value:.2f}", f"{100 * value / total:.0f}%") for step, value in steps.items()]
    rows.append(("everything else", f"{total - sum(steps.values()):.2f}", f"{100 * (1 - sum(steps.values()) / total):.0f}%"))
    options.table("CPU seconds of each step of prepare", ("step", "seconds", "share"), [*rows, ("all", f"{total:.2f}", "100%")])
    rows = [(name, number(middle(runs[name].values("cpu_s")))) for name in runs]
    options.table("CPU seconds", ("contestant", "seconds"), rows)


if __name__ == "__main__":
    run_benchmark(NAME, TITLE, main)
