"""Checks the contents of a YAML against a typed model: all that is wrong in one answer, each with its dotted path (pure)."""

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from types import UnionType
from typing import Any, TypeVar, Union, cast, get_args, get_origin

from pydantic import ValidationError

from data_pipeline.config import NAME, Section
from data_pipeline.errors import ConfigError

S = TypeVar("S", bound=Section)
Path_ = tuple[str | int, ...]


def validate(model: type[S], data: Mapping[str, Any], where: str) -> S:
    """Build `model` from `data`.

    Raises:
        ConfigError: one line for each problem: dotted path, what was expected, what was found, nearest valid name.
    """
    try:
        return model.model_validate(data)
    except ValidationError as error:
        lines = list(dict.fromkeys(_problems(model, data, error)))
        noun = "problem" if len(lines) == 1 else "problems"
        cause = f"{where}: {len(lines)} {noun}\n" + "\n".join(f"  {line}" for line in lines) if len(lines) > 1 else f"{where}: {lines[0]}"
        raise ConfigError(cause, "Correct the file or the --set; `maskwright schema` lists every key.") from error


def _problems(model: type[Section], data: Any, error: ValidationError) -> Iterator[str]:
    """One line for each path: a union reports once for each of its members, which here become one line."""
    expected: dict[Path_, list[str]] = {}
    found: dict[Path_, Any] = {}
    for item in error.errors(include_url=False):
        path, value = _navigate(data, item["loc"])
        kind = item["type"]
        dotted = ".".join(str(part) for part in path)
        if kind == "extra_forbidden":
            yield f"{dotted}: unknown key{_nearest(model, path)}"
        elif kind == "missing":
            yield f"{'.'.join(str(part) for part in item['loc'])}: required, not given"
        elif kind == "value_error":
            yield f"{dotted + ': ' if dotted else ''}{str(item['msg']).removeprefix('Value error, ')}"
        else:
            expected.setdefault(path, []).append(_expectation(str(item["msg"])))
            found[path] = value
    for path, wanted in expected.items():
        yield f"{'.'.join(str(part) for part in path)}: expected {' or '.join(dict.fromkeys(wanted))}, found {shown(found[path])}"


def _navigate(data: Any, location: tuple[str | int, ...]) -> tuple[Path_, Any]:
    """The part of `location` that names something in `data` (the rest are pydantic's names of union members), and its value."""
    path: list[str | int] = []
    for part in location:
        if isinstance(data, dict) and part in data:
            data = cast(dict[Any, Any], data)[part]
        elif isinstance(data, list | tuple) and isinstance(part, int) and part < len(cast(Sequence[Any], data)):
            data = cast(Sequence[Any], data)[part]
        else:
            break
        path.append(part)
    return tuple(path), data


_IN_WORDS = {
    "integer": "a whole number",
    "number": "a number",
    "string": "text",
    "tuple": "a list",
    "boolean": "true or false",
    f"match pattern '{NAME}'": "letters, digits, dots, underscores and dashes, a letter or digit first",
}


def _expectation(message: str) -> str:
    message = re.sub(r"^(Input should be|String should|Value should)\s*", "", message)
    message = re.sub(r"^a valid (\w+)(, unable to parse.*| with a fractional.*)?$", r"\1", message)
    message = re.sub(r"^a valid dictionary or instance of .*$", "keys and values", message)
    return _IN_WORDS.get(message, message)


def shown(value: Any) -> str:
    if value is None:
        return "nothing"
    text = repr(value)
    return f"{text if len(text) <= 60 else text[:57] + '...'} ({_KINDS.get(type(value), type(value).__name__)})"


_KINDS: dict[type, str] = {
    str: "text",
    int: "whole number",
    float: "number",
    bool: "true/false",
    list: "list",
    dict: "mapping",
}


def _nearest(model: type[Section], path: Path_) -> str:
    """`; nearest: …` for an unknown key: a sibling that is spelled alike, else a key of that name somewhere else."""
    *parents, key = path
    siblings = _fields_at(model, parents)
    close = difflib.get_close_matches(str(key), siblings, n=1, cutoff=0.6)
    if close:
        return f"; nearest: {'.'.join([*map(str, parents), close[0]])}"
    elsewhere = [dotted for dotted in dotted_names(model) if dotted.rsplit(".", 1)[-1] == key]
    if elsewhere:
        return f"; nearest: {elsewhere[0]}"
    return f"; valid here: {', '.join(siblings)}" if siblings else ""


def _fields_at(model: type[Section], parents: Sequence[str | int]) -> list[str]:
    current: type[Section] | None = model
    for part in parents:
        if isinstance(part, int):
            continue
        field = current.model_fields.get(part) if current else None
        current = _section_of(field.annotation) if field else None
    return list(current.model_fields) if current else []


def _section_of(annotation: Any) -> type[Section] | None:
    """The Section inside an annotation such as `tuple[TaskConfig, ...]` or `X | None`."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    if get_origin(annotation) in {tuple, list, Union, UnionType}:
        return next((section for argument in get_args(annotation) if (section := _section_of(argument))), None)
    return None


def dotted_names(model: type[Section], prefix: str = "") -> Iterator[str]:
    """Every key of a configuration as a dotted path."""
    for name, field in model.model_fields.items():
        yield prefix + name
        section = _section_of(field.annotation)
        if section is not None:
            yield from dotted_names(section, f"{prefix}{name}.")
