"""One rank that reads its part of each step and writes down what it saw: `python -m tests.support.ledger SETTINGS_JSON`."""

import hashlib
import json
import sys
from pathlib import Path

from data_pipeline.config import BatchConfig, ObjectiveConfig
from data_pipeline.index import CorpusIndex
from data_pipeline.order import micro_batches_of_step
from data_pipeline.storage import Location
from data_pipeline.stream import MicroBatchStream
from trainer.reading import read_steps


def main(settings: dict[str, str | int]) -> None:
    """A line per step: {"step": s, "seen": {micro-batch: [digest of each sample's tokens, masks undone]}}."""
    batch = BatchConfig.model_validate(settings["batch"])
    phases = batch.phases_until(int(settings["steps"]))
    stream = MicroBatchStream(CorpusIndex.open(Location.at(str(settings["corpus"]))), ObjectiveConfig(sentence_objective="none"), phases, seed=11)
    first_step = int(settings["first_step"])
    parts = read_steps(
        stream, phases, first_step=first_step, rank=int(settings["rank"]), world_size=int(settings["world_size"]), workers=int(settings["workers"])
    )
    with Path(str(settings["ledger"])).open("w", buffering=1) as ledger:
        for step, part in enumerate(parts, first_step):
            assert part.error is None, part.error
            numbers = micro_batches_of_step(phases, step)
            seen: dict[int, list[str]] = {}
            for place, micro_batch in enumerate(part.batches, part.first_position):
                samples = micro_batch.samples
                ids = samples.token_ids.astype("<u4")
                ids[samples.mlm_positions] = samples.mlm_labels
                stops = samples.lengths.cumsum()
                seen[numbers[place]] = [
                    digest(ids[stop - length + 1 : stop - 1].tobytes()) for stop, length in zip(stops, samples.lengths, strict=True)
                ]
            ledger.write(json.dumps({"step": step, "seen": seen}) + "\n")


def digest(tokens: bytes) -> str:
    """Of a chunk's tokens as uint32."""
    return hashlib.blake2b(tokens, digest_size=8).hexdigest()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
