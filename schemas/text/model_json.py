"""The JSON value in a model's answer, whatever stands around it. Pure."""

import json
import re
from collections.abc import Iterator
from typing import Any, TypeVar

import msgspec

from loom.schemas.base import MAX_MESSAGE_BYTES, Undecodable, encode

T = TypeVar("T")

MAX_IN_VAIN = 256 * 1024
"""Twice the characters read from brackets that turn out to open no JSON, 256 more for each: about 10 ms."""
MAX_VALUES = 1000
"""Values looked at in one answer."""
MAX_ANSWER_CHARS = 2 * MAX_MESSAGE_BYTES
"""As much of an answer is read."""

_BRACKET = re.compile(r"[\[{]")
_BRACKET_OR_TAG = re.compile(r"[\[{]|</?(?:think|thinking|thought|reasoning)>", re.IGNORECASE)


def read_model_json(text: str, shape: type[T]) -> T:
    """Return the first JSON object in a model's answer that is a `shape`.

    It may stand in a code fence, amid prose or after a reasoning block. Numbers may be texts, and a field that is
    `null` counts as absent.

    Raises:
        Undecodable: The answer holds none; the message has the reason of the first object that is not a `shape`.
    """
    reason = ""
    for value in json_values(text):
        if isinstance(value, dict):
            try:
                return as_shape(value, shape)
            except Undecodable as error:
                reason = reason or error.message
    raise Undecodable(reason or "no JSON object in the answer")


def as_shape(value: Any, shape: type[T]) -> T:
    """Return a JSON value of a model as a `shape`; numbers may be texts, and a field that is `null` counts as absent.

    Raises:
        Undecodable: It is not one, or holds what cannot be sent on, such as half a surrogate pair.
    """
    if isinstance(value, dict):
        value = {name: part for name, part in value.items() if part is not None}
    try:
        encode(value)
        return msgspec.convert(value, shape, strict=False)
    except UnicodeEncodeError as error:
        raise Undecodable("it holds text that is not Unicode") from error
    except (ValueError, TypeError, OverflowError, RecursionError) as error:
        raise Undecodable(str(error)) from error


def json_values(text: str) -> Iterator[Any]:
    """Yield the JSON arrays and objects of an answer, outermost only, in order.

    What stands in a reasoning block, such as `<think>…</think>`, is not an answer; nor is what stands before a
    closing tag that was never opened, which some servers send. Of a block that is never closed the last value counts
    if the text ends with it: the model forgot the tag. Too many brackets that open no JSON end the search, and so do
    1000 values.
    """
    values: list[Any] = []
    thought: tuple[int, list[Any]] | None = None
    for value, end in _marks(text[:MAX_ANSWER_CHARS]):
        if value is _OPENING:
            thought = thought or (end, [])
        elif value is _CLOSING:
            values = values if thought is not None else []
            thought = None
        elif thought is None:
            values.append(value)
        else:
            thought = (end, [value])
    if thought is not None and not text[thought[0] :].strip(" \t\r\n`"):
        values += thought[1]
    yield from values


_OPENING, _CLOSING = object(), object()


def _not_finite(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


_decoder = json.JSONDecoder(parse_constant=_not_finite)


def _marks(text: str) -> Iterator[tuple[Any, int]]:
    """Yield what matters in a text with its place: JSON values, and the tags of reasoning outside of them."""
    mark = _BRACKET_OR_TAG if "<" in text else _BRACKET
    at, in_vain, values = 0, 0, 0
    while in_vain < MAX_IN_VAIN and values < MAX_VALUES and (found := mark.search(text, at)):
        start, at = found.span()
        if text[start] == "<":
            yield (_CLOSING if text[start + 1] == "/" else _OPENING), at
            continue
        try:
            value, end = _decoder.raw_decode(text, start)
        except RecursionError:  # trying each bracket inside would take the square of its depth
            return
        except ValueError as error:  # a bracket in prose, or a number of thousands of digits
            in_vain += 2 * (getattr(error, "pos", len(text)) - at) + 256
        else:
            at, values = end, values + 1
            yield value, end
