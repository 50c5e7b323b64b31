"""JSON Schemas of types, in the dialect that models' servers have in common."""

import re
from collections.abc import Iterator
from typing import Any

import msgspec

from loom.agents.values.annotations import described_fields, for_msgspec
from loom.agents.values.foreign import schema_hook

_NO_DEFAULT = re.compile(r"Encoding objects of type (\S+) is unsupported")
_REFERENCE = "#/$defs/"
_UNDERSTOOD_FORMATS = frozenset({"date-time"})
"""Gemini's server refuses a string with another format."""
_NAMES = {str: "string", int: "integer", float: "number", bool: "boolean"}
_MAPS = ("properties", "$defs", "definitions", "patternProperties", "dependentSchemas")
_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems")
_SCHEMAS = ("items", "additionalProperties", "not", "propertyNames", "contains")


def json_schema(kind: Any) -> dict[str, Any]:
    """Return the JSON Schema of `kind`, as OpenAI, llama.cpp and Gemini accept it.

    An array always has an object as `items`; a tuple is an array of as many items, of any of its types. The type
    itself is on top, those it is made of are under `$defs`. Descriptions come from `Annotated[…, "text"]`,
    `msgspec.Meta(description=…)`, pydantic's `Field(description=…)`, `Doc` and the docstrings of classes.

    Args:
        kind: A type of JSON's own, msgspec Struct, dataclass, attrs class, TypedDict, NamedTuple, Enum, pydantic
            model, date or time, UUID, Decimal, Fraction, Path, or a collection or union of them.

    Raises:
        TypeError: JSON cannot carry it, or not tell one member of a union from another.

    Example:
        >>> json_schema(tuple[int, str])
        {'type': 'array', 'items': {'anyOf': [{'type': 'integer'}, {'type': 'string'}]}, 'minItems': 2, 'maxItems': 2}
    """
    try:
        return portable(_described(kind))
    except Exception as error:
        # A class may hold names that do not exist, and pydantic has errors of its own.
        raise TypeError(_reason(error)) from error


def _reason(error: Exception) -> str:
    text = str(error).partition("\n")[0]
    default = _NO_DEFAULT.fullmatch(text)
    if default is None:
        return text
    return f"JSON cannot carry a field's default value of type {default[1]}: give it as default_factory"


def _described(kind: Any) -> dict[str, Any]:
    """The schema as msgspec and pydantic write it, with the descriptions of fields."""
    shape = for_msgspec(kind)
    (top,), parts = msgspec.json.schema_components([shape], schema_hook=schema_hook, ref_template=_REFERENCE + "{name}")
    for owner, field, description in described_fields(kind):
        known = parts.get(owner, {}).get("properties", {}).get(field)
        if known is not None:
            known.setdefault("description", description)
    for each in (top, *list(parts.values())):
        _hoist(each, parts)
    return {**top, "$defs": parts} if parts else top


def _hoist(node: Any, parts: dict[str, Any]) -> None:
    """Move the definitions inside a schema to `parts`, those of a name that another one has under a new name."""
    if isinstance(node, dict) and "$defs" in node:
        inner: dict[str, Any] = node.pop("$defs")
        names = {name: _free_name(name, each, parts) for name, each in inner.items()}
        for part in _parts([node, list(inner.values())]):
            if _named(part) in names:
                part["$ref"] = _REFERENCE + names[_named(part)]
        parts.update({names[name]: each for name, each in inner.items()})
    for child in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        _hoist(child, parts)


def _free_name(name: str, schema: dict[str, Any], parts: dict[str, Any]) -> str:
    for candidate in (name, *(f"{name}_{n}" for n in range(2, len(parts) + 3))):
        if parts.get(candidate, schema) == schema:
            return candidate
    return name


def portable(schema: dict[str, Any]) -> dict[str, Any]:
    """Return a JSON Schema in the dialect of `json_schema`: tuples, formats and booleans are reworded.

    A reference on top is replaced by what it names.
    """
    top = _rewritten(schema)
    definitions = top.pop("$defs", {})
    name = _named(top)
    if name in definitions:
        top = {**definitions[name], **{key: value for key, value in top.items() if key != "$ref"}}
        if not any(_named(each) == name for each in _parts([top, definitions])):
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
    """`schema` in the common dialect."""
    if not isinstance(schema, dict):  # true: anything; false: nothing
        return {} if schema is not False else {"not": {}}
    made = {key: value for key, value in schema.items() if key not in ("$schema", "default")}
    for key in _MAPS:
        if isinstance(made.get(key), dict):
            made[key] = {name: _rewritten(each) for name, each in made[key].items()}
    for key in _LISTS:
        if isinstance(made.get(key), list):
            made[key] = [_rewritten(each) for each in made[key]]
    for key in _SCHEMAS:
        if key in made and not isinstance(made[key], (bool, list)):
            made[key] = _rewritten(made[key])
    if "default" in schema:
        made["default"] = msgspec.to_builtins(schema["default"], str_keys=True)
    return _with_type(_with_plain_format(_with_items(made)))


def _with_items(schema: dict[str, Any]) -> dict[str, Any]:
    """An array with one object as `items`; of a tuple's items each may have any of its types."""
    places = schema.pop("prefixItems", None)
    if isinstance(schema.get("items"), list):  # how older drafts write a tuple
        places = [_rewritten(each) for each in schema.pop("items")]
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
    for each in places:
        option = {key: value for key, value in each.items() if key not in ("title", "default")}
        if option not in options:
            options.append(option)
    items = options[0] if len(options) == 1 else {"anyOf": options} if options else {}
    titles = [each.get("title") for each in places]
    if places and all(titles):
        schema.setdefault("description", f"in this order: {', '.join(map(str, titles))}")
    return {**schema, "items": items}


def _with_type(schema: dict[str, Any]) -> dict[str, Any]:
    """An enum with the type of its values, without which some servers refuse it."""
    values = schema.get("enum")
    kinds = {type(each) for each in values} if isinstance(values, list) else set()
    if len(kinds) == 1 and "type" not in schema:
        name = _NAMES.get(kinds.pop())
        return {**schema, "type": name} if name else schema
    return schema


def _with_plain_format(schema: dict[str, Any]) -> dict[str, Any]:
    """A string's format or encoding as words, where servers refuse the keyword."""
    words = [
        schema.pop(key)
        for key in ("format", "contentEncoding")
        if schema.get(key) not in _UNDERSTOOD_FORMATS and isinstance(schema.get(key), str)
    ]
    if words:
        text = schema.get("description")
        schema["description"] = f"{text} ({', '.join(words)})" if text else ", ".join(words)
    return schema
