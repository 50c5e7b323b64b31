"""Unknown fields of a newer version: they stay with their part of a message and are encoded again at their place.

The classes that phases pass on refuse unknown fields (`forbid_unknown_fields`), so decoding a message without any costs
nothing. A refused message is decoded again here. Its unknown fields are removed, and the parts that had them become
instances of a subclass with those fields. `replace` copies them; a part that a phase builds has none.
"""

import types
from collections.abc import Mapping
from functools import cache
from typing import Any, NamedTuple, TypeVar

import msgspec
from msgspec import inspect, structs

T = TypeVar("T")
S = TypeVar("S", bound=msgspec.Struct)

REFUSAL = "unknown field"
"""Part of the text of msgspec's error for an unknown field."""
MAX_DEPTH = 32
"""Most levels of nesting of the value of an unknown field."""
_FIELD, _KEY = "unknown_fields", "~unknown_fields"
_MARK = b'"~unknown_fields":'


class Keeping:
    """Whether this process has decoded an unknown field; until then encoding skips the search for them."""

    begun = False


class _Removed(NamedTuple):
    """Unknown fields of one part of a message, and of its own parts, by field, key or index."""

    own: dict[str, Any]
    parts: dict[str | int, "_Removed"]


def decode_keeping(raw: bytes, shape: type[T]) -> T:
    """Return `raw` as a `shape` with its unknown fields.

    Raises:
        ValueError: It is not that shape, or the value of an unknown field is nested too deeply.
        RecursionError: It is nested too deeply as a whole.
    """
    tree = msgspec.json.decode(raw)
    removed = _remove(_type_info(shape), tree)  # type: ignore[arg-type]  # classes are hashable
    value = msgspec.json.decode(msgspec.json.encode(tree), type=shape)
    return value if removed is None else _put_back(value, removed)


def encode_keeping(message: Any, encoded: bytes) -> bytes:
    """Return the JSON of a message with its unknown fields at their places.

    Args:
        encoded: The message as msgspec encodes it, returned as it is where no field was unknown.
    """
    if _MARK not in encoded:
        return encoded
    return msgspec.json.encode(_as_written(message))


def unknown_fields(value: msgspec.Struct) -> Mapping[str, Any]:
    """Return the unknown fields with which a message, or a part of one, was decoded."""
    fields: Mapping[str, Any] = getattr(value, _FIELD, {})
    return fields


def with_unknown_fields(value: S, fields: Mapping[str, Any]) -> S:
    """Return a message, or a part of one, with further unknown fields; names of known fields are omitted."""
    if not fields:
        return value
    kept = {key: field for key, field in fields.items() if key not in value.__struct_encode_fields__}
    if not kept:
        return value
    Keeping.begun = True
    own = {name: getattr(value, name) for name in value.__struct_fields__ if name != _FIELD}
    keeper: type[S] = _keeper(type(value))
    return keeper(**own, **{_FIELD: {**unknown_fields(value), **kept}})


@cache
def _keeper(cls: type[S]) -> type[S]:
    """Return the subclass of `cls` with unknown fields."""
    if _FIELD in cls.__struct_fields__:
        return cls
    body = {
        "__module__": cls.__module__,
        "__annotations__": {_FIELD: dict[str, Any]},
        _FIELD: msgspec.field(name=_KEY, default_factory=dict),
    }
    keeper: type[S] = types.new_class(
        cls.__name__, (cls,), {"frozen": True, "kw_only": True}, lambda ns: ns.update(body)
    )
    return keeper


@cache
def _type_info(shape: Any) -> inspect.Type:
    return inspect.type_info(shape)


def _remove(info: inspect.Type, tree: Any) -> _Removed | None:
    """Remove the unknown fields from decoded JSON, and return them; None without any."""
    own: dict[str, Any] = {}
    parts: dict[str | int, _Removed | None] = {}
    match info:
        case inspect.UnionType():
            return next((removed for each in info.types if (removed := _remove(each, tree)) is not None), None)
        case inspect.StructType() if isinstance(tree, dict) and _is_tagged(info, tree):
            known = {field.encode_name: field for field in info.fields}
            if info.forbid_unknown_fields:
                own = {key: _bounded(tree.pop(key)) for key in [*tree] if key not in known and key != info.tag_field}
            parts = {known[key].name: _remove(known[key].type, value) for key, value in tree.items() if key in known}
        case inspect.DictType() if isinstance(tree, dict):
            parts = {key: _remove(info.value_type, value) for key, value in tree.items()}
        case inspect.VarTupleType() | inspect.ListType() if isinstance(tree, list):
            parts = {index: _remove(info.item_type, value) for index, value in enumerate(tree)}
        case _:
            return None
    found = {key: part for key, part in parts.items() if part is not None}
    return _Removed(own, found) if own or found else None


def _is_tagged(info: inspect.StructType, tree: dict[str, Any]) -> bool:
    """Return whether a JSON object has the tag of a struct, if the struct has one."""
    return info.tag_field is None or tree.get(info.tag_field, info.tag) == info.tag


def _bounded(value: Any, depth: int = 1) -> Any:
    """Return the value of an unknown field.

    Raises:
        ValueError: It is nested too deeply.
    """
    if depth > MAX_DEPTH:
        raise ValueError(f"an unknown field is nested more than {MAX_DEPTH} levels deep")
    if isinstance(value, dict | list):
        for child in value.values() if isinstance(value, dict) else value:
            _bounded(child, depth + 1)
    return value


def _put_back(value: Any, removed: _Removed) -> Any:
    """Return `value` with the unknown fields that were removed from its JSON."""
    if isinstance(value, msgspec.Struct):
        parts = {str(name): _put_back(getattr(value, str(name)), part) for name, part in removed.parts.items()}
        return with_unknown_fields(structs.replace(value, **parts) if parts else value, removed.own)
    if isinstance(value, dict):
        return value | {key: _put_back(value[key], part) for key, part in removed.parts.items()}
    return type(value)(
        _put_back(item, removed.parts[index]) if index in removed.parts else item for index, item in enumerate(value)
    )


def _as_written(value: Any) -> Any:
    """Return the replacement of `value` for encoding: dictionaries with known and unknown fields."""
    if isinstance(value, msgspec.Struct) and not value.__struct_config__.array_like:
        config, tree = value.__struct_config__, {}
        if config.tag_field is not None:
            tree[config.tag_field] = config.tag
        for field in structs.fields(value):
            item = getattr(value, field.name)
            if field.name != _FIELD and not (config.omit_defaults and _is_default(field, item)):
                tree[field.encode_name] = _as_written(item)
        return {**tree, **unknown_fields(value)}
    if isinstance(value, dict):
        return {key: _as_written(item) for key, item in value.items()}
    return [_as_written(item) for item in value] if isinstance(value, list | tuple) else value


def _is_default(field: structs.FieldInfo, value: Any) -> bool:
    if field.default is not msgspec.NODEFAULT:
        return value is field.default  # the rule of msgspec
    return field.default_factory in (dict, list, tuple, set) and not value
