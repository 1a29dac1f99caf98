"""Cleaning of documents and splitting into sentences (pure)."""

import re
import unicodedata

import ftfy

RULES_VERSION = 1
"""Part of the corpus' identity: raise it with every change of what this module returns."""

_CONFIG = ftfy.TextFixerConfig(unescape_html=False, uncurl_quotes=False, normalization="NFC", explain=False)
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ufeff]")
_LINE_END = re.compile(r"\r\n|[\r\x85\u2028\u2029]")
_BOUNDARY = re.compile(
    r"""[.!?…]+["'”’)\]]*\s+(?=["'“‘(\[]*[^\W_a-z])"""  # a stop, then white space, then a capital, a digit or an uncased letter
    r"""|[。！？]+["'”’」』）]*"""  # scripts that write no space after a stop
    r"""|\n+"""
)
_ABBREVIATIONS = (
    "a.k.a adm al approx apr asst aug ave bros ca capt cf cmdr co col corp dec dept dr e.g ed eds eq eqs est feb fig figs gen "
    "gov hon i.e inc jan jr jul jun lt ltd maj mar messrs mme mr mrs ms mt no nos nov oct op pl pp prof pt rep rev sec sen "
    "sep sept sgt sr st str supt u.k u.s univ viz vol vols vs"
)
_ABBREVIATION_SET = frozenset(_ABBREVIATIONS.split())
_LAST_WORD = re.compile(r"([\w.]+)\.\s+$")


def clean_document(text: str) -> str:
    """Repaired Unicode (ftfy: mojibake, NFC, ligatures, widths), one kind of line end, no control characters, no outer white space."""
    text = _LINE_END.sub("\n", text)
    text = _CONTROL.sub("", text)
    if not text.isascii():  # ftfy changes no ASCII line, and costs a hundred times more than this test
        text = "\n".join(line if line.isascii() else ftfy.fix_text(line, _CONFIG) for line in text.split("\n"))
        text = unicodedata.normalize("NFC", text)
    return "\n".join(line.rstrip() for line in text.split("\n")).strip()


def split_sentences(text: str) -> list[str]:
    """Sentences of a cleaned document, in order and without outer white space; together they cover it. A line end ends a sentence."""
    sentences: list[str] = []
    start = 0
    for match in _BOUNDARY.finditer(text):
        if match.group()[0] == "." and _is_abbreviation(text[max(start, match.start() - 24) : match.end()]):
            continue
        sentences.append(text[start : match.end()].strip())
        start = match.end()
    sentences.append(text[start:].strip())
    return [sentence for sentence in sentences if sentence]


def _is_abbreviation(ending: str) -> bool:
    """Whether text that ends in a stop and white space ends in an abbreviation or an initial instead of a sentence."""
    if "\n" in ending[-2:]:  # the white space holds a line end
        return False
    match = _LAST_WORD.search(ending)
    if match is None:
        return False
    word = match.group(1)
    if len(word) == 1:
        return word.isupper() and word != "I"
    return word.lower() in _ABBREVIATION_SET
