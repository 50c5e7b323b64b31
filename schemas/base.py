"""Base classes, field types, encoding and decoding of all messages."""

import codecs
import math
import sys
import types
from collections.abc import Callable
from contextlib import suppress
from functools import cache, partial
from os import urandom
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin, get_type_hints

import msgspec

from loom.schemas.decoding.forgiving import forgiven
from loom.schemas.decoding.unknown_fields import REFUSAL, Keeping, decode_keeping, encode_keeping
from loom.schemas.errors import LoomError

MAX_AD_BYTES = 64 * 1024
MAX_CONTEXT_BYTES = 32 * 1024
MAX_SCHEMA_BYTES = 16 * 1024
MAX_CONTENT_BYTES = 64 * 1024
MAX_INPUTS_BYTES = 64 * 1024
MAX_MESSAGE_BYTES = 512 * 1024
MAX_JSON_DEPTH = 32

MAX_INT = 2**53 - 1
"""Greatest integer of a message: all JSON libraries read integers up to here exactly."""
MAX_SECONDS = 1e9
MAX_TIMESTAMP = 1e11
MAX_NODES = 4096
"""Most nodes, tasks or outputs that one message may have."""

T = TypeVar("T")

Unit = Annotated[float, msgspec.Meta(ge=0, le=1)]
Seconds = Annotated[float, msgspec.Meta(ge=0, le=MAX_SECONDS)]
"""A duration, at most about thirty years."""
Timestamp = Annotated[float, msgspec.Meta(ge=0, le=MAX_TIMESTAMP)]
"""Server time, seconds since the epoch."""
Number = Annotated[float, msgspec.Meta(ge=-1e12, le=1e12)]
"""A float without a narrower range."""
Count = Annotated[int, msgspec.Meta(ge=0, le=MAX_INT)]
Ordinal = Annotated[int, msgspec.Meta(ge=1, le=MAX_INT)]
Text = Annotated[str, msgspec.Meta(max_length=MAX_MESSAGE_BYTES)]
"""Content, at most as long as a message."""
Name = Annotated[str, msgspec.Meta(max_length=200)]
"""An id, a code, or the name of a field or tool."""
Note = Annotated[str, msgspec.Meta(max_length=2048)]
"""Sentences for people."""
Names = Annotated[tuple[Name, ...], msgspec.Meta(max_length=MAX_NODES)]
Outputs = Annotated[dict[Name, Text], msgspec.Meta(max_length=MAX_NODES)]
"""subtask id -> output."""
FreeJson = Annotated[dict[str, Any], msgspec.Meta(max_length=MAX_CONTEXT_BYTES)]
"""A JSON object that a client defines; `free_json_fault` checks its size and depth."""


def cut_note(text: str) -> str:
    """Return the first 2,000 characters of `text`, which fit a `Note`."""
    return text[:2000]


def cut_name(text: str) -> str:
    """Return the first 200 characters of `text`, which fit a `Name`."""
    return text[:200]


def total(*counts: int) -> int:
    """Return the sum of counts, at most the greatest integer of a message."""
    return min(sum(counts), MAX_INT)


def total_s(*seconds: float) -> float:
    """Return the sum of durations, at most the longest one of a message."""
    return min(sum(seconds), MAX_SECONDS)


def new_id() -> str:
    """Return a fresh random id, 32 hex digits."""
    return urandom(16).hex()


class Message(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, gc=False):
    """Base class of every message: frozen, keyword-only, unknown fields ignored.

    Ranges are validated when decoding, not when constructing, because a task builds dozens of these. `gc=False` is
    safe: messages cannot contain reference cycles.
    """


class CheckedMessage(Message, frozen=True, kw_only=True):
    """Base class of messages whose floats are also validated at construction.

    A float that is not finite or out of its declared range raises ValueError. JSON would turn it into null, and the
    reader could not find the cause.
    """

    def __post_init__(self) -> None:
        in_range = _range_checks.get(type(self))
        if in_range is None:
            in_range = _range_checks[type(self)] = _range_check(_float_fields(type(self)))
        try:
            if in_range(self):
                return
        except TypeError:
            pass  # not a number
        raise next(self._out_of_range(*field) for field in _float_fields(type(self)) if not _fits(self, *field))

    def _out_of_range(self, name: str, ge: float, le: float) -> ValueError:
        """Return the error for a field that is not a number from `ge` to `le`."""
        value = getattr(self, name)
        given = value if isinstance(value, int | float) else f"a {type(value).__name__}"
        return ValueError(f"{type(self).__name__}.{name} must be a number from {ge} to {le}, not {given}")


_RangeCheck = Callable[[Any], bool]
_range_checks: dict[type, _RangeCheck] = {}
"""Class -> its check. A plain dict, because `functools.cache` is measurably slower on this hot path."""


def _range_check(fields: tuple[tuple[str, float, float], ...]) -> _RangeCheck:
    """Return a function that returns whether the floats of a message are in range; TypeError if one is not a number.

    It is compiled for each class, as `dataclasses` does with `__init__`, because a task builds dozens of messages.
    """
    tests = (f"((v := self.{name}) is None or {ge!r} <= v <= {le!r})" for name, ge, le in fields)
    check: _RangeCheck = eval(f"lambda self: {' and '.join(tests) or 'True'}")  # noqa: S307 - names of declared fields
    return check


def _fits(message: Any, name: str, ge: float, le: float) -> bool:
    value = getattr(message, name)
    try:
        return value is None or ge <= value <= le
    except TypeError:
        return False


@cache
def _float_fields(cls: type) -> tuple[tuple[str, float, float], ...]:
    """Return name, least and greatest value of each field of `cls` that is a float or an optional float."""
    found = []
    for name, hint in get_type_hints(cls, include_extras=True).items():
        for part in _alternatives(hint):
            metas = [meta for meta in get_args(part)[1:] if isinstance(meta, msgspec.Meta)]
            if (get_args(part)[0] if metas else part) is float:
                ge = next((meta.ge for meta in metas if meta.ge is not None), -sys.float_info.max)
                ge = next((math.nextafter(meta.gt, math.inf) for meta in metas if meta.gt is not None), ge)
                le = next((meta.le for meta in metas if meta.le is not None), sys.float_info.max)
                found.append((name, float(ge), float(le)))
    return tuple(found)


def _alternatives(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


_encoder = msgspec.json.Encoder()


def encode(message: Any) -> bytes:
    """Return `message` as JSON bytes, including the unknown fields that were decoded with it."""
    encoded = _encoder.encode(message)
    return encode_keeping(message, encoded) if Keeping.begun else encoded


@cache
def _decoder(shape: Any) -> msgspec.json.Decoder[Any]:
    return msgspec.json.Decoder(shape)


class Undecodable(LoomError):
    """Bytes do not decode as the expected message."""

    code = "dead_letter"


def decode(
    raw: bytes,
    shape: type[T],
    *,
    limit: int = MAX_MESSAGE_BYTES,
    mend: Callable[[Any], Any] | None = None,
    keep_unknown: bool = True,
) -> T:
    """Return `raw` as a `shape`; parts that phases pass on keep their unknown fields.

    A leading byte order mark is skipped. If the bytes do not fit as they are, null fields count as absent and strings
    of digits as counts.

    Args:
        raw: JSON in UTF-8.
        shape: The type of the result.
        limit: Most bytes of `raw`.
        mend: Called with the plain JSON value if it does not fit; returns the value to decode instead.
        keep_unknown: False: an unknown field in a part that phases pass on is an error.

    Raises:
        Undecodable: Longer than `limit` bytes, not JSON, not UTF-8, nested too deeply, or not that shape. The message
            has the path of the field.
    """
    if len(raw) > limit:
        raise Undecodable(f"{len(raw)} bytes; at most {limit} are read")
    decoder: msgspec.json.Decoder[T] = _decoder(shape)  # type: ignore[arg-type]  # classes are hashable
    try:
        return decoder.decode(raw)
    except (ValueError, RecursionError):
        pass  # tolerant decoding costs nothing for a message that fits
    read: Callable[[bytes], T] = partial(decode_keeping, shape=shape) if keep_unknown else decoder.decode
    try:
        return _forgiving(raw.removeprefix(codecs.BOM_UTF8), decoder, shape, mend, read)
    except RecursionError as error:
        raise Undecodable("nested too deeply") from error
    except ValueError as error:  # covers msgspec's errors and bad UTF-8
        raise Undecodable(str(error)) from error


def _forgiving(
    raw: bytes,
    decoder: msgspec.json.Decoder[T],
    shape: type[T],
    mend: Callable[[Any], Any] | None,
    read: Callable[[bytes], T],
) -> T:
    """Decode tolerantly; errors are those of the decoder or of `read`."""
    try:
        return decoder.decode(raw)
    except msgspec.ValidationError as error:
        fault = error
    if REFUSAL in str(fault):
        with suppress(msgspec.ValidationError):  # a field may need tolerance as well
            return read(raw)
    try:
        plain = msgspec.json.decode(raw)
    except (ValueError, RecursionError):
        raise fault from None
    # Encoded again, because raw fields consist of bytes.
    return read(encode(forgiven(plain if mend is None else mend(plain), shape)))


def free_json_fault(value: Any, *, max_bytes: int) -> str | None:
    """Return why `value` is not acceptable as free-form JSON, or None if it is.

    Args:
        value: A Python value.
        max_bytes: Most bytes of its JSON form.
    """
    stack = [(value, 1)]
    while stack:
        item, depth = stack.pop()
        if depth > MAX_JSON_DEPTH:
            return f"is nested more than {MAX_JSON_DEPTH} levels deep"
        if isinstance(item, float) and not math.isfinite(item):
            return "holds a number that is not finite"
        if isinstance(item, dict):
            if not all(isinstance(key, str) for key in item):
                return "has a key that is not a string"
            stack.extend((child, depth + 1) for child in item.values())
        elif isinstance(item, (list, tuple)):
            stack.extend((child, depth + 1) for child in item)
        elif not isinstance(item, (str, int, float, bool, type(None))):
            return f"holds a {type(item).__name__}, which JSON cannot carry"
    try:
        size = len(encode(value))
    except (UnicodeEncodeError, TypeError) as error:  # TypeError: a subclass of a JSON type
        return f"cannot be encoded: {error}"
    return f"is {size} bytes of JSON; at most {max_bytes}" if size > max_bytes else None


def cut_utf8(text: str, max_bytes: int) -> tuple[str, bool]:
    """Return the longest start of `text` whose JSON form takes at most `max_bytes`, and whether it was cut."""
    text, whole = text[:max_bytes], len(text) <= max_bytes  # each character takes at least a byte
    if whole and len(encode(text)) <= max_bytes:
        return text, False
    low, high = 0, len(text)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if len(encode(text[:middle])) <= max_bytes else (low, middle - 1)
    return text[:low], True
