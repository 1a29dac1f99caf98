"""How long a step waits for its data, as a share of the step, by the wall clock on one core that also makes the batches.

The whole stream is on: two corpora by weight, masks of whole words, sentence pairs, packed rows, digests checked. Text is generated; what a
network has to do for a token is the same whatever it says.
"""

import tempfile
from pathlib import Path

from benchmarks.children import measure, rank_contestant
from benchmarks.claims import Claim, Goal, make_claim, middle, number
from benchmarks.harness import Options, run_benchmark
from benchmarks.training import SMALL, TINY, Shape, arguments, our_precision
from data_pipeline.config import CorpusConfig, TokenizerConfig
from data_pipeline.executor import InProcessExecutor
from data_pipeline.index import CorpusIndex
from data_pipeline.prepare import prepare
from data_pipeline.storage import Location
from tests.support.text import write_texts

NAME = "train_data_wait"
TITLE = "Waiting for data, as a share of a step's time"
MICRO_BATCHES = 8
WEIGHTS = (3.0, 1.0)
_GOAL = Goal("ours", "≤", 0.01)
_DOCUMENTS = 4000
_MEASURED = {
    "share": "share, windows spread over their samples",
    "seen_share": "share of the steps that were taken",
    "wait_s": "seconds a step waits",
    "step_s": "seconds of the rest of the step",
}


def main(options: Options) -> list[Claim]:
    """The small network, whose steps are short, in the precision of `auto`."""
    network, shape = (TINY, Shape(4, 64, packing="rows")) if options.short else (SMALL, Shape(32, 128, packing="rows"))
    precision = our_precision()
    with tempfile.TemporaryDirectory(prefix="maskwright-bench-") as folder:
        folders = write_corpora(Path(folder), 200 if options.short else _DOCUMENTS, shape.length, options)
        given = arguments(network, shape, micro_batches=MICRO_BATCHES, precision=precision, seconds=options.seconds)
        contestant = rank_contestant(network.name, "benchmarks.contestants.waiting:wait", {**given, "folders": folders, "weights": WEIGHTS})
        runs = measure([contestant], options.rounds, options.progress)[network.name]
    options.table(
        f"{network.name}, {precision}", ("of a step", "median"), [(title, number(middle(runs.values(key)))) for key, title in _MEASURED.items()]
    )
    environment = {**options.environment, "precision": precision, "batch": f"{MICRO_BATCHES} x {shape.samples} x {shape.length}"}
    goal = None if options.short else _GOAL
    return [make_claim(f"waiting for data, {network.name}, everything switched on", "of the step", environment, runs.values("share"), goal=goal)]


def write_corpora(folder: Path, num_documents: int, length: int, options: Options) -> list[str]:
    """Two corpora of generated documents with one tokenizer."""
    folders: list[str] = []
    tokenizer = TokenizerConfig(vocab_size=8192)
    for seed in range(len(WEIGHTS)):
        options.progress(f"corpus {seed + 1} of {len(WEIGHTS)}")
        write_texts(folder / f"text-{seed}", num_documents, seed)
        corpus = CorpusConfig(name=f"generated-{seed}", source=str(folder / f"text-{seed}"))
        prepared = prepare(corpus, tokenizer, (length,), Location.at(folder / "corpora"), InProcessExecutor(), lambda _: None)
        folders.append(prepared.folder.url)
        tokenizer = TokenizerConfig(path=CorpusIndex.open(prepared.folder).tokenizer_folder)
    return folders


if __name__ == "__main__":
    run_benchmark(NAME, TITLE, main)
