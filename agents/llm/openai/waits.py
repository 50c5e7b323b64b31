"""How long a server asks to wait, in headers and bodies. Pure."""

import re
from collections.abc import Iterator, Mapping
from email.utils import parsedate_to_datetime
from math import isfinite
from typing import Any

MAX_DEPTH = 8
EPOCH_FROM = 1e9
"""Numbers from here on are moments: seconds since the epoch, or milliseconds from a thousand times as much on."""
MOST_PARTS = 200
PASSED_ON = "llm_provider-"
"""How the name of a header begins that litellm's proxy passes on."""
WAIT_FIELDS = frozenset({"retrydelay", "retry_after", "retry_after_s", "retry_after_seconds", "x-ratelimit-reset"})
"""Fields of a body, in lower case, that hold a wait; the last is of a server behind a gateway."""

_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_SPAN = re.compile(r"(\d{1,12}(?:\.\d{1,12})?)(ms|[smhd])")
_WORDS = re.compile(
    r"(?:try again|retry|wait)(?: again)?(?: after| in| for)? (?:at least )?(\d{1,9}(?:\.\d{1,9})?) ?"
    r"(ms|milliseconds?|minutes?|hours?|s|seconds?|m|h)\b",
    re.IGNORECASE,
)
_WORDS_SPAN = re.compile(r"(?:try again|retry) in ((?:\d{1,9}(?:\.\d{1,9})?(?:ms|[smhd]))+)", re.IGNORECASE)


def retry_after_s(headers: Mapping[str, str], now: float) -> float | None:
    """Return how many seconds a server asks to wait, by `retry-after-ms` or `Retry-After` (seconds, span or date).

    A gateway may pass the model server's header on under a name of its own.

    Args:
        headers: Looked up in lower case. A date counts from the server's own `Date`.
        now: Seconds since the epoch, for an answer without a `Date`.
    """
    for name, unit_s in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
        seconds = _number(headers.get(name, headers.get(PASSED_ON + name, "")))
        if seconds is not None:
            return seconds * unit_s
    text = headers.get("retry-after", headers.get(f"{PASSED_ON}retry-after", ""))
    until = _date(text)
    if until is None:
        return span_s(text)
    sent = _date(headers.get("date", ""))
    return max(0.0, until - (now if sent is None else sent))


def wait_s(headers: Mapping[str, str], body: Any, now: float) -> float | None:
    """Return how many seconds a server asks to wait, by its headers or by the body of its error; None: it does not.

    The order: `Retry-After`, fields of the body, words of the body, `x-ratelimit-reset…` of what is used up.
    """
    for found in (retry_after_s(headers, now), _in_body(body, now), _reset_s(headers, now)):
        if found is not None:
            return found
    return None


def span_s(text: str) -> float | None:
    """Return the seconds of a span such as `20s`, `1m30.5s` or `120ms`; None: it is not one."""
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
        seconds = _in_words(text)
        if seconds is not None:
            return seconds
    return None


def _fields(value: Any, depth: int) -> Iterator[tuple[str, Any]]:
    """Yield names, in lower case, and values in a body, those further out first; a text alone has no name."""
    level, seen = [("", value)], 0
    for _ in range(depth):
        below: list[tuple[str, Any]] = []
        for name, each in level:
            seen += 1
            if seen > MOST_PARTS:
                return
            yield name, each
            if isinstance(each, Mapping):
                below.extend((str(key).lower(), part) for key, part in each.items())
            elif isinstance(each, list):
                below.extend(("", part) for part in each)
        level = below


def _in_words(text: str) -> float | None:
    """Return the wait that a sentence names."""
    span = _WORDS_SPAN.search(text)
    if span:
        return span_s(span[1])
    words = _WORDS.search(text)
    if not words:
        return None
    unit = words[2].lower()
    unit = "ms" if unit.startswith(("ms", "mil")) else unit[0]
    return float(words[1]) * _UNITS[unit]


def _reset_s(headers: Mapping[str, str], now: float) -> float | None:
    """Return when the last of the used up limits is full again."""
    waits = [
        _seconds(headers.get(f"x-ratelimit-reset{kind}", ""), now)
        for kind in ("", "-requests", "-tokens")
        if _number(headers.get(f"x-ratelimit-remaining{kind}", "0")) == 0
    ]
    return max((wait for wait in waits if wait is not None), default=None)


def _seconds(value: Any, now: float) -> float | None:
    """Return seconds from now, of a number, a span or a moment."""
    number = _number(value)
    if number is None:
        return span_s(value) if isinstance(value, str) else None
    if number >= EPOCH_FROM:
        return max(0.0, (number / 1000 if number >= EPOCH_FROM * 1000 else number) - now)
    return number


def _number(value: Any) -> float | None:
    """Return a finite number that is not negative."""
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
