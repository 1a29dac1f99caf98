"""Each quality rule drops a text made to fail it and keeps ordinary prose."""

from typing import Any

import pytest

from data_pipeline.config import QualityConfig
from data_pipeline.quality import RULES, Measured, failed_rules, repeated
from tests.support.text import generate_documents

PROSE = max(generate_documents(50, seed=1), key=len)
OFF = QualityConfig(**dict.fromkeys(set(QualityConfig.model_fields) - {"banned_phrases"}), banned_phrases=())


@pytest.mark.parametrize(
    ("rule", "settings", "bad"),
    [
        ("words", {"min_words": 50}, "Too few words."),
        ("words", {"max_words": 100}, PROSE),
        ("characters", {"min_characters": 100}, "Short."),
        ("characters", {"max_characters": 100}, PROSE),
        ("mean_word_length", {"min_mean_word_length": 3.0}, "a b c d e f of to"),
        ("mean_word_length", {"max_mean_word_length": 10.0}, "incomprehensibilities counterrevolutionaries"),
        ("symbol_word_ratio", {"max_symbol_word_ratio": 0.1}, "tags #a and #b and so on"),
        ("symbol_word_ratio", {"max_symbol_word_ratio": 0.1}, "well... no… yes"),
        ("alphabetic_words", {"min_alphabetic_words": 0.8}, "1 2 3 4 x"),
        ("stop_words", {"min_stop_words": 2}, "Wasser fließt bergab. The end"),
        ("bullet_lines", {"max_bullet_lines": 0.9}, "- a\n* b\n• c"),
        ("ellipsis_lines", {"max_ellipsis_lines": 0.3}, "read on...\nmore…\nend"),
        ("repeated_lines", {"max_repeated_lines": 0.3}, "a\nb\na\na"),
        ("repeated_lines", {"max_repeated_line_characters": 0.2}, "a long line that repeats\nb\nc\nd\na long line that repeats"),
        ("repeated_paragraphs", {"max_repeated_paragraphs": 0.3}, "a\nb\n\nc\n\na\nb"),
        ("repeated_paragraphs", {"max_repeated_paragraph_characters": 0.2}, "a long paragraph here\n\nb\n\nc\n\nd\n\na long paragraph here"),
        ("top_2gram", {"max_top_2gram": 0.2}, "buy now and buy now or buy now"),
        ("top_3gram", {"max_top_3gram": 0.18}, "click right here and click right here"),
        ("top_4gram", {"max_top_4gram": 0.16}, "click on this link and click on this link"),
        ("sentences", {"min_sentences": 3}, "One sentence. Two."),
        ("banned_phrases", {"banned_phrases": ("lorem ipsum",)}, "Lorem Ipsum dolor"),
    ],
)
def test_a_rule_drops_what_fails_it(rule: str, settings: dict[str, Any], bad: str) -> None:
    assert failed_rules(bad, OFF.model_copy(update=settings)) == [rule]
    assert failed_rules(bad, OFF) == []


def test_published_thresholds_keep_prose() -> None:
    assert failed_rules(PROSE, QualityConfig()) == []


def test_every_rule_is_counted_for_itself() -> None:
    assert failed_rules("spam spam spam " * 10, QualityConfig()) == ["words", "stop_words", "top_2gram", "top_3gram", "top_4gram", "sentences"]


def test_every_setting_belongs_to_a_rule() -> None:
    """A setting that no rule reads would be ignored in silence."""

    class Recorder:
        def __init__(self) -> None:
            self.read = set[str]()

        def __getattr__(self, name: str) -> Any:
            self.read.add(name)
            return getattr(OFF, name)

    recorder: Any = Recorder()
    for fails in RULES.values():
        fails(Measured("some text"), recorder)
    assert recorder.read == set(QualityConfig.model_fields)


def test_an_empty_document_divides_by_nothing() -> None:
    failed_rules("", QualityConfig())
    assert repeated([]) == (0.0, 0.0)
