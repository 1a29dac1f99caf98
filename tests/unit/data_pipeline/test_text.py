"""Cleaning and sentence splitting."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.text import clean_document, split_sentences


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("One. Two! Three?", ["One.", "Two!", "Three?"]),
        ("Dr. Smith met Mr. Jones. They spoke.", ["Dr. Smith met Mr. Jones.", "They spoke."]),
        ("See e.g. Figure 3, cf. Table 2. Then stop.", ["See e.g. Figure 3, cf. Table 2.", "Then stop."]),
        ("It costs 3.5 dollars. No more.", ["It costs 3.5 dollars.", "No more."]),
        ("J. R. R. Tolkien wrote it. I did not.", ["J. R. R. Tolkien wrote it.", "I did not."]),
        ("So did I. Then we left.", ["So did I.", "Then we left."]),
        ('He said "Go." Then he left.', ['He said "Go."', "Then he left."]),
        ("a heading\nand text below. it goes on", ["a heading", "and text below. it goes on"]),
        ("first\n\n\nsecond", ["first", "second"]),
        ("Ends with Mr.\nNext line.", ["Ends with Mr.", "Next line."]),
        ("你好。再见！好", ["你好。", "再见！", "好"]),
        ("Привет. Как дела?", ["Привет.", "Как дела?"]),
        ("यह है। वह नहीं। क्या", ["यह है।", "वह नहीं।", "क्या"]),
        ("کیا حال ہے؟ ٹھیک ہے۔ شکریہ", ["کیا حال ہے؟", "ٹھیک ہے۔", "شکریہ"]),
        ("هل هذا صحيح؟ نعم. شكرا", ["هل هذا صحيح؟", "نعم.", "شكرا"]),
        ("Բարև։ Ինչպե՞ս ես։", ["Բարև։", "Ինչպե՞ս ես։"]),
        ("ሰላም። እንዴት ነህ፧ ደህና።", ["ሰላም።", "እንዴት ነህ፧", "ደህና።"]),
        ("မင်္ဂလာပါ။ နေကောင်းလား။", ["မင်္ဂလာပါ။", "နေကောင်းလား။"]),
        ("བཀྲ་ཤིས། བདེ་ལེགས།", ["བཀྲ་ཤིས།", "བདེ་ལེགས།"]),
        ("សួស្តី។ អរគុណ៕", ["សួស្តី។", "អរគុណ៕"]),
        ("¿Qué tal? ¡Muy bien! Adiós…", ["¿Qué tal?", "¡Muy bien!", "Adiós…"]),
        ("Das ist z.B. Öl, vgl. Übung 3, bzw. Ähnliches. Ende.", ["Das ist z.B. Öl, vgl. Übung 3, bzw. Ähnliches.", "Ende."]),
        ("Voir p.ex. Évian. Fin.", ["Voir p.ex. Évian.", "Fin."]),
        ("На ул. Мира, т.е. Центр. Всё.", ["На ул. Мира, т.е. Центр.", "Всё."]),
        ("你说“走。”他走了", ["你说“走。”", "他走了"]),
        ("", []),
    ],
)
def test_sentences(text: str, expected: list[str]) -> None:
    assert split_sentences(text) == expected


@given(st.text())
def test_sentences_cover_the_text(text: str) -> None:
    cleaned = clean_document(text)
    joined = "".join("".join(sentence.split()) for sentence in split_sentences(cleaned))
    assert joined == "".join(cleaned.split())


def test_cleaning_repairs_unicode() -> None:
    assert clean_document("schÃ¶n\r\nﬁne\x00\ufeff  \n") == "schön\nfine"
    assert clean_document("cafe\u0301") == "café"
    assert clean_document("a < b &amp; c") == "a < b &amp; c"


@given(st.text())
def test_cleaning_is_idempotent_on_ascii(text: str) -> None:
    cleaned = clean_document(text.encode("ascii", "ignore").decode())
    assert clean_document(cleaned) == cleaned
