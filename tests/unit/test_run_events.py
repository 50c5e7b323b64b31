"""One message on a run's inbox: an event, or several."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loom.schemas.events import TextDelta
from loom.schemas.run import RunEvent, read_events
from loom.schemas.task import RunResult
from loom.schemas.wire import Undecodable, encode

END = RunEvent(seq=9, kind="result", result=RunResult(content="x"))
BAD = b'{"seq":1,"kind":"delta","event":{"type":"text_delta","text":5}}'


def test_an_event_may_come_alone_and_several_in_their_order() -> None:
    delta = RunEvent(seq=8, kind="delta", event=TextDelta(text="x"))
    assert read_events(encode(END)) == (END,)
    assert read_events(encode([delta, END])) == (delta, END)


@given(st.lists(st.sampled_from([encode(END), BAD, b"7", b"null", b"[]"]), min_size=1, max_size=6))
def test_what_is_no_event_takes_no_other_with_it(parts: list[bytes]) -> None:
    good = parts.count(encode(END))
    body = b"[" + b",".join(parts) + b"]"
    if good:
        assert read_events(body) == (END,) * good
    else:
        with pytest.raises(Undecodable):
            read_events(body)


@pytest.mark.parametrize("body", [b"", b"[", b"7", b"[" + encode(END), BAD, b"\xff"])
def test_what_is_no_message_is_refused(body: bytes) -> None:
    with pytest.raises(Undecodable):
        read_events(body)
