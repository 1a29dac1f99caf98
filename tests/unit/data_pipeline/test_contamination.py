"""Overlap with test sets: 13 words in a row, whatever their case and punctuation; never across two documents."""

from pathlib import Path

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.contamination import NGRAM, HeldOut, contamination_report, held_out_digest, unreported, write_report
from data_pipeline.ngrams import word_hashes
from data_pipeline.storage import Location

WORDS = [f"word{number}" for number in range(40)]
TEXTS = {"b": [" ".join(WORDS[:13]), "too short"], "a": [" ".join(WORDS[10:30]), " ".join(WORDS[20:40])]}


def _find(held_out: HeldOut, *documents: str) -> tuple[list[list[bool]], int]:
    hits, met = held_out.find(word_hashes(documents))
    return hits.tolist(), int(met.sum())


def test_thirteen_words_in_a_row_are_found() -> None:
    held_out = HeldOut.of(TEXTS)
    inside = f"Before: {', '.join(WORDS[:13]).upper()}! After."
    assert _find(held_out, inside, " ".join(WORDS[:12]), " ".join(WORDS[10:23])) == ([[False, True], [False, False], [True, False]], 2)
    assert _find(held_out, " ".join(WORDS)) == ([[True, True]], len(held_out.ngrams))
    assert _find(held_out, "", "short", " ".join(WORDS[:6]), " ".join(WORDS[6:13])) == ([[False, False]] * 4, 0)
    assert _find(held_out) == ([], 0)


def test_tasks_without_long_texts_find_nothing() -> None:
    assert _find(HeldOut.of({"a": ["short"]}), " ".join(WORDS)) == ([[False]], 0)
    assert _find(HeldOut.of({"a": []}), " ".join(WORDS)) == ([[False]], 0)


@given(st.lists(st.text("ab ", max_size=60), max_size=4), st.lists(st.text("ab ", max_size=60), min_size=1, max_size=4))
def test_finds_what_a_search_word_by_word_finds(tests: list[str], documents: list[str]) -> None:
    def runs(text: str) -> set[tuple[str, ...]]:
        words = text.split()
        return {tuple(words[start : start + NGRAM]) for start in range(len(words) - NGRAM + 1)}

    hits, met = _find(HeldOut.of({"task": tests}), *documents)
    wanted = set[tuple[str, ...]]().union(*map(runs, tests))
    assert hits == [[bool(runs(document) & wanted)] for document in documents]
    assert met == len(wanted & set[tuple[str, ...]]().union(*map(runs, documents)))


def test_the_report_counts_documents_and_test_texts(tmp_path: Path) -> None:
    held_out = HeldOut.of(TEXTS)
    held_out.save(Location(str(tmp_path / "held.npz")))
    loaded = HeldOut.load(Location(str(tmp_path / "held.npz")))
    hits, met = loaded.find(word_hashes([" ".join(WORDS[:25]), "nothing here"]))
    report = contamination_report(TEXTS, loaded, hits.sum(axis=0).tolist(), met, removed=False)
    assert {
        name: [task["documents"], task["test_texts"], task["test_texts_long_enough"], task["test_texts_found"]] for name, task in report.items()
    } == {
        "a": [1, 2, 2, 1],
        "b": [1, 2, 1, 1],
    }
    assert np.array_equal(loaded.ngrams, held_out.ngrams)


def test_a_report_grows_by_tasks(tmp_path: Path) -> None:
    path = Location(str(tmp_path))
    assert list(unreported(path, TEXTS)) == ["b", "a"]
    held_out = HeldOut.of(TEXTS)
    full = contamination_report(TEXTS, held_out, [0, 0], np.zeros(len(held_out.ngrams), dtype=np.bool_), removed=False)
    write_report(path, {"a": full["a"]})
    assert list(unreported(path, TEXTS)) == ["b"]
    write_report(path, {"b": full["b"]})
    assert unreported(path, TEXTS) == {}
    assert list(unreported(path, {**TEXTS, "a": ["another"]})) == ["a"]


def test_no_task_is_no_digest() -> None:
    assert held_out_digest({}) is None
    assert held_out_digest({"a": ["x"]}) != held_out_digest({"b": ["x"]}) != held_out_digest({"b": ["y"]})
