"""What the machines of a cluster install where its environment is `pip` (reads installed distributions and a constraints file)."""

import re
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import NormalizedName, canonicalize_name

from data_pipeline.errors import ConfigError, EnvironmentMismatchError, MaskwrightError
from data_pipeline.storage import Location

_OURS = Requirement("maskwright[s3,zst]")
"""Whoever installs for a cluster wants object stores and compressed texts."""


def requirements(constraints: str) -> list[str]:
    """What our packages need to run, of the releases that the constraints file of that path or URL names; what it does not name is free.

    What the libraries of this machine need in turn is named, too, so that nodes which install at different times get the same.

    Raises:
        ConfigError: there is no such file. EnvironmentMismatchError: our packages are not installed here, so nobody knows what they need.
    """
    releases, wanted = _releases(constraints), dict[NormalizedName, set[str]]()
    try:
        direct = {canonicalize_name(each.name): str(each.specifier) for each in _needs(_OURS)}
    except PackageNotFoundError as error:
        raise EnvironmentMismatchError(
            "maskwright is not installed here, so nobody knows what it needs", "Install it: `pip install -e .`."
        ) from error
    _collect(_OURS, wanted)
    return [
        f"{name}[{','.join(sorted(extras))}]{release}" if extras else f"{name}{release}"
        for name, extras in sorted(wanted.items())
        if (release := releases.get(name) or direct.get(name)) is not None
    ]


def _collect(requirement: Requirement, wanted: dict[NormalizedName, set[str]]) -> None:
    """Add what a requirement needs, and what that needs in turn."""
    for each in _needs(requirement):
        name = canonicalize_name(each.name)
        if name not in wanted or not each.extras <= wanted[name]:
            wanted[name] = wanted.get(name, set()) | each.extras
            _collect(each, wanted)


def _needs(requirement: Requirement) -> Iterator[Requirement]:
    try:
        found = map(Requirement, requires(requirement.name) or ())
    except PackageNotFoundError:
        if requirement is _OURS:
            raise
        return  # not on this machine: of another platform
    for each in found:
        if each.marker is None or any(each.marker.evaluate({"extra": extra}) for extra in ("", *requirement.extras)):
            yield each


def _releases(path: str) -> dict[NormalizedName, str]:
    """Specifier of each package in a constraints file: of those lines that are meant for a platform like this one."""
    try:
        text = Location.at(path).read_bytes().decode()
        found = [each for number, line in _lines(text) if (each := _constraint(line, number)) is not None]
    except (MaskwrightError, OSError, UnicodeDecodeError, ValueError) as error:
        cause = error.cause if isinstance(error, MaskwrightError) else error
        remedy = "Give the path of a file as `pip freeze` makes."
        raise ConfigError(f"environment.pip: the constraints file {path} cannot be read: {cause}", remedy) from error
    return {canonicalize_name(each.name): str(each.specifier) for each in found}


def _lines(text: str) -> Iterator[tuple[int, str]]:
    """Lines with the number of their first, those that a backslash continues put together, without comments and hashes."""
    begun, number = "", 0
    for last, line in enumerate(text.splitlines(), 1):
        number = number if begun else last
        begun += re.sub(r"(^|\s)#.*", "", line)
        if begun.endswith("\\"):
            begun = begun[:-1] + " "
            continue
        if stripped := re.sub(r"\s--hash=\S+", "", " " + begun).strip():
            yield number, stripped
        begun = ""


def _constraint(line: str, number: int) -> Requirement | None:
    """What a line says; None where that is meant for another platform. Raises ValueError where it says what no node could be told."""
    if line.startswith("-"):
        raise ValueError(f"line {number} is an option of pip, {line.split(maxsplit=1)[0]}, which nodes are not given")
    try:
        found = Requirement(line)
    except InvalidRequirement as error:
        raise ValueError(f"line {number}: {error}") from error
    if found.url is not None:
        raise ValueError(f"line {number} has a URL for {found.name}: expected a release, as {found.name}==1.0")
    return found if found.marker is None or found.marker.evaluate() else None
