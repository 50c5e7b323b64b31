"""One message on a run's inbox: an event, or several."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loom.schemas.events import TextDelta
from loom.schemas.run import RunEvent, read_events
from loom.schemas.task import RunResult
from loom.schemas.wire import Undecodable, encode

END = RunEvent(n=9, kind="result", result=RunResult(content="x"))
BAD = b'{"n":1,"kind":"delta","event":{"type":"text_delta","text":5}}'


def test_an_event_may_come_alone_and_several_in_their_order() -> None:
    delta = RunEvent(n=8, kind="delta", event=TextDelta(text="x"))
    assert read_events(encode(END)) == (END,)
    assert read_events(encode([delta, END])) == (delta, END)


@given(st.lists(st.sampled_from([encode(END), BAD, b"7", b"null", b"[]"]), min_size=1, max_size=6))
def test_what_is_no_event_takes_no_other_with_it_and_is_a_sign_of_life(parts: list[bytes]) -> None:
    reasons: list[str] = []
    events = read_events(b"[" + b",".join(parts) + b"]", reasons.append)
    assert [event for event in events if event.final] == [END] * parts.count(encode(END))
    assert [event.kind for event in events if not event.final] == ["heartbeat"] * len(reasons)
    assert len(events) == len(parts)


@pytest.mark.parametrize("body", [b"", b"[", b"[" + encode(END), b"\xff", b"hello", b'{"n":0,"kind":"result","x":NaN}'])
def test_what_is_no_message_is_refused(body: bytes) -> None:
    with pytest.raises(Undecodable):
        read_events(body)
