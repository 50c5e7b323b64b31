"""JSON that a model has put into a fence or into prose. Pure."""

import json
import re
from collections.abc import Iterator
from typing import Any

MAX_CANDIDATES = 64
"""Places of a text where a JSON value is looked for."""


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


_FENCED = re.compile(r"```[ \t]*+[A-Za-z0-9_-]*+[ \t]*+\r?\n(.*?)```", re.DOTALL)
# Possessive: a fence before ten thousand spaces would take seconds otherwise.
_OPENINGS = {"object": "{", "array": "["}
_decoder = json.JSONDecoder(parse_constant=_refuse_constant)


def json_text(text: str, schema: dict[str, Any]) -> str:
    """Return the one JSON value in `text`, as it is written there; `text` itself where there is none, or several.

    A fence and prose around the value are taken off. In prose only a value of the schema's type is looked for, an
    object or an array.

    Args:
        schema: The JSON Schema of what is wanted.
    """
    whole = text.strip()
    if _is_json(whole):
        return whole
    fenced = [body.strip() for body in _FENCED.findall(text)]
    found = [body for body in fenced if _is_json(body)] or list(_values_in(text, schema))
    return found[0] if len(found) == 1 else text


def _values_in(text: str, schema: dict[str, Any]) -> Iterator[str]:
    """The JSON objects or arrays in `text`, from the first on."""
    kind = schema.get("type")
    opening = _OPENINGS.get(kind, "{[") if isinstance(kind, str) else "{["
    places = re.compile(f"[{re.escape(opening)}]")
    at = 0
    for _ in range(MAX_CANDIDATES):
        place = places.search(text, at)
        if place is None:
            return
        try:
            _, at = _decoder.raw_decode(text, place.start())
            yield text[place.start() : at]
        except (ValueError, RecursionError):
            at = place.start() + 1


def _is_json(text: str) -> bool:
    try:
        _decoder.decode(text)
    except (ValueError, RecursionError):
        return False
    return True
