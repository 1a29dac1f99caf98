"""Child's side of `train_data_wait`: steps that read their batches from a mixture, in the training process, by the wall clock."""

import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from statistics import median
from typing import Any

from benchmarks.children import Measurement
from benchmarks.contestants.training import OurTraining, process_group
from benchmarks.training import Network, Shape

_LEAST_STEPS = 2
_MANY = 1_000_000
_WINDOWS = 2


def wait(folders: Sequence[str], weights: Sequence[float], network: dict[str, Any], shape: dict[str, Any], micro_batches: int,
         precision: str, seconds: float) -> Measurement:  # fmt: skip
    """Seconds that a micro-batch costs to read, over whole windows of every lane, and to train on; and what steps in a row waited.

    A window is read and finished at once and then serves thousands of samples, which a few steps do not see: hence the reading by itself.
    """
    from data_pipeline.config import BatchConfig
    from trainer.reading import read_steps

    form = Shape(**shape)
    batch = BatchConfig(global_batch_size=micro_batches * form.samples, micro_batch_size=form.samples, sequence_length=form.length)
    phases = batch.phases_until(_MANY)
    mixture, read_s, num_read = _reading(folders, weights, phases, form)
    with process_group():
        dimensions = replace(Network(**network), vocab_size=mixture.vocabulary.size)
        training = OurTraining.build(dimensions, form, precision=precision, dropout=0.1)
        parts = read_steps(_stream(mixture, phases, form), phases, first_step=0, rank=0, world_size=1, workers=0)
        training.step(next(parts).batches)
        waits: list[float] = []
        steps: list[float] = []
        begun = time.perf_counter()
        while len(steps) < _LEAST_STEPS or time.perf_counter() - begun < seconds:
            part = next(parts)
            started_at = time.perf_counter()
            training.step(part.batches)
            waits.append(part.wait_s)
            steps.append(time.perf_counter() - started_at)
    wait_s, step_s = micro_batches * read_s / num_read, median(steps)
    counts = {"steps": len(steps), "micro_batches_read": num_read}
    return {
        "share": wait_s / (wait_s + step_s),
        "seen_share": sum(waits) / (sum(waits) + sum(steps)),
        "wait_s": wait_s,
        "step_s": step_s,
        "counts": counts,
    }


def _reading(folders: Sequence[str], weights: Sequence[float], phases: Any, shape: Shape) -> tuple[Any, float, int]:
    """The mixture, seconds to read the first windows of all lanes, and how many micro-batches these are."""
    from data_pipeline.index import CorpusIndex
    from data_pipeline.mixture import Mixture
    from data_pipeline.order import WINDOW_SAMPLES
    from data_pipeline.storage import Location
    from data_pipeline.stream import build_loader

    mixture = Mixture.join([CorpusIndex.open(Location.at(folder)) for folder in folders], weights)
    samples = min(mixture.indexes[0].num_samples("train", shape.length), WINDOW_SAMPLES * phases[0].num_lanes)
    number = max(1, _WINDOWS * samples // shape.samples)
    started_at = time.perf_counter()
    for _ in islice(build_loader(_stream(mixture, phases, shape), range(number), workers=0), number):
        pass
    return mixture, time.perf_counter() - started_at, number


def _stream(mixture: Any, phases: Any, shape: Shape) -> Any:
    """With everything switched on: a mixture, masks of whole words, sentence pairs, packed rows."""
    from data_pipeline.config import ObjectiveConfig
    from data_pipeline.stream import MicroBatchStream

    return MicroBatchStream(mixture, ObjectiveConfig(mask_unit="whole_word"), phases, seed=0, packing=shape.packing)  # pyright: ignore[reportArgumentType]
