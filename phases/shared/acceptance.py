"""Acceptance criteria that the event loop may check: size bounds, and rules that take linear time. Pure.

Patterns and JSON Schemas are compiled and run by check_pool.py.
"""

import re
from typing import Any, Final

from loom.schemas.base import MAX_JSON_DEPTH, MAX_SCHEMA_BYTES, encode
from loom.schemas.checks.pattern_bounds import OutOfBounds, pattern_steps
from loom.schemas.checks.schema_bounds import check_schema
from loom.schemas.task import Accept

REFUSALS = re.compile(
    r"\A\W*(?:i(?:'|\u2019)?m (?:very )?sorry|i am (?:very )?sorry|sorry|i apologi[sz]e|unfortunately)?\W*"
    r"(?:but )?(?:as an ai(?: language)? model,? )?"
    r"i (?:cannot|can(?:'|\u2019)t|can not|am unable to|am not able to|won(?:'|\u2019)t) "
    r"(?:help|assist|comply|do (?:that|this)|provide|fulfil?l|answer|complete|process|create|generate)\b",
    re.IGNORECASE,
)
"""Common refusals by models. Only the beginning of an answer is matched, because answers may quote a refusal."""
REFUSAL_CHARS: Final = 300
"""Limit of the length of an answer that counts as a refusal."""


def plain_violation(content: str, accept: Accept | None) -> str | None:
    """Return which plain rule an answer breaks, in one sentence, or None; pattern and schema are not checked."""
    if not content.strip():
        return "the result is empty"
    if len(content) <= REFUSAL_CHARS and REFUSALS.search(content.strip()):
        return "the agent refuses the task"
    missing = next((text for text in accept.contains if text not in content), None) if accept else None
    return f"the result does not contain {missing!r}" if missing is not None else None


def has_check(accept: Accept | None) -> bool:
    """Return whether the ad has a pattern or a JSON Schema."""
    return accept is not None and not (accept.pattern is None and accept.json_schema is None)


def encoded_schema(accept: Accept) -> bytes | str:
    """Return the JSON Schema as JSON, `null` without one; or, as text, the size bound that it exceeds."""
    try:
        schema: bytes = encode(accept.json_schema)
    except RecursionError:
        return f"accept.json_schema is nested more than {MAX_JSON_DEPTH} levels deep"
    if len(schema) > MAX_SCHEMA_BYTES:
        return f"accept.json_schema is {len(schema)} bytes of JSON; at most {MAX_SCHEMA_BYTES}"
    return schema


def out_of_bounds(accept: Accept) -> str | None:
    """Return the bound that a pattern or a JSON Schema exceeds, in one sentence; None within all bounds."""
    checks: list[tuple[str, Any, Any]] = [
        ("pattern", accept.pattern, pattern_steps),
        ("json_schema", accept.json_schema, check_schema),
    ]
    for part, value, check in checks:
        if value is not None:
            try:
                check(value)
            except OutOfBounds as fault:
                return f"accept.{part} {fault}"
    return None
