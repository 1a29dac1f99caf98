"""(a) Documents and megabytes read by second on one core: ours in verified blocks, the peers one sample per document."""

import sys
import tempfile
from pathlib import Path

from benchmarks.children import Contestant, Runs, measure
from benchmarks.claims import Claim, Goal, make_claim, middle, number
from benchmarks.corpora import BenchCorpus, make_corpus
from benchmarks.environments import LITDATA, STREAMING, WEBDATASET
from benchmarks.harness import Options, run_benchmark
from benchmarks.synthetic import with_larger_blocks
from benchmarks.variants import Ready, Variant, make_ready
from data_pipeline.index import CorpusIndex
from data_pipeline.storage import Location

NAME = "data_read"
TITLE = "(a) Reading: documents by second of one core"
_OURS = "ours, blocks, checked"
_NPY = Variant(WEBDATASET, "npy", "read_npy", "webdataset, .npy per document")
_RAW = Variant(WEBDATASET, "raw", "read_raw", "webdataset, raw bytes per document")
VARIANTS = (
    _NPY,
    _RAW,
    Variant(STREAMING, "bytes", "read_bytes", "MosaicML streaming"),
    Variant(STREAMING, "bytes", "read_items", "MosaicML streaming, dataset[i]"),
    Variant(LITDATA, "bytes", "read_bytes", "litdata, bytes per document"),
    Variant(LITDATA, "arrays", "read_arrays", "litdata, array per document"),
)
_LARGER_BLOCKS = (64 << 10, 512 << 10)
"""Tokens of a block where the corpus has a gigabyte of text, and eight or more."""
_GOALS = {_NPY: Goal("ratio", "≥", 100), _RAW: Goal("ratio", "≥", 25)}


def main(options: Options) -> list[Claim]:
    """Measure all contestants on the same documents; CPU time, so that a busy machine changes little."""
    corpus = make_corpus(options)
    peers = make_ready(VARIANTS, corpus, options.progress)
    with tempfile.TemporaryDirectory(prefix="maskwright-bench-") as folder:
        contestants = [_ours(_OURS, corpus.folder, options.seconds)]
        contestants += [_contestant(peer, options.seconds) for peer in peers if peer.problem is None]
        real = CorpusIndex.open(Location.at(corpus.folder))
        for tokens in _LARGER_BLOCKS:
            options.progress(f"the same in blocks of {tokens >> 10} k tokens")
            contestants.append(_ours(_larger(tokens), with_larger_blocks(real, Path(folder) / str(tokens), tokens), options.seconds))
        runs = measure(contestants, options.rounds, options.progress)
    _print(options, runs)
    return _claims(options, corpus, peers, runs)


def _larger(block_tokens: int) -> str:
    return f"read, ours in blocks of {block_tokens >> 10} k tokens, as a larger corpus has them"


def _ours(name: str, folder: str, seconds: float) -> Contestant:
    return Contestant(name, sys.executable, "benchmarks.contestants.reading:ours", {"folder": folder, "seconds": seconds}, is_ours=True)


def _contestant(peer: Ready, seconds: float) -> Contestant:
    arguments = {"reader": peer.variant.reader, "folder": peer.folder, "seconds": seconds}
    return Contestant(peer.variant.title, peer.python, "benchmarks.contestants.reading:peer", arguments)


def _claims(options: Options, corpus: BenchCorpus, peers: list[Ready], runs: dict[str, Runs]) -> list[Claim]:
    environment = {**options.environment, "corpus": corpus.description}
    claims: list[Claim] = []
    for key, unit, scale in (("documents_per_s", "documents/s", 1.0), ("bytes_per_s", "MB/s", 1e-6)):
        ours = _scaled(runs[_OURS], key, scale)
        for peer in peers:
            title, label = peer.variant.title, peer.variant.peer.label
            found = runs.get(title, Runs(failure=peer.problem))
            goal = _GOALS.get(peer.variant) if key == "documents_per_s" else None
            claims.append(make_claim(f"read, against {title}", unit, environment, ours, _scaled(found, key, scale), found.failure or label, goal))
        claims += [make_claim(_larger(tokens), unit, environment, _scaled(runs[_larger(tokens)], key, scale)) for tokens in _LARGER_BLOCKS]
    return claims


def _print(options: Options, runs: dict[str, Runs]) -> None:
    columns = (("documents_per_s", 1.0), ("bytes_per_s", 1e-6), ("wall_share", 1.0))
    rows = [(name, *(number(middle(_scaled(found, key, scale))) for key, scale in columns)) for name, found in runs.items()]
    options.table("Read by second of CPU time", ("contestant", "documents/s", "MB/s", "wall / CPU"), rows)


def _scaled(runs: Runs, key: str, scale: float) -> list[float]:
    return [value * scale for value in runs.values(key)]


if __name__ == "__main__":
    run_benchmark(NAME, TITLE, main)
