"""Reads the wait that a server asks for from headers and bodies. Pure."""

import re
from collections.abc import Iterator, Mapping
from email.utils import parsedate_to_datetime
from math import isfinite
from typing import Any

MAX_DEPTH = 8
EPOCH_FROM = 1e9
"""Larger numbers are times: seconds since the epoch, or milliseconds if they are 1,000 times larger."""
MAX_PARTS = 200
PASSED_ON = "llm_provider-"
"""Prefix of the headers that the proxy of litellm forwards."""
WAIT_FIELDS = frozenset({"retrydelay", "retry_after", "retry_after_s", "retry_after_seconds", "x-ratelimit-reset"})
"""Lower-case names of body fields with a wait; the last is that of a server behind a gateway."""

_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_SPAN = re.compile(r"(\d{1,12}(?:\.\d{1,12})?)(ms|[smhd])")
_WORDS = re.compile(
    r"(?:try again|retry|wait)(?: again)?(?: after| in| for)? (?:at least )?(\d{1,9}(?:\.\d{1,9})?) ?"
    r"(ms|milliseconds?|minutes?|hours?|s|seconds?|m|h)\b",
    re.IGNORECASE,
)
_WORDS_SPAN = re.compile(r"(?:try again|retry) in ((?:\d{1,9}(?:\.\d{1,9})?(?:ms|[smhd]))+)", re.IGNORECASE)


def retry_after_s(headers: Mapping[str, str], now: float) -> float | None:
    """Return the seconds in `retry-after-ms` or `Retry-After` (seconds, duration or date), or None.

    The header may also have the prefix of a gateway.

    Args:
        headers: Headers with lower-case names. A date is compared with the `Date` of the server.
        now: Seconds since the epoch, used if there is no `Date`.
    """
    for name, unit_s in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
        seconds = _number(headers.get(name, headers.get(PASSED_ON + name, "")))
        if seconds is not None:
            return seconds * unit_s
    text = headers.get("retry-after", headers.get(f"{PASSED_ON}retry-after", ""))
    until = _date(text)
    if until is None:
        return duration_s(text)
    sent = _date(headers.get("date", ""))
    return max(0.0, until - (now if sent is None else sent))


def wait_s(headers: Mapping[str, str], body: Any, now: float) -> float | None:
    """Return the seconds that a server asks to wait in its headers or in the body of its error, or None.

    The order is `Retry-After`, fields of the body, sentences of the body, and `x-ratelimit-reset…` of exhausted limits.
    """
    for seconds in (retry_after_s(headers, now), _in_body(body, now), _reset_s(headers, now)):
        if seconds is not None:
            return seconds
    return None


def duration_s(text: str) -> float | None:
    """Return the seconds of a duration such as `20s`, `1m30.5s` or `120ms`, or None."""
    text = text.strip().lower()
    parts = _SPAN.findall(text)
    if not parts or "".join(number + unit for number, unit in parts) != text:
        return None
    return sum(float(number) * _UNITS[unit] for number, unit in parts)


def _in_body(body: Any, now: float) -> float | None:
    texts = []
    for name, value in _fields(body, MAX_DEPTH):
        if name in WAIT_FIELDS:
            seconds = _seconds(value, now)
            if seconds is not None:
                return seconds
        elif name in ("message", "error", "detail", "raw", "") and isinstance(value, str):
            texts.append(value[:2000])
    for text in texts:
        seconds = _in_sentence(text)
        if seconds is not None:
            return seconds
    return None


def _fields(value: Any, depth: int) -> Iterator[tuple[str, Any]]:
    """Yield lower-case names and values in a body, outer ones first; a plain text has an empty name."""
    level, seen = [("", value)], 0
    for _ in range(depth):
        below: list[tuple[str, Any]] = []
        for name, item in level:
            seen += 1
            if seen > MAX_PARTS:
                return
            yield name, item
            if isinstance(item, Mapping):
                below.extend((str(key).lower(), part) for key, part in item.items())
            elif isinstance(item, list):
                below.extend(("", part) for part in item)
        level = below


def _in_sentence(text: str) -> float | None:
    """Return the wait in a sentence, or None."""
    span = _WORDS_SPAN.search(text)
    if span:
        return duration_s(span[1])
    words = _WORDS.search(text)
    if not words:
        return None
    unit = words[2].lower()
    unit = "ms" if unit.startswith(("ms", "mil")) else unit[0]
    return float(words[1]) * _UNITS[unit]


def _reset_s(headers: Mapping[str, str], now: float) -> float | None:
    """Return the seconds until the last of the exhausted limits is reset, or None."""
    waits = [
        _seconds(headers.get(f"x-ratelimit-reset{kind}", ""), now)
        for kind in ("", "-requests", "-tokens")
        if _number(headers.get(f"x-ratelimit-remaining{kind}", "0")) == 0
    ]
    return max((wait for wait in waits if wait is not None), default=None)


def _seconds(value: Any, now: float) -> float | None:
    """Return seconds from now for a number, a duration or a time."""
    number = _number(value)
    if number is None:
        return duration_s(value) if isinstance(value, str) else None
    if number >= EPOCH_FROM:
        return max(0.0, (number / 1000 if number >= EPOCH_FROM * 1000 else number) - now)
    return number


def _number(value: Any) -> float | None:
    """Return a finite number from 0, or None."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if isfinite(number) and number >= 0 else None


def _date(text: str) -> float | None:
    try:
        return parsedate_to_datetime(text).timestamp()
    except (ValueError, OverflowError):
        return None
