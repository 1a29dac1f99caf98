"""A small prepared corpus of generated text, for tests that train on a real stream."""

from pathlib import Path

from data_pipeline.config import CorpusConfig, TokenizerConfig
from data_pipeline.executor import InProcessExecutor
from data_pipeline.prepare import prepare
from data_pipeline.storage import Location
from tests.support.text import write_texts


def small_corpus(folder: Path, *, num_documents: int = 120, sequence_lengths: tuple[int, ...] = (32,), seed: int = 0) -> str:
    """Prepare generated documents below `folder` with a vocabulary of 400; returns the corpus folder."""
    write_texts(folder / "text", num_documents, seed)
    corpus = CorpusConfig(name="small", source=str(folder / "text"), validation_fraction=0.1)
    tokenizer = TokenizerConfig(vocab_size=400)
    return str(prepare(corpus, tokenizer, sequence_lengths, Location.at(folder / "corpora"), InProcessExecutor(), lambda _: None).folder)
