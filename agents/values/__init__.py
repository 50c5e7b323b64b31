"""JSON Schemas of types in user code, and the conversion of their values from and to JSON.

Types and values may mix msgspec Structs, dataclasses, attrs classes, TypedDict, NamedTuple, Enum and pydantic models.
This package does not import pydantic; it is used for types that come from it.
"""

from loom.agents.values.decode import from_json
from loom.agents.values.json_schema import json_schema, portable
from loom.agents.values.text import NotText, to_json, to_text

__all__ = ["NotText", "from_json", "json_schema", "portable", "to_json", "to_text"]
