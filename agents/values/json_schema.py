"""JSON Schemas of types, in the subset that the servers of models have in common."""

import re
from collections.abc import Iterator
from typing import Any

import msgspec

from loom.agents.values.annotations import described_fields, for_msgspec
from loom.agents.values.foreign import schema_hook

_NO_DEFAULT = re.compile(r"Encoding objects of type (\S+) is unsupported")
_REFERENCE = "#/$defs/"
_KEPT_FORMATS = frozenset({"date-time"})
"""String formats that are kept; the server of Gemini refuses others."""
_NAMES = {str: "string", int: "integer", float: "number", bool: "boolean"}
_MAPS = ("properties", "$defs", "definitions", "patternProperties", "dependentSchemas")
_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems")
_SCHEMAS = ("items", "additionalProperties", "not", "propertyNames", "contains")


def json_schema(kind: Any) -> dict[str, Any]:
    """Return the JSON Schema of a type, in a form that OpenAI, llama.cpp and Gemini accept.

    An array always has an object as `items`; a tuple is an array of fixed length with items of any of its types. The
    schema of the type is at the top level, those of its parts are under `$defs`. Descriptions come from
    `Annotated[…, "text"]`, `msgspec.Meta(description=…)`, pydantic's `Field(description=…)`, `Doc` and docstrings.

    Args:
        kind: A JSON type, msgspec Struct, dataclass, attrs class, TypedDict, NamedTuple, Enum or pydantic model; a
            date, time, UUID, Decimal, Fraction or Path; or a collection or union of them.

    Raises:
        TypeError: JSON cannot represent the type, or cannot distinguish the members of a union.

    Example:
        >>> json_schema(tuple[int, str])
        {'type': 'array', 'items': {'anyOf': [{'type': 'integer'}, {'type': 'string'}]}, 'minItems': 2, 'maxItems': 2}
    """
    try:
        return portable(_described(kind))
    except Exception as error:
        # Annotations may contain undefined names, and pydantic raises its own errors.
        raise TypeError(_reason(error)) from error


def _reason(error: Exception) -> str:
    text = str(error).partition("\n")[0]
    default = _NO_DEFAULT.fullmatch(text)
    if default is None:
        return text
    return f"JSON cannot represent a field's default value of type {default[1]}: give it as default_factory"


def _described(kind: Any) -> dict[str, Any]:
    """Return the schema of msgspec and pydantic, with the descriptions of fields added."""
    shape = for_msgspec(kind)
    (top,), parts = msgspec.json.schema_components([shape], schema_hook=schema_hook, ref_template=_REFERENCE + "{name}")
    for owner, field, description in described_fields(kind):
        known = parts.get(owner, {}).get("properties", {}).get(field)
        if known is not None:
            known.setdefault("description", description)
    for schema in (top, *list(parts.values())):
        _hoist(schema, parts)
    return {**top, "$defs": parts} if parts else top


def _hoist(node: Any, parts: dict[str, Any]) -> None:
    """Move the definitions inside a schema to `parts`; a definition whose name is taken gets a new one."""
    if isinstance(node, dict) and "$defs" in node:
        inner: dict[str, Any] = node.pop("$defs")
        names = {name: _free_name(name, item, parts) for name, item in inner.items()}
        for part in _parts([node, list(inner.values())]):
            if _named(part) in names:
                part["$ref"] = _REFERENCE + names[_named(part)]
        parts.update({names[name]: item for name, item in inner.items()})
    for child in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        _hoist(child, parts)


def _free_name(name: str, schema: dict[str, Any], parts: dict[str, Any]) -> str:
    for candidate in (name, *(f"{name}_{n}" for n in range(2, len(parts) + 3))):
        if parts.get(candidate, schema) == schema:
            return candidate
    return name


def portable(schema: dict[str, Any]) -> dict[str, Any]:
    """Return a JSON Schema in the subset of `json_schema`: tuples, formats and booleans are rewritten.

    A reference at the top level is replaced by its definition.
    """
    top = _rewritten(schema)
    definitions = top.pop("$defs", {})
    name = _named(top)
    if name in definitions:
        top = {**definitions[name], **{key: value for key, value in top.items() if key != "$ref"}}
        if not any(_named(item) == name for item in _parts([top, definitions])):
            del definitions[name]
        top.pop("title", None)
    return {**top, "$defs": definitions} if definitions else top


def _named(schema: dict[str, Any]) -> str:
    reference = schema.get("$ref")
    return reference.removeprefix(_REFERENCE) if isinstance(reference, str) else ""


def _parts(value: Any) -> Iterator[dict[str, Any]]:
    if isinstance(value, dict):
        yield value
    for child in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _parts(child)


def _rewritten(schema: Any) -> dict[str, Any]:
    """Return a schema in the common subset."""
    if not isinstance(schema, dict):  # `true` accepts every value, `false` none
        return {} if schema is not False else {"not": {}}
    rewritten = {key: value for key, value in schema.items() if key not in ("$schema", "default")}
    for key in _MAPS:
        if isinstance(rewritten.get(key), dict):
            rewritten[key] = {name: _rewritten(item) for name, item in rewritten[key].items()}
    for key in _LISTS:
        if isinstance(rewritten.get(key), list):
            rewritten[key] = [_rewritten(item) for item in rewritten[key]]
    for key in _SCHEMAS:
        if key in rewritten and not isinstance(rewritten[key], (bool, list)):
            rewritten[key] = _rewritten(rewritten[key])
    if "default" in schema:
        rewritten["default"] = msgspec.to_builtins(schema["default"], str_keys=True)
    return _with_type(_with_plain_format(_with_items(rewritten)))


def _with_items(schema: dict[str, Any]) -> dict[str, Any]:
    """Return an array with one object as `items`; an item of a tuple may have any of the types of its items."""
    places = schema.pop("prefixItems", None)
    if isinstance(schema.get("items"), list):  # a tuple in older drafts
        places = [_rewritten(item) for item in schema.pop("items")]
    kind = schema.get("type")
    if kind != "array" and not (isinstance(kind, list) and "array" in kind):
        return schema
    rest = schema.pop("items", None)
    if places is None:
        return {**schema, "items": rest if isinstance(rest, dict) else {}}
    if isinstance(rest, dict):
        places.append(rest)
    else:
        schema.setdefault("minItems", len(places))
        schema.setdefault("maxItems", len(places))
    options: list[dict[str, Any]] = []
    for item in places:
        option = {key: value for key, value in item.items() if key not in ("title", "default")}
        if option not in options:
            options.append(option)
    items = options[0] if len(options) == 1 else {"anyOf": options} if options else {}
    titles = [item.get("title") for item in places]
    if places and all(titles):
        schema.setdefault("description", f"in this order: {', '.join(map(str, titles))}")
    return {**schema, "items": items}


def _with_type(schema: dict[str, Any]) -> dict[str, Any]:
    """Add the type of the values to an enum, because some servers refuse an enum without a type."""
    values = schema.get("enum")
    kinds = {type(item) for item in values} if isinstance(values, list) else set()
    if len(kinds) == 1 and "type" not in schema:
        name = _NAMES.get(kinds.pop())
        return {**schema, "type": name} if name else schema
    return schema


def _with_plain_format(schema: dict[str, Any]) -> dict[str, Any]:
    """Move the format or encoding of a string to its description, if servers refuse the keyword."""
    words = [
        schema.pop(key)
        for key in ("format", "contentEncoding")
        if schema.get(key) not in _KEPT_FORMATS and isinstance(schema.get(key), str)
    ]
    if words:
        text = schema.get("description")
        schema["description"] = f"{text} ({', '.join(words)})" if text else ", ".join(words)
    return schema
