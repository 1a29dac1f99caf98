"""1,024 ranks and ten trillion tokens on this machine: what a rank pays to open the corpus, to take its position, and to read a step.

The index has its full size and is read from the page cache; a few real blocks stand for all the others (`synthetic.py`).
"""

import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.children import Contestant, Runs, measure
from benchmarks.claims import Claim, make_claim, middle, number
from benchmarks.corpora import make_corpus
from benchmarks.harness import Options, run_benchmark
from benchmarks.synthetic import BLOCK_TOKENS, Synthetic, build_for_tokens
from data_pipeline.index import CorpusIndex, record_dtype
from data_pipeline.storage import Location

NAME = "data_scale"
TITLE = "1,024 ranks"
_TOKENS = 10_000_000_000_000
_SHORT_TOKENS = 100_000_000_000
_WORLD_SIZE = 1024
_LANES_PER_RANK = 4
_LENGTH = 512
_SHARE = 0.5
_RANKS = (0, _WORLD_SIZE // 2, _WORLD_SIZE - 1)
_MEASURED = (
    ("open_s", "time to open", "s", 1.0),
    ("position_s", "time from there to the first micro-batch", "s", 1.0),
    ("step_s", "time to the rest of its first step", "s", 1.0),
    ("first_bytes", "read for the first micro-batch", "MB", 1e-6),
    ("step_bytes", "read for the first step", "MB", 1e-6),
    ("private_bytes", "memory of its own", "MB", 1e-6),
    ("mapped_bytes", "memory shared by the ranks of a node", "MB", 1e-6),
    ("peak_bytes", "most memory at a time, both and the libraries", "MB", 1e-6),
)


def main(options: Options) -> list[Claim]:
    """Build the index, then let three of the ranks take their place in the middle of an epoch, one after the other."""
    corpus = make_corpus(options)
    real = CorpusIndex.open(Location.at(corpus.folder))
    with tempfile.TemporaryDirectory(prefix="maskwright-bench-") as folder:
        wanted = _SHORT_TOKENS if options.short else _TOKENS
        scale = min(wanted, _affordable_tokens(Path(folder), real))
        if scale < wanted:
            options.progress(f"this machine has room for {scale:.3g} tokens, not {wanted:.3g}: what follows is of {scale:.3g}")
        synthetic = build_for_tokens(real, Path(folder) / "corpus", scale, options.progress)
        runs = measure([_contestant(synthetic, rank) for rank in _RANKS], options.rounds, options.progress)
    _print(options, synthetic, runs)
    return _claims({**options.environment, "corpus": corpus.description}, synthetic, runs)


def _affordable_tokens(folder: Path, real: CorpusIndex) -> int:
    """Tokens whose index takes at most half of the free disk and a sixteenth of the memory."""
    import os

    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    room = min(shutil.disk_usage(folder).free // 2, memory // 16)
    return room // record_dtype(len(real.sequence_lengths)).itemsize * BLOCK_TOKENS


def _contestant(synthetic: Synthetic, rank: int) -> Contestant:
    arguments = {"folder": synthetic.folder, "rank": rank, "world_size": _WORLD_SIZE, "lanes_per_rank": _LANES_PER_RANK}
    arguments |= {"share": _SHARE, "sequence_length": _LENGTH}
    return Contestant(f"rank {rank}", sys.executable, "benchmarks.contestants.scaling:rank", arguments, is_ours=True)


def _claims(measured_on: dict[str, Any], synthetic: Synthetic, runs: dict[str, Runs]) -> list[Claim]:
    environment: dict[str, Any] = {
        **measured_on,
        "synthetic": {"tokens": synthetic.num_tokens, "documents": synthetic.num_documents, "blocks": synthetic.num_blocks},
        "world_size": _WORLD_SIZE,
        "micro_batches_per_rank": _LANES_PER_RANK,
    }
    name = f"{_WORLD_SIZE:,} ranks, {synthetic.num_tokens / 1e12:.3g} trillion tokens"
    claims = [make_claim(f"{name}: index", "MB", environment, [synthetic.index_bytes / 1e6])]
    for key, title, unit, scale in _MEASURED:
        values = [value * scale for found in runs.values() for value in found.values(key)]
        claims.append(make_claim(f"{name}: a rank's {title}", unit, environment, values))
    claims.append(make_claim(f"{name}: a rank's part of an epoch", "GB", environment, [synthetic.corpus_bytes / _WORLD_SIZE / 1e9]))
    return claims


def _print(options: Options, synthetic: Synthetic, runs: dict[str, Runs]) -> None:
    rows = [
        (title, unit, *(number(None if (value := middle(found.values(key))) is None else value * scale) for found in runs.values()))
        for key, title, unit, scale in _MEASURED
    ]
    size = f"{synthetic.num_tokens:.3g} tokens, {synthetic.num_documents:.3g} documents, {synthetic.num_blocks:,} blocks"
    options.table(f"{size}: index of {synthetic.index_bytes / 1e6:,.0f} MB", ("of a rank", "unit", *runs), rows)


if __name__ == "__main__":
    run_benchmark(NAME, TITLE, main)
