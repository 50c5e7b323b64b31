"""Whether an answer is what the ad accepts: pure rules, none of which can hang or reach out."""

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import jsonschema_rs
import msgspec
import regex

from loom.schemas.task import Accept
from loom.schemas.wire import encode

PATTERN_S = 0.25
"""Longest search for a pattern; one that takes longer is not met."""
REFUSALS = regex.compile(
    r"\A\W*(?:i(?:'|\u2019)?m (?:very )?sorry|i am (?:very )?sorry|sorry|i apologi[sz]e|unfortunately)?\W*"
    r"(?:but )?(?:as an ai(?: language)? model,? )?"
    r"i (?:cannot|can(?:'|\u2019)t|can not|am unable to|am not able to|won(?:'|\u2019)t) "
    r"(?:help|assist|comply|do (?:that|this)|provide|fulfil?l|answer|complete|process|create|generate)\b",
    regex.IGNORECASE,
)
"""How models say that they will not. Only the beginning counts: an answer may well quote a refusal."""
REFUSAL_CHARS = 300
"""A longer answer says more than no."""


def complaint(content: str, accept: Accept | None) -> str | None:
    """Return what is wrong with an answer in one sentence; None when nothing is."""
    if not content.strip():
        return "the result is empty"
    if len(content) <= REFUSAL_CHARS and REFUSALS.search(content.strip()):
        return "the agent refuses the task"
    return _short_of(content, accept) if accept is not None else None


def unusable(accept: Accept) -> str | None:
    """Return why a pattern or a schema can never be met; None when it can be used."""
    if accept.pattern is not None:
        try:
            regex.compile(accept.pattern)
        except regex.error as error:
            return f"pattern is no regular expression: {error}"
    if accept.json_schema is not None:
        try:
            _validator(encode(accept.json_schema))
        except (jsonschema_rs.ValidationError, jsonschema_rs.ReferencingError, ValueError) as error:
            return f"json_schema is no JSON Schema: {_first_line(error)}"
    return None


def _short_of(content: str, accept: Accept) -> str | None:
    missing = next((text for text in accept.contains if text not in content), None)
    if missing is not None:
        return f"the result does not contain {missing!r}"
    if accept.pattern is not None and not _matches(accept.pattern, content):
        return f"the result does not match the pattern {accept.pattern!r}"
    if accept.json_schema is not None:
        return _not_of(accept.json_schema, content)
    return None


def _matches(pattern: str, content: str) -> bool:
    try:
        return regex.search(pattern, content, timeout=PATTERN_S) is not None
    except (TimeoutError, regex.error):
        return False


def _not_of(schema: Mapping[str, Any], content: str) -> str | None:
    try:
        value = msgspec.json.decode(content)
    except (ValueError, RecursionError):
        return "the result is not JSON"
    try:
        _validator(encode(schema)).validate(value)
    except (jsonschema_rs.ValidationError, jsonschema_rs.ReferencingError, ValueError) as error:
        return f"the result does not fit the JSON Schema: {_first_line(error)}"
    return None


@lru_cache(maxsize=256)
def _validator(schema: bytes) -> jsonschema_rs.Validator:
    return jsonschema_rs.validator_for(msgspec.json.decode(schema), retriever=_nothing)


def _nothing(uri: str) -> Any:
    """A schema must hold all it refers to: a submitter must not aim this process at any address."""
    raise ValueError(f"{uri} is outside of the schema")


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0][:300]
