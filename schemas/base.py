"""What every message has in common: how it is declared, encoded, decoded and bounded."""

import codecs
import math
import sys
import types
from collections.abc import Callable
from contextlib import suppress
from functools import cache, partial
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin, get_type_hints
from uuid import uuid4

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
"""Greatest integer of a message: every reader of JSON agrees on the integers up to here."""
MAX_SECONDS = 1e9
MAX_TIMESTAMP = 1e11
MAX_NODES = 4096
"""Most nodes, tasks or outputs one message names."""

T = TypeVar("T")

Unit = Annotated[float, msgspec.Meta(ge=0, le=1)]
Seconds = Annotated[float, msgspec.Meta(ge=0, le=MAX_SECONDS)]
"""A duration, at most some thirty years."""
Timestamp = Annotated[float, msgspec.Meta(ge=0, le=MAX_TIMESTAMP)]
"""Server time, seconds since the epoch."""
Number = Annotated[float, msgspec.Meta(ge=-1e12, le=1e12)]
"""A float without a narrower range."""
Count = Annotated[int, msgspec.Meta(ge=0, le=MAX_INT)]
Ordinal = Annotated[int, msgspec.Meta(ge=1, le=MAX_INT)]
Text = Annotated[str, msgspec.Meta(max_length=MAX_MESSAGE_BYTES)]
"""Content: as long as a message may be."""
Name = Annotated[str, msgspec.Meta(max_length=200)]
"""An id, a code, the name of a field or of a tool: whatever names one thing."""
Note = Annotated[str, msgspec.Meta(max_length=2048)]
"""Sentences for people."""
Names = Annotated[tuple[Name, ...], msgspec.Meta(max_length=MAX_NODES)]
Outputs = Annotated[dict[Name, Text], msgspec.Meta(max_length=MAX_NODES)]
"""subtask id -> output."""
FreeJson = Annotated[dict[str, Any], msgspec.Meta(max_length=MAX_CONTEXT_BYTES)]
"""A JSON object of a client's own; `free_json_fault` checks its size and depth."""


def cut_note(text: str) -> str:
    """Return `text` cut to what a `Note` holds."""
    return text[:2000]


def cut_name(text: str) -> str:
    """Return `text` cut to what a `Name` holds."""
    return text[:200]


def total(*counts: int) -> int:
    """Return the sum of counts, at most the greatest integer of a message."""
    return min(sum(counts), MAX_INT)


def total_s(*seconds: float) -> float:
    """Return the sum of durations, at most the longest one of a message."""
    return min(sum(seconds), MAX_SECONDS)


def new_id() -> str:
    """Return a fresh random id, 32 hex digits."""
    return uuid4().hex


class Message(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, gc=False):
    """A message made of others and of readings of a clock: immutable, built by keyword, unknown fields ignored.

    It is built dozens of times for each task, and so not checked: whoever reads it checks every range. Nor does the
    garbage collector look at it: what can be sent holds nothing that holds it.
    """


class CheckedMessage(Message, frozen=True, kw_only=True):
    """A message or a part of one that says something of its own.

    A float that is not finite or out of its declared range is refused at construction, because JSON would
    turn it into null and the reader could not tell why.
    """

    def __post_init__(self) -> None:
        cls = type(self)
        fields = _bounds.get(cls)
        if fields is None:
            fields = _bounds[cls] = _float_fields(cls)
        for name, ge, le in fields:
            value = getattr(self, name)
            if value is None:
                continue
            try:
                fits = ge <= value <= le
            except TypeError:  # a text, say
                fits = False
            if not fits:
                raise self._out_of_range(name, ge, le)

    def _out_of_range(self, name: str, ge: float, le: float) -> ValueError:
        """Return the error for a field that is not a number from `ge` to `le`."""
        value = getattr(self, name)
        given = value if isinstance(value, int | float) else f"a {type(value).__name__}"
        return ValueError(f"{type(self).__name__}.{name} must be a number from {ge} to {le}, not {given}")


_bounds: dict[type, tuple[tuple[str, float, float], ...]] = {}
"""What is checked of each class: built as often as messages are, this is not asked of a cache each time."""


def _float_fields(cls: type) -> tuple[tuple[str, float, float], ...]:
    """Name, least and greatest value of each field of `cls` that is a float or an optional float."""
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
    """Return `message` as JSON bytes, with the unknown fields it was read with."""
    encoded = _encoder.encode(message)
    return encode_keeping(message, encoded) if Keeping.begun else encoded


@cache
def _decoder(shape: Any) -> msgspec.json.Decoder[Any]:
    return msgspec.json.Decoder(shape)


class Undecodable(LoomError):
    """Bytes that are not the message they claim to be."""

    code = "dead_letter"


def decode(
    raw: bytes,
    shape: type[T],
    *,
    limit: int = MAX_MESSAGE_BYTES,
    mend: Callable[[Any], Any] | None = None,
    keep_unknown: bool = True,
) -> T:
    """Return `raw` as a `shape`; a part that phases pass on keeps the fields it does not know.

    A byte order mark before it is skipped. Where it does not fit as it is, fields that are null count as absent, and
    texts of digits as counts.

    Args:
        limit: Most bytes that are read.
        mend: What else is forgiven: given the plain JSON value of what does not fit, it returns the one to read.
        keep_unknown: False: an unknown field in a part that phases pass on is an error.

    Raises:
        Undecodable: Longer than `limit` bytes, not JSON, not UTF-8, nested too deeply, or not that shape. The message
            names the path of the field.
    """
    if len(raw) > limit:
        raise Undecodable(f"{len(raw)} bytes; at most {limit} are read")
    decoder: msgspec.json.Decoder[T] = _decoder(shape)  # type: ignore[arg-type]  # classes are hashable
    try:
        return decoder.decode(raw)
    except (ValueError, RecursionError):
        pass  # what is forgiven costs nothing where there is nothing to forgive
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
    """Decode with everything forgiven; the errors are the decoder's, or those of `read`."""
    try:
        return decoder.decode(raw)
    except msgspec.ValidationError as error:
        fault = error
    if REFUSAL in str(fault):
        with suppress(msgspec.ValidationError):  # a field may have to be forgiven as well
            return read(raw)
    try:
        plain = msgspec.json.decode(raw)
    except (ValueError, RecursionError):
        raise fault from None
    # By way of JSON again: what is kept raw is made of bytes.
    return read(encode(forgiven(plain if mend is None else mend(plain), shape)))


def free_json_fault(value: Any, *, max_bytes: int) -> str | None:
    """Return why `value` is not acceptable as free-form JSON, or None when it is."""
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
    """Return `text` whose JSON form takes at most `max_bytes`, and whether it was cut."""
    text, whole = text[:max_bytes], len(text) <= max_bytes  # a character takes a byte or more: the rest is never read
    if whole and len(encode(text)) <= max_bytes:
        return text, False
    low, high = 0, len(text)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if len(encode(text[:middle])) <= max_bytes else (low, middle - 1)
    return text[:low], True
