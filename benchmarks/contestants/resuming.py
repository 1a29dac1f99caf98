"""Child's side of `data_resume`: seconds from opened imports to the first finished batch."""

import time
from typing import Any

from benchmarks.children import Measurement
from benchmarks.contestants.batching import BATCH, hugging_face_batches, our_batches
from benchmarks.contestants.documents import TOKENIZER, Documents
from benchmarks.contestants.hugging_face import make_collator
from benchmarks.contestants.peers import load


def ours(folder: str, sequence_length: int, share: float) -> Measurement:
    """Open the corpus, check its index, and make the micro-batch at `share` of the first epoch."""
    import data_pipeline.stream  # noqa: F401 -- all is loaded before the clock starts
    import trainer.batch  # noqa: F401

    return _timed(lambda: next(our_batches(folder, sequence_length, "unpadded", share)))


def peer(resume: str, data: str, documents: str, sequence_length: int, share: float) -> Measurement:
    """Open the data set, restore the position in the peer's own way, and make a batch with the Hugging Face collator."""
    collate = make_collator(f"{documents}/{TOKENIZER}")
    function = load(resume)
    position = int(len(Documents.open(documents)) * share) // BATCH * BATCH
    return _timed(lambda: next(hugging_face_batches(function(data, position), collate, documents, sequence_length)))


def _timed(run: Any) -> Measurement:
    cpu, wall = time.process_time(), time.perf_counter()
    counts = run()
    return {"wall_s": time.perf_counter() - wall, "cpu_s": time.process_time() - cpu, "counts": counts}
