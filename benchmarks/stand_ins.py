"""Stand-ins for packages that the product imports and a measurement does not use, so that it runs where they are not installed."""

import importlib.machinery
import importlib.util
import sys
from collections.abc import Iterable
from types import ModuleType
from typing import Any


class StandIn(ModuleType):
    """A module whose names are there; to use one is an error that says which package is missing."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Missing(self.__name__, name)


class _Missing:
    def __init__(self, module: str, name: str) -> None:
        self._said = f"{module}.{name} is needed, but {module.partition('.')[0]} is not installed"

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        raise ModuleNotFoundError(self._said)


def stand_in(modules: Iterable[str]) -> list[str]:
    """Put stand-ins in the place of those that are not installed, packages before what is in them; returns their names."""
    made: list[str] = []
    for name in modules:
        package = name.partition(".")[0]
        if package in made or (name not in sys.modules and importlib.util.find_spec(package) is None):
            module = StandIn(name)
            module.__spec__ = importlib.machinery.ModuleSpec(name, None)
            module.__path__ = []
            sys.modules[name] = module
            made.append(name)
    return made
