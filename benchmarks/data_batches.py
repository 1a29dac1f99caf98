"""(b) Finished training batches by second on one core: read, pair, mask, pack, tensors.

The peers read in order, each once with the Hugging Face collator and once with our pairing, masking and packing; ours reads in the order of an
epoch, shuffled, and checks every block.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.children import Contestant, Runs, measure
from benchmarks.claims import Claim, Goal, make_claim, middle, number
from benchmarks.corpora import SEQUENCE_LENGTHS, BenchCorpus, make_corpus
from benchmarks.environments import LITDATA, STREAMING, WEBDATASET
from benchmarks.harness import Options, run_benchmark
from benchmarks.variants import Ready, Variant, make_ready

NAME = "data_batches"
TITLE = "(b) Finished training batches: samples by second of one core"
VARIANTS = (
    Variant(WEBDATASET, "raw", "read_raw", "webdataset"),
    Variant(STREAMING, "bytes", "read_bytes", "MosaicML streaming"),
    Variant(LITDATA, "bytes", "read_bytes", "litdata"),
)
PACKINGS = ("unpadded", "rows", "none")
_WAYS = {"hugging_face": "Hugging Face collator", "our_masking": "our masking"}
_GOALS = {"hugging_face": Goal("ratio", "≥", 10), "our_masking": Goal("ratio", ">", 1)}
_PER_CORE = Goal("ours", "≥", 40_000)
_MODULE = "benchmarks.contestants.batching"


@dataclass(frozen=True)
class Entry:
    """A contestant's place in the table."""

    length: int
    name: str
    peer: Ready | None
    way: str
    """Packing of ours; `hugging_face` or `our_masking` of a peer."""

    @property
    def key(self) -> str:
        """Name among the contestants."""
        return f"{self.name}, length {self.length}"


def main(options: Options) -> list[Claim]:
    """Measure all contestants at both sequence lengths on the same documents."""
    corpus = make_corpus(options)
    peers = make_ready(VARIANTS, corpus, options.progress)
    entries = [entry for length in SEQUENCE_LENGTHS for entry in _entries(length, peers)]
    contestants = [_contestant(entry, corpus, options.seconds) for entry in entries if entry.peer is None or entry.peer.problem is None]
    runs = measure(contestants, options.rounds, options.progress)
    _print(options, runs)
    environment = {**options.environment, "corpus": corpus.description}
    return [claim for length in SEQUENCE_LENGTHS for claim in _claims(length, entries, runs, environment)]


def _entries(length: int, peers: Sequence[Ready]) -> list[Entry]:
    own = [Entry(length, f"ours, packing {packing}", None, packing) for packing in PACKINGS]
    return own + [Entry(length, f"{peer.variant.title} + {words}", peer, way) for way, words in _WAYS.items() for peer in peers]


def _contestant(entry: Entry, corpus: BenchCorpus, seconds: float) -> Contestant:
    arguments: dict[str, Any] = {"sequence_length": entry.length, "seconds": seconds}
    if entry.peer is None:
        own = {"folder": corpus.folder, "packing": entry.way}
        return Contestant(entry.key, sys.executable, f"{_MODULE}:ours", {**arguments, **own}, is_ours=True)
    data = {"reader": entry.peer.variant.reader, "data": entry.peer.folder, "documents": corpus.documents}
    return Contestant(entry.key, entry.peer.python, f"{_MODULE}:{entry.way}", {**arguments, **data})


def _claims(length: int, entries: Sequence[Entry], runs: dict[str, Runs], environment: dict[str, Any]) -> list[Claim]:
    """Ours against the best peer with the collator and against every peer with our masking; samples and tokens."""
    here = [entry for entry in entries if entry.length == length]
    ours = {entry.way: runs[entry.key] for entry in here if entry.peer is None}
    first = ours[PACKINGS[0]]
    claims: list[Claim] = []
    for packing, found in ours.items():
        goal = _PER_CORE if length == 512 else None
        claims.append(make_claim(f"batches, length {length}, packing {packing}", "samples/s", environment, found.values("samples_per_s"), goal=goal))
        claims.append(make_claim(f"batches, length {length}, packing {packing}", "tokens/s", environment, found.values("tokens_per_s")))
    for entry in here:
        if entry.peer is not None:
            found = runs.get(entry.key, Runs(failure=entry.peer.problem))
            label = found.failure or entry.peer.variant.peer.label
            own, theirs = first.values("samples_per_s"), found.values("samples_per_s")
            claims.append(
                make_claim(f"batches, length {length}, against {entry.name}", "samples/s", environment, own, theirs, label, _GOALS[entry.way])
            )
    return claims


def _print(options: Options, runs: dict[str, Runs]) -> None:
    columns = ("samples_per_s", "tokens_per_s", "wall_share")
    rows = [(name, *(number(middle(found.values(key))) for key in columns)) for name, found in runs.items()]
    options.table("Batches by second of CPU time", ("contestant", "samples/s", "tokens/s", "wall / CPU"), rows)


if __name__ == "__main__":
    run_benchmark(NAME, TITLE, main)
