"""Typed values of users' code: their JSON Schema, and their way from and to JSON.

Types and values may mix msgspec Structs, dataclasses, attrs classes, TypedDict, NamedTuple, Enum and pydantic models.
pydantic is used where a type comes from it, and imported by nothing here.
"""

from loom.agents.values.decode import from_json
from loom.agents.values.json_schema import json_schema, portable
from loom.agents.values.text import NotText, to_json, to_text

__all__ = ["NotText", "from_json", "json_schema", "portable", "to_json", "to_text"]
