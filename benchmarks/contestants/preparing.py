"""Child's side of `data_prepare`: the whole of `prepare` on one core, and the tokenizer's own batch encoding of the same sentences."""

import resource
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

from benchmarks.children import Measurement

SEQUENCE_LENGTHS = (128, 512)
_TEST_TEXTS = 1000
_BATCH = 512


def whole(source: str, tokenizer: str) -> Measurement:
    """`prepare` with the steps that are always on, a contamination report for a task of a thousand texts among them; nothing is kept."""
    from data_pipeline.config import CorpusConfig, TokenizerConfig
    from data_pipeline.executor import InProcessExecutor
    from data_pipeline.prepare import prepare
    from data_pipeline.storage import Location
    from data_pipeline.tokenizer import load_tokenizer

    load_tokenizer(tokenizer)  # imports are not part of what is timed
    tests = {"task": list(islice(_documents(source), _TEST_TEXTS))}
    with tempfile.TemporaryDirectory(prefix="maskwright-bench-") as storage:
        cpu, wall = time.process_time(), time.perf_counter()
        prepared = prepare(
            CorpusConfig(source=source),
            TokenizerConfig(path=tokenizer),
            SEQUENCE_LENGTHS,
            Location.at(storage),
            InProcessExecutor(),
            progress=lambda message: None,
            test_texts=lambda: tests,
        )
        measured = {"cpu_s": time.process_time() - cpu, "wall_s": time.perf_counter() - wall}
    counts = prepared.summary
    kept = counts["train_documents"] + counts["validation_documents"]
    return {**measured, "steps": counts["cpu_seconds"], "documents": counts["documents"], "kept_documents": kept, "peak_bytes": _peak_bytes()}


def encode_batch(source: str, tokenizer: str) -> Measurement:
    """`Tokenizer.encode_batch`, which also tells where each token stands in the text."""
    return _encode(source, tokenizer, "encode_batch")


def encode_batch_fast(source: str, tokenizer: str) -> Measurement:
    """`Tokenizer.encode_batch_fast`, which does not."""
    return _encode(source, tokenizer, "encode_batch_fast")


def _encode(source: str, folder: str, method: str) -> Measurement:
    """Seconds to encode the sentences of the distinct cleaned documents, a few hundred documents at a time; only the encoding is timed."""
    from tokenizers import Tokenizer

    from data_pipeline.text import clean_document, split_sentences

    tokenizer: Any = Tokenizer.from_file(f"{folder}/tokenizer.json")
    tokenizer.no_truncation()
    tokenizer.no_padding()
    encode: Callable[..., list[Any]] = getattr(tokenizer, method)
    raw_bytes = 0
    texts: dict[str, None] = {}
    for raw in _documents(source):
        raw_bytes += len(raw.encode())
        if text := clean_document(raw):
            texts[text] = None
    distinct = list(texts)
    cpu_s = tokens = 0
    for start in range(0, len(distinct), _BATCH):
        sentences = [sentence for text in distinct[start : start + _BATCH] for sentence in split_sentences(text)]
        started_at = time.process_time()
        encoded = encode(sentences, add_special_tokens=False)
        cpu_s += time.process_time() - started_at
        tokens += sum(map(len, encoded))
    distinct_bytes = sum(len(text.encode()) for text in distinct)
    return {"cpu_s": cpu_s, "raw_bytes": raw_bytes, "distinct_bytes": distinct_bytes, "kept_documents": len(distinct), "tokens": tokens}


def _documents(source: str) -> Iterator[str]:
    from data_pipeline.config import CorpusConfig
    from data_pipeline.reading import read_documents
    from data_pipeline.sources import list_inputs

    return (text for partition in list_inputs(CorpusConfig(source=source)).partitions for text in read_documents(partition))


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
