"""(c) Seconds from opened imports to the first batch after a resume: at the start, at 90 % of the corpus, and of 100 million documents."""

import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.children import Contestant, Runs, measure
from benchmarks.claims import Claim, Goal, make_claim, middle, number
from benchmarks.corpora import BenchCorpus, make_corpus
from benchmarks.environments import LITDATA, STREAMING, WEBDATASET
from benchmarks.harness import Options, run_benchmark
from benchmarks.synthetic import build_for_documents
from benchmarks.variants import Ready, Variant, make_ready
from data_pipeline.index import CorpusIndex
from data_pipeline.storage import Location

NAME = "data_resume"
TITLE = "(c) Resume: seconds from opened imports to the first batch"
VARIANTS = (
    Variant(WEBDATASET, "raw", "resume_raw", "webdataset, which skips"),
    Variant(STREAMING, "bytes", "resume_bytes", "MosaicML streaming"),
    Variant(LITDATA, "bytes", "resume_bytes", "litdata"),
)
_SHARES = {0.0: "at the start", 0.9: "at 90 %"}
_LENGTH = 512
_DOCUMENTS = 100_000_000
_GOAL = Goal("ours", "<", 1.0)


def main(options: Options) -> list[Claim]:
    """Measure in fresh processes; the wall clock, because waiting counts."""
    corpus = make_corpus(options)
    peers = make_ready(VARIANTS, corpus, options.progress)
    with tempfile.TemporaryDirectory(prefix="maskwright-bench-") as folder:
        large = build_for_documents(CorpusIndex.open(Location.at(corpus.folder)), Path(folder) / "large", _DOCUMENTS, options.progress)
        contestants = [_ours(folder, name, share) for name, folder in (("ours", corpus.folder), (_large(), large.folder)) for share in _SHARES]
        contestants += [_peer(peer, corpus, share) for peer in peers if peer.problem is None for share in _SHARES]
        runs = measure(contestants, options.rounds, options.progress)
    _print(options, runs)
    environment = {**options.environment, "corpus": corpus.description}
    size = {"synthetic_documents": large.num_documents, "synthetic_blocks": large.num_blocks, "synthetic_index_bytes": large.index_bytes}
    return _claims(peers, runs, environment, {**environment, **size})


def _large() -> str:
    return f"ours, {_DOCUMENTS // 1_000_000} million documents"


def _key(name: str, share: float) -> str:
    return f"{name}, {_SHARES[share]}"


def _ours(folder: str, name: str, share: float) -> Contestant:
    arguments = {"folder": folder, "sequence_length": _LENGTH, "share": share}
    return Contestant(_key(name, share), sys.executable, "benchmarks.contestants.resuming:ours", arguments, is_ours=True)


def _peer(peer: Ready, corpus: BenchCorpus, share: float) -> Contestant:
    arguments = {"resume": peer.variant.reader, "data": peer.folder, "documents": corpus.documents, "sequence_length": _LENGTH, "share": share}
    return Contestant(_key(peer.variant.title, share), peer.python, "benchmarks.contestants.resuming:peer", arguments)


def _claims(peers: list[Ready], runs: dict[str, Runs], environment: dict[str, Any], large: dict[str, Any]) -> list[Claim]:
    claims: list[Claim] = []
    for share, where in _SHARES.items():
        ours = runs[_key("ours", share)].values("wall_s")
        claims.append(make_claim(f"first batch after a resume {where}", "s", environment, ours, goal=_GOAL))
        found = runs[_key(_large(), share)].values("wall_s")
        claims.append(make_claim(f"first batch after a resume {where} of {_DOCUMENTS // 1_000_000} million documents", "s", large, found, goal=_GOAL))
        for peer in peers:
            theirs = runs.get(_key(peer.variant.title, share), Runs(failure=peer.problem))
            label = theirs.failure or peer.variant.peer.label
            claim = f"first batch after a resume {where}, against {peer.variant.title}"
            claims.append(make_claim(claim, "s", environment, ours, theirs.values("wall_s"), label))
    return claims


def _print(options: Options, runs: dict[str, Runs]) -> None:
    rows = [(name, *(number(middle(found.values(key))) for key in ("wall_s", "cpu_s"))) for name, found in runs.items()]
    options.table("First batch after a resume", ("contestant", "seconds", "CPU seconds"), rows)


if __name__ == "__main__":
    run_benchmark(NAME, TITLE, main)
