"""How shapes of answers become JSON schemas (pure)."""

from pydantic import ConfigDict

SHAPE = ConfigDict(use_attribute_docstrings=True, json_schema_serialization_defaults_required=True)
"""Attribute docstrings describe the keys; each is always there, unless it is `NotRequired`."""
