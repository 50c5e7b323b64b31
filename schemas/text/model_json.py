"""The JSON values in a model's answer, with any text around them. Pure."""

import json
import re
from collections.abc import Iterator
from typing import Any, TypeVar

import msgspec

from loom.schemas.base import MAX_MESSAGE_BYTES, Undecodable, encode

T = TypeVar("T")

MAX_IN_VAIN = 256 * 1024
"""Limit of work on brackets that do not open JSON: twice the characters, 256 more for each; about 10 ms."""
MAX_VALUES = 1000
"""Most values of one answer."""
MAX_ANSWER_CHARS = 2 * MAX_MESSAGE_BYTES
"""Characters of an answer that are searched."""

_BRACKET = re.compile(r"[\[{]")
_BRACKET_OR_TAG = re.compile(r"[\[{]|</?(?:think|thinking|thought|reasoning)>", re.IGNORECASE)


def read_model_json(text: str, shape: type[T]) -> T:
    """Return the first JSON object in a model's answer that is a `shape`.

    A code fence, prose or a reasoning block may surround it. Numbers may be strings, and `null` fields count as absent.

    Raises:
        Undecodable: The answer has none; the message has the reason for the first object that is not a `shape`.
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
    """Return a JSON value of a model as a `shape`; numbers may be strings, and `null` fields count as absent.

    Raises:
        Undecodable: It does not fit, or it cannot be encoded again, for example half a surrogate pair.
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

    Text in a reasoning block, such as `<think>…</think>`, is skipped. So is text before a closing tag without an
    opening one, which some servers send. If a block is never closed and the text ends with a value, that value counts:
    the model omitted the tag. The search ends after 1000 values, or after too many brackets that do not open JSON.
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
    """Yield JSON values and the reasoning tags outside of them, each with its end in the text."""
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
