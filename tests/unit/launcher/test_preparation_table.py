"""The table of `prepare` shows every step that did something, with what it dropped and what it cost."""

from typing import Any

from data_pipeline.prepare import Prepared
from launcher.preparation_table import contamination_rows, split_rows, step_rows


def test_steps_of_a_real_preparation(tiny_corpus: Prepared) -> None:
    rows = {row[0]: row[1:] for row in step_rows(tiny_corpus.summary)}
    assert next(iter(rows)) == "read"
    assert rows["read"][1].startswith("600 documents")
    assert rows["shuffle, exact duplicates"][0] == "0"
    assert float(rows["tokenizer"][2]) > 0
    assert {"sentences", "encode", "blocks and shards"} <= set(rows)
    assert [row[0] for row in split_rows(tiny_corpus.summary)] == ["train", "validation"]


def test_every_measured_step_is_shown(tiny_corpus: Prepared) -> None:
    shown = sum(float(row[3]) for row in step_rows(tiny_corpus.summary))
    assert abs(shown - sum(tiny_corpus.summary["cpu_seconds"].values())) < 0.1


def test_optional_steps(tiny_corpus: Prepared) -> None:
    changed: dict[str, Any] = {
        "low_quality": 1234,
        "quality": {"words": 4, "stop_words": 1230},
        "personal_data": {"ip": 2, "email": 2},
        "near_duplicates": 7,
    }
    rows = {row[0]: row[1:] for row in step_rows({**tiny_corpus.summary, **changed, "cpu_seconds": {}})}
    assert rows["quality"] == ("1,234", "stop_words 1,230, words 4", "")
    assert rows["personal data"] == ("", "email 2, ip 2", "")
    assert rows["near-duplicates"][0] == "7"


def test_contamination() -> None:
    task = {"documents": 3, "removed": True, "test_texts_found": 2, "test_texts": 1000, "test_texts_long_enough": 900, "digest": "x"}
    assert list(contamination_rows({"b": {**task, "documents": 0}, "a": task})) == [("a", "3 removed", "2", "1,000"), ("b", "0", "2", "1,000")]
