from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loom.agents.llm.openai.bodies import BodyReader
from loom.schemas.errors import AgentFailed


def read(raw: bytes, size: int) -> list[Any]:
    """The values of a body that arrives in pieces of `size` bytes."""
    body = BodyReader()
    values = [value for at in range(0, len(raw), size) for value in body.feed(raw[at : at + size])]
    return [*values, *body.rest()]


@pytest.mark.parametrize(
    ("raw", "values"),
    [
        ('data: {"a": "ü"}\n\ndata: [DONE]\n\n', [{"a": "ü"}]),
        ('\ufeff: a comment\r\n\r\nevent: x\r\nid: 1\r\ndata:{"a": 1}\r\n\r\n', [{"a": 1}]),
        ('data: {"a": 1}\ndata: {"b": 2}\n', [{"a": 1}, {"b": 2}]),
        ('data: {"a":\ndata: 1}\n\n', [{"a": 1}]),
        ('event: ping\ndata: {"type": "ping"}\n\n', [{"type": "ping"}]),
        ('event: error\ndata: {"message": "oh"}\n\n', [{"error": {"message": "oh"}}]),
        ("event: error\ndata: overloaded\n\n", [{"error": "overloaded"}]),
        ('data: {"a": 1}\n\ndata: {"b": ', [{"a": 1}]),
        ('\n {"a": 1}\n', [{"a": 1}]),
        ('{"a": 1}\n{"b": 2}\n', [{"a": 1}, {"b": 2}]),
        ("<html>\n</html>", ["<html>\n</html>"]),
        ("", []),
        ("data: \n\n", []),
    ],
)
@pytest.mark.parametrize("size", [1, 3, 1000])
def test_a_body_is_read_in_any_pieces(raw: str, values: list[Any], size: int) -> None:
    assert read(raw.encode(), size) == values


def test_a_body_without_end_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loom.agents.llm.openai.bodies.MAX_LINE_BYTES", 1000)
    for raw in (b'{"' + b"a" * 2000, b"data: " + b"a" * 2000, b"data: a\n" * 2000):
        with pytest.raises(AgentFailed, match="too long"):
            read(raw, 100)
    monkeypatch.setattr("loom.agents.llm.openai.bodies.MAX_STREAM_BYTES", 5000)
    with pytest.raises(AgentFailed, match="too long"):
        read(b'data: {"a": 1}\n\n' * 1000, 100)


@given(pieces=st.lists(st.binary(max_size=30) | st.sampled_from([b"data: ", b"{", b"\n", b"\n\n", b"event: error\n"])))
def test_any_bytes_of_a_server_are_read(pieces: list[bytes]) -> None:
    body = BodyReader()
    values = [value for piece in pieces for value in body.feed(piece)]

    assert isinstance([*values, *body.rest()], list)
