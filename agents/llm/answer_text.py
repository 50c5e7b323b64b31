"""Text that a model writes around its answer: a block of thoughts before it, a fence or prose around JSON."""

import json
import re
from collections.abc import Iterator
from typing import Any

THINK, END_OF_THINK = "<think>", "</think>"
MAX_CANDIDATES = 64
"""Places of a text where a JSON value is looked for."""


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


_FENCED = re.compile(r"```[ \t]*[A-Za-z0-9_-]*[ \t]*\r?\n(.*?)```", re.DOTALL)
_OPENINGS = {"object": "{", "array": "["}
_decoder = json.JSONDecoder(parse_constant=_refuse_constant)


class ThoughtSplitter:
    """Separates `<think>…</think>` at the start of an answer from the answer, over any number of pieces.

    Servers without a parser for a model's reasoning leave such blocks in the text. A tag may be cut anywhere; a block
    that is never closed lasts to the end.
    """

    def __init__(self) -> None:
        self._state = "start"  # start: a block may begin; inside: of a block; answer: no block can begin any more
        self._held = ""  # text that may turn out to be a part of a tag
        self._found = False

    def add(self, text: str) -> tuple[str, str]:
        """Return the thoughts and the answer's text that are certain once `text` has come."""
        if self._state == "answer":
            return "", text
        self._held += text
        thoughts = ""
        while True:
            if self._state == "start":
                rest = self._held.lstrip()
                if THINK.startswith(rest):
                    return thoughts, ""
                if not rest.startswith(THINK):
                    self._state = "answer"
                    answer = rest if self._found else self._held
                    self._held = ""
                    return thoughts, answer
                self._state, self._held, self._found = "inside", rest.removeprefix(THINK), True
            before, tag, rest = self._held.partition(END_OF_THINK)
            if not tag:
                kept = _tail(self._held)
                thoughts, self._held = (
                    thoughts + self._held[: len(self._held) - kept],
                    self._held[-kept:] if kept else "",
                )
                return thoughts, ""
            self._state, self._held, thoughts = "start", rest, thoughts + before

    def end(self) -> tuple[str, str]:
        """Return what was held back, as `add` does, after the last piece."""
        held, self._held = self._held, ""
        if self._state == "inside":
            return held, ""
        return "", held.lstrip() if self._found else held


def without_thoughts(text: str) -> tuple[str, str]:
    """Return the thoughts at the start of a whole answer, and the answer without them."""
    splitter = ThoughtSplitter()
    thoughts, answer = splitter.add(text)
    more, rest = splitter.end()
    return thoughts + more, answer + rest


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


def _tail(text: str) -> int:
    """How many characters at the end of `text` may begin the closing tag."""
    return next((size for size in range(len(END_OF_THINK) - 1, 0, -1) if text.endswith(END_OF_THINK[:size])), 0)
