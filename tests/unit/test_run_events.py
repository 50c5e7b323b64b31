"""One message on a run's inbox: an event, or several."""

import contextlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace
from support.strategies import json_values

from loom.schemas.base import MAX_MESSAGE_BYTES, Undecodable, encode
from loom.schemas.events import TextDelta
from loom.schemas.run import MAX_EVENTS, MAX_UNREADABLE, RunEvent, RunRequest, encode_event, read_events
from loom.schemas.task import RunResult, TaskAd

END = RunEvent(seq=9, kind="result", result=RunResult(content="x"))
BAD = b'{"seq":1,"kind":"delta","event":{"type":"text_delta","text":5}}'


def test_a_message_has_one_event_or_several_in_order() -> None:
    delta = RunEvent(seq=8, kind="delta", event=TextDelta(text="x"))
    assert read_events(encode(END)) == (END,)
    assert read_events(encode([delta, END])) == (delta, END)


def test_a_delegated_ad_is_sent_without_an_id_and_a_received_id_is_accepted() -> None:
    waiting = RunEvent(seq=2, kind="waiting", ad=TaskAd(description="a part", context={"task_id": "kept"}), call=1)
    written = json.loads(encode_event(waiting))
    assert "task_id" not in written["ad"]
    assert written["ad"]["context"] == {"task_id": "kept"}
    (event,) = read_events(encode_event(waiting))
    assert event.ad is not None
    assert waiting.ad is not None
    assert replace(event.ad, task_id=waiting.ad.task_id) == waiting.ad
    assert encode_event(END) == encode(END)


def test_a_run_request_always_names_its_attempt() -> None:
    assert json.loads(encode(RunRequest(task_id="t1", description="x"))) == {
        "task_id": "t1",
        "attempt": 1,
        "description": "x",
    }


@given(st.lists(st.sampled_from([encode(END), BAD, b"7", b"null", b"[]"]), min_size=1, max_size=6))
def test_an_invalid_event_spares_the_other_events_and_counts_as_a_heartbeat(parts: list[bytes]) -> None:
    reasons: list[str] = []
    events = read_events(b"[" + b",".join(parts) + b"]", reasons.append)
    assert [event for event in events if event.final] == [END] * parts.count(encode(END))
    assert [event.kind for event in events if not event.final] == ["heartbeat"] * len(reasons)
    assert len(events) == len(parts)


@pytest.mark.parametrize(
    "body", [b"", b"[", b"[" + encode(END), b"\xff", b"hello", b'{"seq":0,"kind":"result","x":NaN}']
)
def test_an_invalid_message_is_refused(body: bytes) -> None:
    with pytest.raises(Undecodable):
        read_events(body)


# -- what authors in other languages get wrong


FORGIVEN: dict[str, tuple[bytes, RunEvent]] = {
    "nulls": (
        b'{"seq":9,"kind":"result","code":null,"error":null,"result":{"content":"x","usd":null,"steps":null}}',
        END,
    ),
    "a byte order mark": (b"\xef\xbb\xbf" + encode(END), END),
    "an array with space and a mark before it": (b"\xef\xbb\xbf [" + encode(END) + b"]", END),
    "a count as text": (
        b'{"seq":9,"kind":"result","result":{"content":"x","prompt_tokens":"12"}}',
        RunEvent(seq=9, kind="result", result=RunResult(content="x", prompt_tokens=12)),
    ),
    "a number as number of the event": (b'{"seq":9.0,"kind":"result","result":{"content":"x"}}', END),
}


@pytest.mark.parametrize(("raw", "read"), FORGIVEN.values(), ids=FORGIVEN)
def test_an_unambiguous_variant_is_read_and_not_counted(raw: bytes, read: RunEvent) -> None:
    reasons: list[str] = []
    assert (read_events(raw, reasons.append), reasons) == ((read,), [])


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"42", "42"),
        (b"0.5", "0.5"),
        (b"true", "true"),
        (b'{"a": 1}', '{"a":1}'),
        (b'{"a": null, "b": [null]}', '{"a":null,"b":[null]}'),
        (b'["\xc3\xa9", "\\"x"]', '["é","\\"x"]'),
        (b"9" * 400, "9" * 400),
        (b"null", ""),
        (b'"42"', "42"),
    ],
)
@pytest.mark.parametrize("wrapped", [b"%s", b"[%s]", b'[%s,{"seq":2,"kind":"delta","event":7}]'])
def test_content_that_is_not_a_string_becomes_its_json_text(content: bytes, text: str, wrapped: bytes) -> None:
    event = read_events(wrapped % (b'{"seq":1,"kind":"result","result":{"content":%s}}' % content))[0]
    assert event == RunEvent(seq=1, kind="result", result=RunResult(content=text))


UNREADABLE: dict[str, tuple[bytes, str, int, str]] = {
    "a result that is a text": (b'{"seq":4,"kind":"result","result":"x"}', "error", 4, "`$.result`"),
    "an error with a number for a code": (b'{"seq":4,"kind":"error","error":{"code":5}}', "error", 4, "`$.error.code`"),
    "a rejection for an unknown reason": (b'{"seq":4,"kind":"rejected","code":"tired"}', "error", 4, "'tired'"),
    "a result without a number": (b'{"kind":"result","result":{"content":"x"}}', "error", 0, "`seq`"),
    "a result with an odd number": (b'{"seq":"four","kind":"result"}', "error", 0, "`$.seq`"),
    "content and no kind": (b'{"content":"x"}', "error", 0, "`seq`"),
    "content and no kind but null": (b'{"seq":4,"kind":null,"content":7}', "error", 4, "`kind`"),
    "no kind and no content": (b'{"seq":4,"content":null}', "heartbeat", 4, "`kind`"),
    "an unknown kind": (b'{"seq":4,"kind":"thinking"}', "heartbeat", 4, "'thinking'"),
    "an unknown kind with content": (b'{"seq":4,"kind":"thinking","content":"x"}', "heartbeat", 4, "'thinking'"),
    "an unknown event": (b'{"seq":4,"kind":"delta","event":{"type":"audio"}}', "heartbeat", 4, "'audio'"),
    "a number": (b"7", "heartbeat", 0, "got `int`"),
    "a result of 600 kB": (
        b'{"seq":4,"kind":"result","result":{"content":"%s"}}' % (b"x" * 600_000),
        *("error", 4, f"600049 bytes; at most {MAX_MESSAGE_BYTES}"),
    ),
    "progress of 600 kB": (
        b'{"seq":4,"kind":"delta","event":{"type":"text_delta","text":"%s"}}' % (b"x" * 600_000),
        *("heartbeat", 4, f"at most {MAX_MESSAGE_BYTES}"),
    ),
}


@pytest.mark.parametrize(("raw", "kind", "n", "reason"), UNREADABLE.values(), ids=UNREADABLE)
@pytest.mark.parametrize("wrapped", [b"%s", b"[%s]"], ids=["alone", "in an array"])
def test_an_unreadable_event_is_an_end_or_a_heartbeat_and_has_a_reason(
    raw: bytes, kind: str, n: int, reason: str, wrapped: bytes
) -> None:
    reasons: list[str] = []
    (event,) = read_events(wrapped % raw, reasons.append)
    assert (event.kind, event.seq) == (kind, n)
    assert len(reasons) == 1
    assert reason in reasons[0]
    if kind == "error":
        assert event.error is not None
        assert (event.error.code, reason in event.error.message) == ("agent_failed", True)


def test_of_a_message_that_is_garbage_all_through_only_the_beginning_is_looked_at() -> None:
    reasons: list[str] = []
    events = read_events(b"[" + b"7," * 5000 + encode(END) + b"]", reasons.append)
    assert len(events) == MAX_UNREADABLE
    assert "the rest is ignored" in reasons[-1]
    with pytest.raises(Undecodable, match=f"length <= {MAX_EVENTS}"):
        read_events(b"[" + b"7," * MAX_EVENTS + b"7]")


@given(st.binary(max_size=60) | json_values.map(lambda value: json.dumps(value).encode()))
def test_any_bytes_are_events_or_no_message(raw: bytes) -> None:
    with contextlib.suppress(Undecodable):
        assert all(isinstance(event, RunEvent) for event in read_events(raw))
