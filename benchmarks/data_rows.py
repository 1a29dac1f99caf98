"""How full packed rows are, and how equal the micro-batches of a step: 64 samples each, eight to a step, over an epoch (exact, not timed)."""

from typing import Any

import numpy as np

from benchmarks.claims import Claim, Goal, make_claim
from benchmarks.corpora import SEQUENCE_LENGTHS, make_corpus
from benchmarks.harness import Options, run_benchmark
from data_pipeline.config import BatchConfig, ObjectiveConfig
from data_pipeline.index import CorpusIndex
from data_pipeline.storage import Location
from data_pipeline.stream import MicroBatchStream

NAME = "data_rows"
TITLE = "Rows"
_SAMPLES, _PER_STEP = 64, 8
_MAX_STEPS = 400


def main(options: Options) -> list[Claim]:
    """One stream per sequence length; a micro-batch's tokens and rows are what they are, so nothing is repeated."""
    corpus = make_corpus(options)
    index = CorpusIndex.open(Location.at(corpus.folder))
    environment = {**options.environment, "corpus": corpus.description, "samples_per_micro_batch": _SAMPLES, "micro_batches_per_step": _PER_STEP}
    return [claim for length in SEQUENCE_LENGTHS for claim in _claims(index, length, environment)]


def _claims(index: CorpusIndex, length: int, environment: dict[str, Any]) -> list[Claim]:
    batch = BatchConfig(global_batch_size=_SAMPLES * _PER_STEP, micro_batch_size=_SAMPLES, sequence_length=length)
    num_steps = max(1, min(index.num_samples("train", length) // batch.global_batch_size, _MAX_STEPS))
    stream = MicroBatchStream(index, ObjectiveConfig(), batch.phases_until(num_steps), seed=0, packing="rows")
    batches = [stream[number] for number in range(num_steps * _PER_STEP)]
    tokens = np.array([each.num_tokens for each in batches]).reshape(num_steps, _PER_STEP)
    fill = tokens.sum() / sum(each.layout.num_places for each in batches)
    padded = tokens.sum() / (length * _SAMPLES * len(batches))
    spread = tokens.max(axis=1) / tokens.min(axis=1) - 1
    is_longest = length == max(SEQUENCE_LENGTHS)
    return [
        make_claim(f"fill of packed rows of {length}", "share", environment, [float(fill)], goal=Goal("ours", "≥", 0.96) if is_longest else None),
        make_claim(f"fill of rows of {length} without packing", "share", environment, [float(padded)]),
        make_claim(
            f"largest over smallest micro-batch of a step, minus 1, length {length}, 95 % of steps",
            "share",
            environment,
            [float(np.quantile(spread, 0.95))],
            goal=Goal("ours", "≤", 0.05),
        ),
        make_claim(f"the same, all steps, length {length}", "share", environment, [float(spread.max())]),
    ]


if __name__ == "__main__":
    run_benchmark(NAME, TITLE, main)
