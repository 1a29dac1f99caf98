"""Cleaning of documents and splitting into sentences (pure)."""

import re
import unicodedata

import ftfy

RULES_VERSION = 2
"""Part of the corpus' identity: raise it with every change of what this module returns."""

_CONFIG = ftfy.TextFixerConfig(unescape_html=False, uncurl_quotes=False, normalization="NFC", explain=False)
_LINE_END = re.compile(r"\r\n|[\r\x85\u2028\u2029]")
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ufeff]")
_ASCII_CONTROL = dict.fromkeys([*range(9), 11, 12, *range(14, 32), 127])

# A pattern that begins with a set of characters is searched three times as fast as one that begins with alternatives.
_ASCII_STOP = re.compile(r"""[.!?]+["')\]]*\s+(?=["'(\[]*[A-Z0-9])""")
_STOP = re.compile(
    r"""[.!?…؟۔։።፧।॥။།༎។៕᠃᙮。！？｡]"""
    r"""(?:(?<=[.!?…])[.!?…]*["'”’»)\]]*\s+(?=["'“‘«(\[¿¡]*[^\W_a-z])"""  # then white space, then a capital, a digit or an uncased letter
    r"""|(?<=[؟۔։።፧।॥။།༎។៕᠃᙮])[؟۔։።፧।॥။།༎។៕᠃᙮!?]*["'”’»)\]]*\s*"""  # Arabic, Armenian, Ethiopic, Indic, Burmese, Tibetan, Khmer, …
    r"""|(?<=[。！？｡])[。！？｡]*["'”’」』）]*)"""  # scripts that write no space after a stop
)
_ABBREVIATIONS = (
    "a.k.a adm al approx apr asst aug ave bros ca capt cf cmdr co col corp dec dept dr e.g ed eds eq eqs est feb fig figs gen "
    "gov hon i.e inc jan jr jul jun lt ltd maj mar messrs mme mr mrs ms mt no nos nov oct op pl pp prof pt rep rev sec sen "
    "sep sept sgt sr st str supt u.k u.s univ viz vol vols vs "
    "abb abs bd bspw bzgl bzw d.h dipl evtl ggf hrsg jh mio mrd nr o.ä s.o tel u.a usw vgl z.b z.t zzgl "  # German
    "av boul éd mlle n.b p.ex tél "  # French
    "dra ee.uu gral lic núm p.ej pág págs sra srta ud uds "  # Spanish
    "avv dott ecc dhr mevr bijv enz o.a sra srs v.ex "  # Italian, Dutch, Portuguese
    "г гг д др им млн млрд н.э обл п проф р руб с см стр т т.д т.е т.п ул"  # Russian
)
_ABBREVIATION_SET = frozenset(_ABBREVIATIONS.split())
_LAST_WORD = re.compile(r"([\w.]+)\.\s+$")


def clean_document(text: str) -> str:
    """Repaired Unicode (ftfy: mojibake, NFC, ligatures, widths), one kind of line end, no control characters, no outer white space."""
    if text.isascii():  # ftfy changes no ASCII line, and costs a hundred times more than this test
        text = text.replace("\r\n", "\n").replace("\r", "\n").translate(_ASCII_CONTROL)
    else:
        text = _CONTROL.sub("", _LINE_END.sub("\n", text))
        text = "\n".join(line if line.isascii() else ftfy.fix_text(line, _CONFIG) for line in text.split("\n"))
        text = unicodedata.normalize("NFC", text)
    return "\n".join(map(str.rstrip, text.split("\n"))).strip()


def split_sentences(text: str) -> list[str]:
    """Sentences of a cleaned document, in order and without outer white space; together they cover it. A line end ends a sentence."""
    sentences: list[str] = []
    for line in text.split("\n"):
        start = 0
        for match in (_ASCII_STOP if line.isascii() else _STOP).finditer(line):
            if match[0][0] == "." and _is_abbreviation(line[max(start, match.start() - 24) : match.end()]):
                continue
            sentences.append(line[start : match.end()].strip())
            start = match.end()
        sentences.append(line[start:].strip())
    return [sentence for sentence in sentences if sentence]


def _is_abbreviation(ending: str) -> bool:
    """Whether text that ends in a stop and white space ends in an abbreviation or an initial instead of a sentence."""
    match = _LAST_WORD.search(ending)
    if match is None:
        return False
    word = match[1]
    return (len(word) == 1 and word.isupper() and word != "I") or word.lower() in _ABBREVIATION_SET
