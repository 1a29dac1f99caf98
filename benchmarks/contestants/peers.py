"""Finds a function by name in the module of a peer, which only its own environment can import."""

from collections.abc import Callable
from importlib import import_module
from typing import Any


def load(name: str) -> Callable[..., Any]:
    """The function `module:function` of this package."""
    module, _, function = name.partition(":")
    return getattr(import_module(f"benchmarks.contestants.{module}"), function)
