"""What is personal data is replaced, what only looks like it stays."""

import time
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.config import PersonalData
from data_pipeline.personal_data import is_card_number, scrub

ALL: tuple[PersonalData, ...] = get_args(PersonalData)
_BLOCK = "-----BEGIN RSA PRIVATE KEY-----\nMIIEow\nIBAAKC==\n-----END RSA PRIVATE KEY-----"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Write to jane.doe+news@mail.example.co.uk.", "Write to <EMAIL>."),
        ("<a@b.org>, c_d@e-f.net", "<<EMAIL>>, <EMAIL>"),
        ("mailto:x@y.com?subject=hi", "mailto:<EMAIL>?subject=hi"),
        ("Call +1 (212) 555-0199 now", "Call <PHONE> now"),
        ("Tel. +49 30 901820, +442079460958.", "Tel. <PHONE>, <PHONE>."),
        ("(212) 555-0199 or 212-555-0199 or 212.555.0199", "<PHONE> or <PHONE> or <PHONE>"),
        ("from 8.8.8.8 and 151.101.1.140:443", "from <IP> and <IP>:443"),
        ("at 2606:4700:4700::1111.", "at <IP>."),
        ("card 4111 1111 1111 1111, 5500-0000-0000-0004", "card <CARD>, <CARD>"),
        ("378282246310005", "<CARD>"),
        ("id AKIAIOSFODNN7EXAMPLE!", "id <KEY>!"),
        ("token ghp_" + "a1B2" * 9, "token <KEY>"),
        (f"key:\n{_BLOCK}\nend", "key:\n<KEY>\nend"),
        ("hf_" + "aB" * 17 + " sk-proj-" + "Ab3" * 14, "<KEY> <KEY>"),
    ],
)
def test_replaced(text: str, expected: str) -> None:
    assert scrub(text, ALL)[0] == expected


@pytest.mark.parametrize(
    "text",
    [
        "Released on 2026-11-23T10:15:00+0100, 23.11.2026 and 11/23/2026.",
        "version 1.2.3.4, v8.8.8.8, Windows 10.0.19041.1, 1.2.3.4.5, 300.1.2.3, release 4.4.4.4",
        "127.0.0.1, 192.168.0.1, 10.0.0.1, 0.0.0.0, 255.255.255.255, fe80::1, ::1",
        "std::vector, dead::beef, abc::def, 12:30:45, 00:1A:2B:3C:4D:5E",
        "@decorator, user@localhost, a@b, image@2x.png, git@github.com:owner/repo.git, x @ y.com",
        "ISBN 978-0-306-40615-7, 9780306406157, 4111 1111 1111 1112, 0000 0000 0000 0000",
        "1234567890123456, 3.14159265358979, 12345678901234567890, 1-800, 555-0199",
        "{6B29FC40-CA47-1067-B31D-00DD010662DA} 0x4111111111111111 a4111111111111111",
        "x+12345678 1e+12345678 +12 C++11 +1.23456789 1,234,567 100 200-300-4000",
        "AKIA is a prefix, ghp_ too; sk-learn, sk-some-long-identifier-of-words-only-here, eyJ, the public key block",
        "-----BEGIN PUBLIC KEY-----\nMIIBI\n-----END PUBLIC KEY-----",
    ],
)
def test_left_alone(text: str) -> None:
    assert scrub(text, ALL) == (text, {})


def test_counts_by_type_and_only_what_is_asked_for() -> None:
    text = "a@b.org, c@d.org, 8.8.8.8, 4111111111111111"
    assert scrub(text, ALL)[1] == {"email": 2, "ip": 1, "card": 1}
    assert scrub(text, ("ip",)) == ("a@b.org, c@d.org, <IP>, 4111111111111111", {"ip": 1})
    assert scrub(text, ()) == (text, {})


@given(st.integers(10**14, 10**15 - 1))
def test_one_of_ten_check_digits_passes_luhn(body: int) -> None:
    assert sum(is_card_number(f"{body}{digit}") for digit in range(10)) == 1


@given(st.text())
def test_scrubbing_twice_changes_nothing_more(text: str) -> None:
    once = scrub(text, ALL)[0]
    assert scrub(once, ALL)[0] == once


def test_hostile_text_takes_no_time() -> None:
    for text in (
        "a." * 50_000 + "@",
        "1-" * 50_000,
        "+1" * 50_000,
        "4111 " * 20_000,
        "2001:" * 20_000,
        "-----BEGIN PRIVATE KEY-----" * 2_000,
        "sk-" * 30_000,
    ):
        started_at = time.process_time()
        scrub(text, ALL)
        assert time.process_time() - started_at < 2.0, text[:20]  # quadratic work on 100,000 characters takes minutes
