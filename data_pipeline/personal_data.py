"""Finds personal data and credentials in text and puts typed placeholders in their place; pure.

Only what passes a check of its own kind is replaced: addresses of machines must be global, card numbers must pass Luhn's test and begin as
cards do, telephone numbers must be international or North American. A date, a version or an identifier stays.
"""

import ipaddress
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from data_pipeline.config import PersonalData


def scrub(text: str, kinds: Sequence[PersonalData]) -> tuple[str, dict[PersonalData, int]]:
    """The text with every match of `kinds` replaced by `<EMAIL>`, `<PHONE>`, `<IP>`, `<CARD>` or `<KEY>`, and how many there were of each."""
    counts: dict[PersonalData, int] = {}
    for kind, finder in _FINDERS.items():
        if kind in kinds and (not finder.marks or any(mark in text for mark in finder.marks)):
            text, counts[kind] = _replace(text, finder, f"<{kind.upper()}>")
    return text, {kind: count for kind, count in counts.items() if count}


@dataclass(frozen=True)
class _Finder:
    start: re.Pattern[str]
    """Where a match may begin. Searched fast, because it begins with a set of characters; the pattern, which looks behind, is tried only there."""
    pattern: re.Pattern[str]
    is_genuine: Callable[[str], bool] = lambda found: True
    marks: tuple[str, ...] = ()
    """A text without any of them is not searched."""


def _replace(text: str, finder: _Finder, placeholder: str) -> tuple[str, int]:
    parts: list[str] = []
    done = 0
    for start in finder.start.finditer(text):
        match = finder.pattern.match(text, start.start()) if start.start() >= done else None
        if match is not None and finder.is_genuine(match[0]):
            parts += (text[done : match.start()], placeholder)
            done = match.end()
    return ("".join([*parts, text[done:]]), len(parts) // 2) if parts else (text, 0)


def _is_global_address(found: str) -> bool:
    """Private, loopback and documentation addresses lead to nobody."""
    try:
        return ipaddress.ip_address(found).is_global
    except ValueError:
        return False


def is_card_number(found: str) -> bool:
    """Luhn's checksum (ISO/IEC 7812-1, annex B) over 13 to 19 digits that are not all the same."""
    digits = [int(character) for character in found if character.isdigit()]
    if not 13 <= len(digits) <= 19 or len(set(digits)) == 1:
        return False
    doubled = [sum(divmod(2 * digit, 10)) for digit in digits[-2::-2]]
    return (sum(digits[-1::-2]) + sum(doubled)) % 10 == 0


def _has_phone_length(found: str) -> bool:
    """E.164: at most 15 digits; fewer than 8 are a short number, or no number."""
    return 8 <= sum(map(str.isdigit, found)) <= 15


_KEYS = (
    r"-----BEGIN (?:[A-Z0-9]+ ){0,3}PRIVATE KEY(?: BLOCK)?-----[\s\S]{1,8000}?-----END (?:[A-Z0-9]+ ){0,3}PRIVATE KEY(?: BLOCK)?-----",
    r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b",  # Amazon
    r"\bgh[pousr]_[0-9A-Za-z]{36,251}\b",  # GitHub
    r"\bgithub_pat_[0-9A-Za-z_]{80,100}\b",
    r"\bglpat-[0-9A-Za-z_-]{20,64}(?![\w-])",  # GitLab
    r"\bAIza[0-9A-Za-z_-]{35}(?![\w-])",  # Google
    r"\bxox[abeprs]-[0-9A-Za-z-]{10,250}",  # Slack
    r"\b[sr]k_(?:live|test)_[0-9A-Za-z]{24,250}\b",  # Stripe
    r"\bsk-(?:[a-z]{3,10}\d{0,2}-)?(?=[\w-]{0,250}\d)(?=[\w-]{0,250}[A-Z])[0-9A-Za-z_-]{32,250}(?![\w-])",  # OpenAI, Anthropic
    r"\bhf_[0-9A-Za-z]{34,60}\b",  # Hugging Face
    r"\beyJ[0-9A-Za-z_-]{10,2000}\.eyJ[0-9A-Za-z_-]{10,4000}\.[0-9A-Za-z_-]{10,2000}(?![\w-])",  # JSON web tokens
)
_KEY_MARKS = tuple("PRIVATE AKIA ASIA ghp_ gho_ ghu_ ghs_ ghr_ github_pat_ glpat- AIza xox sk_ rk_ sk- hf_ eyJ".split())  # noqa: SIM905 -- shorter
_FILE_ENDINGS = "png|jpe?g|gif|svg|webp|ico|js|ts|css|html?|json|xml|ya?ml|py|md|txt|exe|dll|zip|gz"
_MAILBOX = r"(?<![\w.%+@/-])[A-Za-z0-9](?:[\w.%+-]{0,62}[\w%+-])?"
_EMAIL = rf"{_MAILBOX}@(?:[A-Za-z0-9-]{{1,63}}\.){{1,8}}(?!(?:{_FILE_ENDINGS})\b)[A-Za-z]{{2,24}}(?![\w@-]|:[\w/~])"
_OCTET = r"(?:25[0-5]|2[0-4]\d|1?\d?\d)"
_NO_VERSION = r"(?<![\w.:-])(?<![vV])(?<!ersion )(?<!elease )"
_IPV4 = rf"{_NO_VERSION}(?:{_OCTET}\.){{3}}{_OCTET}(?![\w-]|\.\d)"
_IPV6 = r"(?<![\w:.])[23][0-9A-Fa-f]{3}:(?:[0-9A-Fa-f]{0,4}:){1,6}[0-9A-Fa-f]{0,4}(?![\w:])"  # 2000::/3, all that is in use
_CARD = r"(?<![\w.,:+-])(?:4\d{3}|5[1-5]\d\d|2[2-7]\d\d|6011|65\d\d|35\d\d|3[47]\d\d|3[068]\d\d)(?:[ -]?\d{2,6}){2,4}(?![\w-]|[.,]\d)"
_GROUPED = r"(?:[ .-]?\(\d{1,4}\)(?:[ .-]?\d{2,8}){1,5}|(?:[ .-]\d{2,8}){2,6})"
_INTERNATIONAL = rf"(?<![\w+.,])\+(?:[1-9]\d{{7,14}}|[1-9]\d{{0,2}}{_GROUPED})(?![\w+]|[.,-]\d)"
_NORTH_AMERICAN = r"(?<![\w.+,$-])(?<!\d )(?:1[ .-])?(?:\([2-9]\d\d\) ?|[2-9]\d\d[ .-])[2-9]\d\d[.-]\d{4}(?![\w-]|[.,]\d)"

_FINDERS: dict[PersonalData, _Finder] = {
    "key": _Finder(re.compile("[-AGghxsre]"), re.compile("|".join(_KEYS)), marks=_KEY_MARKS),
    "email": _Finder(re.compile(r"[A-Za-z0-9](?=[\w.%+-]{0,63}@)"), re.compile(_EMAIL), marks=("@",)),
    "ip": _Finder(re.compile(r"[0-9](?=[0-9A-Fa-f]{0,3}[.:][0-9A-Fa-f:]{1,4}[.:])"), re.compile(f"{_IPV4}|{_IPV6}"), _is_global_address),
    "card": _Finder(re.compile(r"[2-6](?=[0-9]{3}[ -]?[0-9]{2})"), re.compile(_CARD), is_card_number),
    "phone": _Finder(
        re.compile(r"[+(1-9](?=[0-9(]?[0-9]{0,3}[)( .-]{0,2}[0-9(])"), re.compile(f"{_INTERNATIONAL}|{_NORTH_AMERICAN}"), _has_phone_length
    ),
}
"""In the order in which they are looked for: a card number is not also a telephone number."""
