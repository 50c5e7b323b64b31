"""Types that msgspec does not support: those of pydantic, paths and fractions."""

import sys
from fractions import Fraction
from functools import lru_cache
from pathlib import PurePath
from typing import Any

from loom.agents.values.annotations import ForPydantic, is_pydantic
from loom.schemas.base import encode

MAX_FAULTS = 3
"""Maximum number of faults of a value in a message."""


def schema_hook(kind: Any) -> dict[str, Any]:
    """Return the JSON Schema of a type that msgspec does not support.

    Raises:
        TypeError: The type is not supported here either.
    """
    if isinstance(kind, type) and issubclass(kind, PurePath):
        return {"type": "string", "description": "a path"}
    if kind is Fraction:
        return {"type": "string", "description": "a fraction such as 1/3"}
    adapter = _adapter(kind)
    if adapter is None:
        raise TypeError(f"JSON cannot represent a value of type {getattr(kind, '__name__', kind)}")
    schema: dict[str, Any] = adapter.json_schema(ref_template="#/$defs/{model}")
    return schema


def dec_hook(kind: Any, value: Any) -> Any:
    """Return a value of JSON types as a value of type `kind`.

    Raises:
        ValueError: The value is not valid for the type.
        NotImplementedError: The type is not supported.
    """
    if kind is Fraction or (isinstance(kind, type) and issubclass(kind, PurePath)):
        return _from_str(kind, value)
    adapter = _adapter(kind)
    if adapter is None:
        raise NotImplementedError
    try:
        return adapter.validate_json(encode(value))
    except ValueError as error:
        if not hasattr(error, "errors"):
            raise
        raise ValueError(_fault_message(error)) from None


def _from_str(kind: Any, value: Any) -> Any:
    if not isinstance(value, str):
        raise ValueError(f"Expected `str` for a {kind.__name__}, got `{type(value).__name__}`")  # noqa: TRY004 - msgspec expects ValueError
    try:
        return kind(value)
    except ArithmeticError:  # 1/0
        raise ValueError(f"Invalid {kind.__name__}") from None


def _adapter(kind: Any) -> Any:
    """Return the TypeAdapter of a pydantic type, or None for any other type."""
    kind = kind.kind if isinstance(kind, ForPydantic) else kind if is_pydantic(kind) else None
    if kind is None:
        return None
    try:
        return _cached_adapter(kind)
    except TypeError:  # unhashable metadata
        return _cached_adapter.__wrapped__(kind)


@lru_cache(maxsize=256)
def _cached_adapter(kind: Any) -> Any:
    return sys.modules["pydantic"].TypeAdapter(kind)  # a program with such a type has imported pydantic


def _fault_message(error: Any) -> str:
    """Return the faults found by pydantic, one clause per fault, without the values."""
    faults = error.errors(include_url=False, include_input=False, include_context=False)
    clauses = []
    for fault in faults[:MAX_FAULTS]:
        place = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in fault["loc"])
        clauses.append(f"{place.removeprefix('.')}: {fault['msg']}" if place else fault["msg"])
    more = [f"{len(faults) - MAX_FAULTS} more faults"] if len(faults) > MAX_FAULTS else []
    return "; ".join([*clauses, *more])
