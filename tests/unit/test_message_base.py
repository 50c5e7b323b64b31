"""Rules common to all messages: round trips, bounds, and refusals."""

import contextlib
import json
import math
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.strategies import fields_of, float_fields, json_values, message_types, messages, with_unknown_field

from loom.schemas.base import (
    MAX_JSON_DEPTH,
    MAX_MESSAGE_BYTES,
    Message,
    Undecodable,
    cut_utf8,
    decode,
    encode,
    free_json_fault,
    new_id,
)
from loom.schemas.envelope import Envelope
from loom.schemas.task import TaskAd

a_few = settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
texts = st.text(st.characters(exclude_categories=["Cs"]))


def test_the_messages_are_found() -> None:
    assert {TaskAd, Envelope} <= set(message_types())


@pytest.mark.parametrize("shape", message_types(), ids=lambda shape: shape.__name__)
@a_few
@given(data=st.data())
def test_every_message_survives_the_wire(shape: type[Message], data: st.DataObject) -> None:
    message = data.draw(messages(shape))
    assert decode(encode(message), shape) == message


objects = [shape for shape in message_types() if not shape.__struct_config__.array_like]


@pytest.mark.parametrize("shape", objects, ids=lambda shape: shape.__name__)
@settings(a_few, max_examples=2)
@given(data=st.data())
def test_a_field_of_a_newer_peer_is_ignored_or_kept(shape: type[Message], data: st.DataObject) -> None:
    message = data.draw(messages(shape))
    raw = with_unknown_field(message)
    read = decode(raw, shape)
    assert isinstance(read, shape)
    assert fields_of(read) | fields_of(message) == fields_of(read)
    if shape.__struct_config__.forbid_unknown_fields:
        assert json.loads(encode(read)) == json.loads(raw)
    else:
        assert read == message


@pytest.mark.parametrize(
    ("shape", "field", "refused"), float_fields(), ids=lambda part: getattr(part, "__name__", part) if part else ""
)
@settings(a_few, max_examples=1)
@given(data=st.data())
def test_a_float_json_cannot_carry_or_out_of_range_is_refused_at_construction(
    shape: type[Message], field: str, refused: list[float], data: st.DataObject
) -> None:
    fields = fields_of(data.draw(messages(shape)))
    for value in refused:
        with pytest.raises(ValueError, match=rf"^({shape.__name__}\.)?{field} must be"):
            shape(**{**fields, field: value})


def test_an_absent_optional_float_is_not_refused() -> None:
    assert TaskAd(description="x", estimated_complexity=None).estimated_complexity is None


def test_size_is_checked_before_decoding() -> None:
    raw = b'{"never": "closed' * MAX_MESSAGE_BYTES
    with pytest.raises(Undecodable, match=f"{len(raw)} bytes; at most {MAX_MESSAGE_BYTES}"):
        decode(raw, TaskAd)


def test_the_limit_itself_is_still_read() -> None:
    ad = TaskAd(description="x")
    raw = encode(ad)
    assert decode(raw, TaskAd, limit=len(raw)) == ad
    with pytest.raises(Undecodable):
        decode(raw, TaskAd, limit=len(raw) - 1)


@pytest.mark.parametrize("field", ["context", "field_of_the_future"])
def test_deep_nesting_is_undecodable_and_nothing_worse(field: str) -> None:
    deep = '{"a":' * 2000 + "1" + "}" * 2000
    try:
        ad = decode(f'{{"description": "x", "{field}": {deep}}}'.encode(), TaskAd)
    except Undecodable:
        return
    # A Python that can decode it: the depth of free JSON has a rule of its own.
    assert field == "field_of_the_future" or free_json_fault(ad.context, max_bytes=10**6)


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"not json",
        b"[]",
        b"null",
        b'{"description": "\xff"}',
        b"\xff\xfe{",
        b'{"description": 1}',
        b'{"description": "x"',
    ],
)
def test_bytes_of_another_form_are_undecodable(raw: bytes) -> None:
    with pytest.raises(Undecodable):
        decode(raw, TaskAd)


@settings(deadline=None)
@given(raw=st.binary(max_size=200) | json_values.map(lambda value: json.dumps(value).encode()))
def test_any_bytes_are_a_message_or_undecodable(raw: bytes) -> None:
    with contextlib.suppress(Undecodable):
        assert isinstance(decode(raw, Envelope), Envelope)


@settings(deadline=None)
@given(text=texts, max_bytes=st.integers(2, 200))
def test_a_cut_text_is_the_longest_prefix_that_fits(text: str, max_bytes: int) -> None:
    kept, cut = cut_utf8(text, max_bytes)
    assert text.startswith(kept)
    assert len(encode(kept)) <= max_bytes
    assert cut == (kept != text)
    if cut:
        assert len(encode(text[: len(kept) + 1])) > max_bytes


def test_a_text_that_just_fits_is_not_cut() -> None:
    text = 'ü"\n' * 10
    assert cut_utf8(text, len(encode(text))) == (text, False)
    assert cut_utf8(text, len(encode(text)) - 1) == (text[:-1], True)


@settings(deadline=None)
@given(value=json_values)
def test_plain_json_has_no_fault(value: Any) -> None:
    assert free_json_fault(value, max_bytes=10**6) is None


def _nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth - 1):
        value = [value]
    return value


class _Shout(str):
    __slots__ = ()


@pytest.mark.parametrize(
    ("value", "fault"),
    [
        ({"a": [math.nan]}, "not finite"),
        ({"a": {"b": math.inf}}, "not finite"),
        ({1: "a"}, "not a string"),
        ({"a": {2: "b"}}, "not a string"),
        ({"a": object()}, "holds a object"),
        ({"a": {1, 2}}, "holds a set"),
        ({"a": b"raw"}, "holds a bytes"),
        ({"a": "\ud800"}, "cannot be encoded"),
        ({"a": _Shout("x")}, "cannot be encoded"),
        (_nested(MAX_JSON_DEPTH + 1), "levels deep"),
        (_nested(5000), "levels deep"),
        ("x" * 99, "is 101 bytes of JSON; at most 100"),
    ],
)
def test_a_fault_of_free_json_is_named(value: Any, fault: str) -> None:
    assert fault in str(free_json_fault(value, max_bytes=100))


def test_json_that_contains_itself_is_a_fault() -> None:
    loop: list[Any] = []
    loop.append(loop)
    assert "levels deep" in str(free_json_fault(loop, max_bytes=100))


def test_the_bounds_of_free_json_are_inclusive() -> None:
    assert free_json_fault(_nested(MAX_JSON_DEPTH), max_bytes=100) is None
    assert free_json_fault("x" * 98, max_bytes=100) is None


def test_ids_are_tokens_and_differ() -> None:
    ids = {new_id() for _ in range(100)}
    assert len(ids) == 100
    assert all(decode(encode(one), str) == one and one.isalnum() for one in ids)
