"""Leaves secrets out of what is shown or logged (pure)."""

import re
from typing import Any

_CREDENTIALS = re.compile(r"(?<=://)[^/@\s'\"]+@")
_SIGNATURES = re.compile(r"(?i)([?&][\w.-]*(?:sig|signature|password|secret|token|key|credential)[\w.-]*=)[^&\s'\";]+")
_SECRET_LINES = re.compile(r"(?im)^(\s*[\w.-]*(?:password|secret|token|api_key|access_key|credential)s?\s*:\s*)\S.*$")


def redacted(text: str) -> str:
    """Without credentials and signatures in URLs and values of keys that name secrets."""
    return _SECRET_LINES.sub(r"\1(redacted)", _SIGNATURES.sub(r"\1(redacted)", _CREDENTIALS.sub("(redacted)@", text)))


def redacted_values(value: Any) -> Any:
    """The same of every text in nested dicts."""
    if isinstance(value, dict):
        return {key: redacted_values(item) for key, item in value.items()}
    return redacted(value) if isinstance(value, str) else value
