"""Holds what verbs answer with --json against the schema of `maskwright schema --answers`: every key is there, and every key is documented."""

import json
from typing import Any

from jsonschema import Draft202012Validator

from launcher.answers.table import ANSWERS, answers_schema


def require_documented(verb: str, printed: str) -> list[Any]:
    """The documents of an answer, in the lines of `printed` that are JSON; fails where one is not as documented."""
    documents = [json.loads(line) for line in printed.splitlines() if line.startswith(("{", "["))]
    assert documents, f"{verb} --json answered nothing:\n{printed}"
    assert ANSWERS[verb].a_line_each or len(documents) == 1, f"{verb} --json answered {len(documents)} documents"
    validator = Draft202012Validator(_closed(answers_schema()[verb]["schema"]))
    for document in documents:
        errors = [f"{error.json_path}: {error.message[:300]}" for error in validator.iter_errors(document)]
        assert not errors, f"{verb} --json is not as documented: " + "; ".join(errors)
    return documents


def _closed(schema: Any) -> Any:
    """The same schema, which admits no other keys than its own."""
    if isinstance(schema, list):
        return [_closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {key: _closed(value) for key, value in schema.items()}
    return {**closed, "additionalProperties": False} if "properties" in closed and closed.get("type") == "object" else closed
