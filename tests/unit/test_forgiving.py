"""Lenient decoding of JSON from outside: nulls in place of fields, a byte order mark, counts as text."""

import codecs
from random import Random
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.strategies import message_types, messages

from loom.schemas.auction import AnnouncedNode
from loom.schemas.base import MAX_INT, Message, Undecodable, decode, encode, new_id
from loom.schemas.checks.ad import parse_ad
from loom.schemas.errors import InvalidTask
from loom.schemas.events import ToolCallStart
from loom.schemas.llm import CompletionParams
from loom.schemas.run import RunEvent, RunRequest
from loom.schemas.task import RunResult, TaskAd

a_few = settings(max_examples=5, deadline=None, suppress_health_check=[HealthCheck.too_slow])
OBJECTS = [
    shape
    for shape in message_types()
    if not shape.__struct_config__.array_like
    and shape is not CompletionParams  # asked of a provider, where None is a value
]


def sprinkled(value: Any, null: Any) -> tuple[Any, Any]:
    """A message as plain JSON with nulls for some of its fields, and the same without these fields.

    The objects decide which values are messages; plain dictionaries and lists may be free JSON.
    """
    if isinstance(value, tuple):
        pairs = [sprinkled(one, null) for one in value]
        return [with_nulls for with_nulls, _ in pairs], [without for _, without in pairs]
    if isinstance(value, dict):
        named = {name: sprinkled(one, null) for name, one in value.items()}
        return {name: pair[0] for name, pair in named.items()}, {name: pair[1] for name, pair in named.items()}
    if isinstance(value, msgspec.Raw):
        return value, value
    if not isinstance(value, msgspec.Struct) or value.__struct_config__.array_like:
        plain = msgspec.json.decode(encode(value))
        return plain, plain
    config = value.__struct_config__
    with_nulls: dict[str, Any] = {} if config.tag is None else {str(config.tag_field): config.tag}
    without = dict(with_nulls)
    for field in msgspec.structs.fields(value):
        made = field.default_factory is new_id  # another one each time
        part = getattr(value, field.name)
        if not field.required and not made and not isinstance(part, msgspec.Raw) and null():
            with_nulls[field.encode_name] = None
        else:
            with_nulls[field.encode_name], without[field.encode_name] = sprinkled(part, null)
    return with_nulls, without


@pytest.mark.parametrize("shape", OBJECTS, ids=lambda shape: shape.__name__)
@a_few
@given(data=st.data())
def test_a_message_with_nulls_is_the_message_without_these_fields(shape: type[Message], data: st.DataObject) -> None:
    message, dice = data.draw(messages(shape)), Random(data.draw(st.integers(0, 99)))
    with_nulls, without = sprinkled(message, lambda: dice.random() < 0.5)
    bom = codecs.BOM_UTF8 if dice.random() < 0.5 else b""
    assert decode(bom + encode(with_nulls), shape) == decode(encode(without), shape)


FREE = {"a": None, "b": [None, {"c": None}]}


@pytest.mark.parametrize(
    ("shape", "outer", "found"),
    [
        (TaskAd, {"description": "x", "domain": None, "context": FREE}, lambda ad: ad.context),
        (
            TaskAd,
            {"domain": None, "accept": {"threshold": None, "json_schema": FREE}},
            lambda ad: ad.accept.json_schema,
        ),
        (
            RunEvent,
            {
                "seq": 1,
                "kind": "tool_call",
                "queued": None,
                "event": {"type": "tool_call_start", "tool_call_id": "1", "name": "n", "input": FREE},
            },
            lambda event: event.event.input,
        ),
        (
            ToolCallStart,
            {"type": "tool_call_start", "tool_call_id": "1", "name": "n", "input": FREE},
            lambda e: e.input,
        ),
    ],
)
def test_a_null_inside_free_json_stays(shape: type[Message], outer: dict[str, Any], found: Any) -> None:
    assert found(decode(encode(outer), shape)) == FREE


def test_a_null_among_outputs_stays_and_is_refused() -> None:
    with pytest.raises(Undecodable, match=r"got `null` - at `\$.inputs\[...\]`"):
        decode(b'{"task_id": "t", "description": "x", "domain": null, "inputs": {"a": null}}', RunRequest)


@pytest.mark.parametrize(
    ("raw", "named"),
    [
        (b'{"domain": null, "priority": 5}', "$.priority"),
        (b'{"domain": null, "required_tools": ["a", null]}', "$.required_tools[1]"),
        (b'{"domain": null, "accept": {"threshold": null, "contains": 1}}', "$.accept.contains"),
        (b'\xef\xbb\xbf{"description": 7}', "$.description"),
    ],
)
def test_an_error_has_its_path_after_lenient_decoding_elsewhere(raw: bytes, named: str) -> None:
    with pytest.raises(Undecodable) as caught:
        decode(raw, TaskAd)
    assert named in caught.value.message


def test_a_required_field_that_is_null_is_missing() -> None:
    with pytest.raises(Undecodable, match="missing required field `node_id`"):
        decode(b'{"node_id": null}', AnnouncedNode)


def test_a_client_may_submit_nulls_but_no_misspelt_field() -> None:
    ad = parse_ad(
        codecs.BOM_UTF8 + b'{"description": "x", "domain": null, "timeout_s": null, "limits": {"max_depth": null}}'
    )
    assert (ad.domain, ad.timeout_s) == ("", 300.0)
    with pytest.raises(InvalidTask) as caught:
        parse_ad(b'{"description": "x", "domain": null, "domian": null}')
    assert caught.value.field == "domian"


# -- counts


@pytest.mark.parametrize(
    ("written", "read"),
    [
        (b'"12"', 12),
        (b'"0"', 0),
        (b"12.0", 12),
        (b"1.2e1", 12),
        (str(MAX_INT).encode(), MAX_INT),
        (b'"%d"' % MAX_INT, MAX_INT),
        (b"null", 0),
    ],
)
def test_a_count_that_is_unmistakable_is_read(written: bytes, read: int) -> None:
    assert decode(b'{"prompt_tokens": %s}' % written, RunResult).prompt_tokens == read


@pytest.mark.parametrize(
    "written",
    [
        *(
            b'"12 "',
            b'"-1"',
            b'"+1"',
            b'"1.0"',
            b'"1e3"',
            b'"012"',
            b'""',
            b'"many"',
            '"\u0661"'.encode(),
            b'"%d"' % 2**53,
        ),
        *(b"1.5", b"-1.0", b"1e300", b"true", b"[1]"),
    ],
)
def test_a_count_that_could_be_something_else_is_refused(written: bytes) -> None:
    with pytest.raises(Undecodable, match=r"prompt_tokens"):
        decode(b'{"prompt_tokens": %s}' % written, RunResult)


def test_a_text_stays_a_text_and_a_budget_is_a_number() -> None:
    assert decode(b'{"seq": 1.0, "kind": "error", "error": {"code": "12"}}', RunEvent).error.code == "12"  # type: ignore[union-attr]
    with pytest.raises(InvalidTask):
        parse_ad(b'{"description": "x", "token_budget": "100"}')


# -- costs


def test_a_fitting_value_is_decoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loom.schemas.base._forgiving", None)
    assert decode(b'{"description": "x", "node_id": null, "context": {"a": null}}', TaskAd).context == {"a": None}


@pytest.mark.parametrize("bad", [b"NaN", b"Infinity", b"-Infinity", b"1e999"])
def test_a_number_that_is_not_finite_is_not_json(bad: bytes) -> None:
    for raw in (b'{"duration_s": %s}' % bad, b'{"content": null, "duration_s": %s}' % bad):
        with pytest.raises(Undecodable):
            decode(raw, RunResult)
