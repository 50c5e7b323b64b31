"""Converts values of user code into text and into JSON types."""

import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import fields, is_dataclass
from datetime import date, time, timedelta
from decimal import Decimal
from enum import Enum
from fractions import Fraction
from types import GeneratorType, NoneType
from typing import Any
from uuid import UUID

import msgspec

from loom.schemas.base import MAX_JSON_DEPTH, encode

MAX_VALUES = 250_000
"""Maximum number of values inside a value, so that an endless iterator does not block the process."""

_NOT_UTF8 = "the value contains bytes that are not UTF-8 text; encode them, as base64 for example"
_UNCHANGED = frozenset({bool, int, NoneType})
_BY_MSGSPEC = (date, time, timedelta, UUID, Decimal)
_BYTES = (bytes, bytearray, memoryview)


class NotText(ValueError):
    """A value is neither text nor JSON; the message has the reason."""


def to_text(value: Any) -> str:
    """Return a value as text: a str unchanged, bytes decoded as UTF-8, any other value as JSON.

    Supported are Structs, dataclasses, attrs classes, TypedDict, and pydantic models with their own serialisation.
    A NamedTuple becomes an array, an Enum its value, and dates, times, UUID, Decimal, Fraction and Path a string.
    Sets, deques, ranges, generators, and objects with `tolist`, such as numpy arrays, become arrays. Values may be
    nested.

    Raises:
        NotText: The value contains another object, bytes that are not UTF-8, or a number that is not finite. More than
            32 levels of nesting or 250,000 values raise as well.

    Example:
        >>> to_text({"when": date(2024, 5, 1)})
        '{"when":"2024-05-01"}'
    """
    if type(value) is str and value.isascii():
        return value
    plain = to_json(value)
    if isinstance(plain, str) and isinstance(value, (str, *_BYTES)):
        return plain
    try:
        return encode(plain).decode()
    except ValueError:  # the digit limit of Python
        raise NotText("the value contains an integer of more than 4300 digits") from None


def to_json(value: Any) -> Any:
    """Return a value as JSON types: None, bool, int, float, str, list and dict.

    Raises:
        NotText: Same as `to_text`.
    """
    try:
        return _Conversion().convert(value, 1)
    except NotText:
        raise
    except UnicodeDecodeError:
        raise NotText(_NOT_UTF8) from None
    except (TypeError, ValueError, RecursionError) as error:  # raised by the serializer of the value
        raise NotText(f"a value of type {type(value).__name__} cannot become JSON ({type(error).__name__})") from None


class _Conversion:
    """Converts one value recursively, and counts the values inside it."""

    def __init__(self) -> None:
        self._count = 0

    def convert(self, value: Any, depth: int) -> Any:
        self._count += 1
        if self._count > MAX_VALUES:
            raise NotText(f"the value contains more than {MAX_VALUES} values")
        if depth > MAX_JSON_DEPTH:
            raise NotText(f"the value is nested more than {MAX_JSON_DEPTH} levels deep")
        if type(value) in _UNCHANGED:
            return value
        if not isinstance(value, Enum):
            scalar = _scalar(value)
            if scalar is not None:
                return scalar
            if isinstance(value, Mapping):
                return self._object(value.items(), depth)
            items = _items(value)
            if items is not None:
                made = [self.convert(item, depth + 1) for item in items]
                return _sorted(made) if isinstance(value, AbstractSet) else made
        return self.convert(_content_of(value), depth + 1)

    def _object(self, items: Iterable[tuple[Any, Any]], depth: int) -> dict[str, Any]:
        made: dict[str, Any] = {}
        for key, value in items:
            name = self.convert(key, depth + 1)
            if isinstance(name, (list, dict)):
                raise NotText(f"the value has a {type(key).__name__} as a key, which JSON does not support")
            name = name if isinstance(name, str) else encode(name).decode()
            if name in made:
                raise NotText("the value has two keys that are equal in JSON")
            made[name] = self.convert(value, depth + 1)
        return made


def _scalar(value: Any) -> Any:
    """Return a value as a str or a number, or None if it is neither."""
    made: Any = None
    if isinstance(value, str):
        made = str.encode(value, errors="replace").decode()  # a plain str, also for a subclass
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise NotText("the value contains a number that is not finite, which JSON does not support")
        made = float(value)
    elif isinstance(value, int):
        made = int(value)
    elif isinstance(value, _BYTES):
        made = bytes(value).decode()
    elif isinstance(value, _BY_MSGSPEC):
        made = msgspec.to_builtins(value)
    elif isinstance(value, os.PathLike):
        made = os.fsdecode(value)
    elif isinstance(value, Fraction):
        made = str(value)
    return made


def _items(value: Any) -> Iterable[Any] | None:
    """Return the items of a collection or of a built-in iterator, or None.

    Other iterators are not read, because they may be files or sockets.
    """
    if isinstance(value, (Sequence, AbstractSet)) or type(value).__name__ in ("deque", "dict_values"):
        return value  # type: ignore[no-any-return]
    if isinstance(value, GeneratorType):
        return value
    if isinstance(value, Iterator) and type(value).__module__ in ("builtins", "itertools"):
        return value
    return None


def _content_of(value: Any) -> Any:
    """Return the content of an object.

    Raises:
        NotText: The class of the object is not supported.
    """
    kind = type(value)
    serializer = getattr(kind, "__pydantic_serializer__", None)
    if isinstance(value, type):
        raise NotText(f"the class {value.__name__} is neither text nor JSON")
    if isinstance(value, Enum):
        made = value.value
    elif serializer is not None:
        made = serializer.to_python(value, mode="json", warnings=False)
    elif isinstance(value, msgspec.Struct):  # msgspec knows its names and tags
        made = msgspec.to_builtins(value, str_keys=True, builtin_types=_BYTES, enc_hook=to_json)
    elif is_dataclass(value):
        made = {field.name: getattr(value, field.name) for field in fields(value)}
    elif hasattr(kind, "__attrs_attrs__"):
        made = {field.name: getattr(value, field.name) for field in kind.__attrs_attrs__}
    elif callable(getattr(value, "tolist", None)):
        made = value.tolist()
    elif hasattr(kind, "__fields__") and callable(getattr(value, "json", None)):  # a pydantic 1 model
        made = msgspec.json.decode(value.json())
    else:
        raise NotText(f"a value of type {kind.__name__} is neither text nor JSON")
    return made


def _sorted(items: list[Any]) -> list[Any]:
    """Return the items of a set in an order that is equal in every process."""
    try:
        return sorted(items)
    except TypeError:  # mixed types, or objects
        return sorted(items, key=encode)
