"""Leaves secrets out of what is shown or logged (remembers those that this process was given)."""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

_CREDENTIALS = re.compile(r"(?<=://)[^/@\s'\"]+@")
_SIGNATURES = re.compile(r"(?i)([?&][\w.-]*(?:sig|signature|password|secret|token|key|credential)[\w.-]*=)[^&\s'\";]+")
_SECRET_LINES = re.compile(r"(?im)^(\s*[\w.-]*(?:password|secret|token|api_key|access_key|credential)s?\s*:\s*)\S.*$")
_ASSIGNMENTS = re.compile(
    r"(?i)(?<![?&\w.-])([\w.-]*(?:password|secret|token|api_key|access_key|credential)\s?=\s?['\"]?)(?!=|\(redacted\))[^\s'\";,)]+"
)
_HEADERS = re.compile(r"((?i:\bauthorization['\"]?\s*[:=]\s*['\"]?)(?:\w+\s+)?|\b[Bb]earer\s+|\b[Bb]asic\s+(?=[\w+/]{8}))[^\s'\";,]+")
_SECRET_NAMES = re.compile(r"(?i)(^|_)(api_?key|key|token|secret|password)s?(_|$)")
_SHORTEST = 6
"""Characters of a value that is taken for a secret: shorter ones, as of `DEBUG=1`, are parts of words and numbers."""

_hidden: list[str] = []
"""Values of secrets, the longest first."""


def hide(values: Iterable[str]) -> None:
    """Leave these values, too, out of all that is redacted in this process from now on."""
    _hidden.extend(value for value in values if len(value) >= _SHORTEST and value not in _hidden)
    _hidden.sort(key=len, reverse=True)


def without_hidden(text: str) -> str:
    """Without the values of secrets that this process was given."""
    for value in _hidden:
        text = text.replace(value, "(redacted)")
    return text


def without_values(text: str, environment: Mapping[str, str]) -> str:
    """Without the values of variables whose names name secrets, wherever they stand."""
    values = [value for name, value in environment.items() if _SECRET_NAMES.search(name) and len(value) >= _SHORTEST]
    for value in sorted(values, key=len, reverse=True):  # one may be part of another
        text = text.replace(value, "(redacted)")
    return text


def redacted(text: str) -> str:
    """Without those that were hidden, credentials and signatures in URLs, values of keys that name secrets, and headers that authorise."""
    text = _SIGNATURES.sub(r"\1(redacted)", _CREDENTIALS.sub("(redacted)@", without_hidden(text)))
    text = _HEADERS.sub(r"\1(redacted)", text)
    return _ASSIGNMENTS.sub(r"\1(redacted)", _SECRET_LINES.sub(r"\1(redacted)", text))


def without_hidden_values(value: Any) -> Any:
    """`without_hidden` of every text in nested dicts and lists."""
    return _changed(value, without_hidden)


def redacted_values(value: Any) -> Any:
    """`redacted` of every text in nested dicts and lists."""
    return _changed(value, redacted)


def _changed(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, dict):
        return {key: _changed(item, change) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_changed(item, change) for item in value]
    return change(value) if isinstance(value, str) else value
