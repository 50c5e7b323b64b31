"""Tolerant decoding of JSON from other programs: null fields count as absent; integers may be strings or floats."""

import re
from functools import cache
from typing import Any

from msgspec import inspect

_DIGITS = re.compile(r"0|[1-9][0-9]{0,15}")


def forgiven(value: Any, shape: Any) -> Any:
    """Return a plain JSON value in a form that decodes as `shape`, if tolerance is enough.

    Null fields that may not be null are removed. A string of digits, or a float without a fraction, becomes an integer
    where one is declared. Free JSON and undeclared fields are not changed.

    Example:
        >>> forgiven({"content": None, "steps": "3"}, RunResult)
        {'steps': 3}
    """
    return _walked(value, _kind(shape))


@cache
def _kind(shape: Any) -> inspect.Type:
    return inspect.type_info(shape)


@cache
def _fields(cls: type) -> dict[str, inspect.Type]:
    """Return the name in JSON -> type of each field of a message."""
    kind = _kind(cls)
    return {field.encode_name: field.type for field in kind.fields} if isinstance(kind, inspect.StructType) else {}


def _walked(value: Any, kind: inspect.Type) -> Any:
    """Return the value with tolerance applied, only as deep as messages are declared."""
    if isinstance(kind, inspect.Metadata):
        kind = kind.type
    if isinstance(kind, inspect.UnionType):
        return _in_union(value, kind)
    if isinstance(value, dict) and isinstance(kind, inspect.StructType):
        fields = _fields(kind.cls)
        return {
            name: _walked(one, fields[name]) if name in fields else one
            for name, one in value.items()
            if one is not None or name not in fields or _may_be_null(fields[name])
        }
    if isinstance(value, dict) and isinstance(kind, inspect.DictType):
        return {name: _walked(one, kind.value_type) for name, one in value.items()}
    if isinstance(value, list) and isinstance(kind, inspect.CollectionType):
        return [_walked(one, kind.item_type) for one in value]
    if isinstance(kind, inspect.IntType) and kind.ge == 0:
        return _count(value)
    return value


def _may_be_null(kind: inspect.Type) -> bool:
    """Return whether null is a valid value of the field."""
    return isinstance(kind, inspect.AnyType) or (isinstance(kind, inspect.UnionType) and kind.includes_none)


def _count(value: Any) -> Any:
    """Return the integer that a string or float represents; other values unchanged."""
    if isinstance(value, str):
        return int(value) if _DIGITS.fullmatch(value) else value
    return int(value) if isinstance(value, float) and value.is_integer() and abs(value) < 2.0**53 else value


def _in_union(value: Any, union: inspect.UnionType) -> Any:
    """Return the value by the only possible type of a union; unchanged if there are several."""
    kinds = [kind.type if isinstance(kind, inspect.Metadata) else kind for kind in union.types]
    if isinstance(value, dict):
        structs = [kind for kind in kinds if isinstance(kind, inspect.StructType)]
        if len(structs) > 1:
            structs = [kind for kind in structs if kind.tag_field and value.get(kind.tag_field) == kind.tag]
        fits: list[inspect.Type] = [*structs, *(kind for kind in kinds if isinstance(kind, inspect.DictType))]
    elif isinstance(value, list):
        fits = [kind for kind in kinds if isinstance(kind, inspect.CollectionType)]
    else:
        fits = [kind for kind in kinds if not isinstance(kind, inspect.NoneType)]
    return _walked(value, fits[0]) if len(fits) == 1 else value
