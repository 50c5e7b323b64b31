"""Extracts JSON from a fence or from prose. Pure."""

import json
import re
from collections.abc import Iterator
from typing import Any

MAX_CANDIDATES = 64
"""Maximum number of positions at which a JSON value may start."""


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


_FENCED = re.compile(r"```[ \t]*+[A-Za-z0-9_-]*+[ \t]*+\r?\n(.*?)```", re.DOTALL)
# Possessive quantifiers: a fence before 10,000 spaces would otherwise take seconds.
_OPENINGS = {"object": "{", "array": "["}
_decoder = json.JSONDecoder(parse_constant=_refuse_constant)


def json_text(text: str, schema: dict[str, Any]) -> str:
    """Return the JSON value in `text` without the fence or prose around it.

    In prose, only an object or an array of the schema's type counts. If there is none or more than one value, `text` is
    returned unchanged.

    Args:
        text: The answer of a model.
        schema: JSON Schema of the value.
    """
    whole = text.strip()
    if _is_json(whole):
        return whole
    fenced = [body.strip() for body in _FENCED.findall(text)]
    values = [body for body in fenced if _is_json(body)] or list(_values_in(text, schema))
    return values[0] if len(values) == 1 else text


def _values_in(text: str, schema: dict[str, Any]) -> Iterator[str]:
    """Yield the JSON objects or arrays in `text` in their order."""
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
