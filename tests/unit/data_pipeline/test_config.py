"""The corpus' readable name and the arithmetic of phases."""

import pytest
from pydantic import ValidationError

from data_pipeline.config import BatchConfig, CorpusConfig


@pytest.mark.parametrize(
    ("source", "label"),
    [
        ("python-docs", "python-docs"),
        ("s3://text/articles.jsonl.gz", "articles"),
        ("/data/my books/", "my-books"),
        (("a.b.parquet", "c.txt"), "a.b"),
        ("/", "corpus"),
    ],
)
def test_a_corpus_is_called_after_its_source(source: str | tuple[str, ...], label: str) -> None:
    assert CorpusConfig(source=source).label == label
    assert CorpusConfig(source=source, name="mine").label == "mine"


def test_phases_cover_the_run_without_gaps() -> None:
    batch = BatchConfig.model_validate({"phases": [{"from_step": 7, "sequence_length": 512, "micro_batch_size": 8}, {"from_step": 9}]})
    first, second, third = batch.phases_until(12)
    assert [phase.num_steps for phase in (first, second, third)] == [7, 2, 3]
    assert second.first_micro_batch == 7 * 8
    assert third.first_micro_batch == 7 * 8 + 2 * 32
    assert (second.sequence_length, third.sequence_length) == (512, 128)
    assert batch.phases_until(7) == (first,)


@pytest.mark.parametrize(
    "batch", [{"global_batch_size": 100}, {"phases": [{"from_step": 5}, {"from_step": 5}]}, {"phases": [{"from_step": 1, "micro_batch_size": 7}]}]
)
def test_impossible_batch_arithmetic_is_refused(batch: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        BatchConfig.model_validate(batch)
