"""Shapes of what verbs answer about corpora (pure)."""

from typing import Literal, NotRequired

from pydantic import with_config
from typing_extensions import TypedDict

from data_pipeline.corpus_statistics import Distribution, RowStatistics
from data_pipeline.inspection import SampleText
from launcher.answers.shape import SHAPE


@with_config(SHAPE)
class Overlap(TypedDict):
    """Of a corpus with the test set of a task: runs of 13 words that both have."""

    digest: str
    documents: int
    """Documents of the corpus with such a run."""
    removed: bool
    """Whether they were left out."""
    test_texts: int
    test_texts_found: int
    test_texts_long_enough: int
    """Of 13 words and more."""


@with_config(SHAPE)
class CorpusCounts(TypedDict):
    """What a corpus holds, and what its preparation left out: documents, unless the name says otherwise."""

    documents: int
    empty: int
    low_quality: int
    bytes: int
    """Of the text that was read."""
    quality: dict[str, int]
    """Left out, by rule."""
    personal_data: dict[str, int]
    """Places replaced, by kind."""
    duplicates: int
    contaminated: int
    near_duplicates: int
    train_documents: int
    train_sentences: int
    train_tokens: int
    train_blocks: int
    train_pairs: list[int]
    """Samples that are pairs, by sequence length."""
    validation_documents: int
    validation_sentences: int
    validation_tokens: int
    validation_blocks: int
    validation_pairs: list[int]
    share_without_pair: float
    corpus_bytes: int


@with_config(SHAPE)
class PreparedCorpus(CorpusCounts):
    """A corpus as `prepare` left or found it."""

    folder: str
    created: bool
    """Now, and not before."""
    vocabulary_size: int
    vocabulary_asked: int | None
    seconds: float
    cpu_seconds: dict[str, float]
    """By step, of all processes; empty where the corpus was there already."""


@with_config(SHAPE)
class PreparedMixture(TypedDict):
    """A mixture as `prepare` left or found it."""

    folder: str
    created: bool
    corpora: list[PreparedCorpus]


@with_config(SHAPE)
class InspectedStep(TypedDict):
    """What the model sees at a step."""

    step: int
    digest: str
    """Over token ids, masks, labels and NSP labels, in sample order."""
    num_samples: int
    num_tokens: int
    skipped_blocks: list[str]
    """Damaged ones that are left out."""
    text: NotRequired[list[SampleText]]
    """With --text."""


@with_config(SHAPE)
class CorpusReportAnswer(TypedDict):
    """Of `report CORPUS`; of a mixture a line for each of its corpora."""

    report: str
    corpus: str
    name: str
    fingerprint: str
    sources: list[str]
    vocabulary_size: int
    vocabulary_asked: int | None
    unigram_entropy: float
    shards: int
    counts: CorpusCounts
    sampled_blocks: int
    sampled_documents: int
    document_tokens: Distribution
    sentence_tokens: Distribution
    rows: list[RowStatistics]
    contamination: dict[str, Overlap]
    """By task."""


@with_config(SHAPE)
class Verified(TypedDict):
    """Of `verify`."""

    path: str
    kind: Literal["corpus", "mixture", "checkpoint", "model"]
    intact: bool
    problems: list[str]
    shards: NotRequired[int]
    """This and what follows: what a corpus holds in intact blocks."""
    blocks: NotRequired[int]
    bytes: NotRequired[int]
    train_documents: NotRequired[int]
    train_sentences: NotRequired[int]
    train_tokens: NotRequired[int]
    validation_documents: NotRequired[int]
    validation_sentences: NotRequired[int]
    validation_tokens: NotRequired[int]
    corpora: NotRequired[int]
    """Of a mixture."""
