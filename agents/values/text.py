"""Values that users' code returned, as text and as JSON's own types."""

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
"""Most numbers, texts and collections one value may hold; an iterator without end must not take the process."""

_NOT_UTF8 = "the value holds bytes that are not UTF-8 text; encode them, as base64 for example"
_AS_THEY_ARE = frozenset({bool, int, NoneType})
_BY_MSGSPEC = (date, time, timedelta, UUID, Decimal)
_BYTES = (bytes, bytearray, memoryview)


class NotText(ValueError):
    """A value is neither text nor JSON; the message has a sentence on why."""


def to_text(value: Any) -> str:
    """Return a user's value as text: a str as it is, bytes as the UTF-8 they are, anything else as JSON.

    JSON is made of Structs, dataclasses, attrs classes, pydantic models (their own serialisation), TypedDict,
    NamedTuple (an array), Enum (its value), dates and times, UUID, Decimal, Fraction and Path (a string), sets,
    deques, ranges, generators, and what has `tolist`, as numpy's arrays and scalars; nested in any way.

    Raises:
        NotText: JSON cannot carry it: another object, bytes that are not UTF-8, a number that is not finite, a
            nesting of more than 32 levels, more than 250,000 values.

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
    except ValueError:  # Python's own limit of digits
        raise NotText("the value holds an integer of more than 4300 digits") from None


def to_json(value: Any) -> Any:
    """Return a user's value as None, bool, int, float, str, list and dict alone.

    Raises:
        NotText: As `to_text`.
    """
    try:
        return _Conversion().of(value, 1)
    except NotText:
        raise
    except UnicodeDecodeError:
        raise NotText(_NOT_UTF8) from None
    except (TypeError, ValueError, RecursionError) as error:  # out of a serialiser of the value's own
        raise NotText(f"a value of type {type(value).__name__} cannot become JSON ({type(error).__name__})") from None


class _Conversion:
    """The conversion of one value, and how many values it has met."""

    def __init__(self) -> None:
        self._count = 0

    def of(self, value: Any, depth: int) -> Any:
        self._count += 1
        if self._count > MAX_VALUES:
            raise NotText(f"the value holds more than {MAX_VALUES} values")
        if depth > MAX_JSON_DEPTH:
            raise NotText(f"the value is nested more than {MAX_JSON_DEPTH} levels deep")
        if type(value) in _AS_THEY_ARE:
            return value
        if not isinstance(value, Enum):
            scalar = _scalar(value)
            if scalar is not None:
                return scalar
            if isinstance(value, Mapping):
                return self._object(value.items(), depth)
            items = _items(value)
            if items is not None:
                made = [self.of(each, depth + 1) for each in items]
                return _in_order(made) if isinstance(value, AbstractSet) else made
        return self.of(_unwrapped(value), depth + 1)

    def _object(self, items: Iterable[tuple[Any, Any]], depth: int) -> dict[str, Any]:
        made: dict[str, Any] = {}
        for key, value in items:
            name = self.of(key, depth + 1)
            if isinstance(name, (list, dict)):
                raise NotText(f"the value has a {type(key).__name__} as a key, which JSON cannot carry")
            name = name if isinstance(name, str) else encode(name).decode()
            if name in made:
                raise NotText("the value has two keys that JSON writes the same way")
            made[name] = self.of(value, depth + 1)
        return made


def _scalar(value: Any) -> Any:
    """`value` as a str or number, or None if it is neither."""
    made: Any = None
    if isinstance(value, str):
        made = str.encode(value, errors="replace").decode()  # plain, whatever a subclass makes of it
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise NotText("the value holds a number that is not finite, which JSON cannot carry")
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
    """What a collection, or an iterator of Python's own, holds; None if `value` is neither.

    Another iterator may be a file or a socket: reading it is the business of the code that opened it.
    """
    if isinstance(value, (Sequence, AbstractSet)) or type(value).__name__ in ("deque", "dict_values"):
        return value  # type: ignore[no-any-return]
    if isinstance(value, GeneratorType):
        return value
    if isinstance(value, Iterator) and type(value).__module__ in ("builtins", "itertools"):
        return value
    return None


def _unwrapped(value: Any) -> Any:
    """`value`, an object, as what it is made of.

    Raises:
        NotText: That cannot be known.
    """
    kind = type(value)
    serializer = getattr(kind, "__pydantic_serializer__", None)
    if isinstance(value, type):
        raise NotText(f"the class {value.__name__} is neither text nor JSON")
    if isinstance(value, Enum):
        made = value.value
    elif serializer is not None:
        made = serializer.to_python(value, mode="json", warnings=False)
    elif isinstance(value, msgspec.Struct):  # its own rules for names and tags
        made = msgspec.to_builtins(value, str_keys=True, builtin_types=_BYTES, enc_hook=to_json)
    elif is_dataclass(value):
        made = {field.name: getattr(value, field.name) for field in fields(value)}
    elif hasattr(kind, "__attrs_attrs__"):
        made = {field.name: getattr(value, field.name) for field in kind.__attrs_attrs__}
    elif callable(getattr(value, "tolist", None)):
        made = value.tolist()
    elif hasattr(kind, "__fields__") and callable(getattr(value, "json", None)):  # a model of pydantic 1
        made = msgspec.json.decode(value.json())
    else:
        raise NotText(f"a value of type {kind.__name__} is neither text nor JSON")
    return made


def _in_order(items: list[Any]) -> list[Any]:
    """Items of a set in an order that is the same in every process."""
    try:
        return sorted(items)
    except TypeError:  # numbers beside texts, or objects
        return sorted(items, key=encode)
