"""Bytes of a server are parsed alike in any pieces, and sent bytes follow the protocol."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from nats.errors import BadSubjectError, ProtocolError

from loom.bus.natsio.transport.fast_client import FastClient, FastParser
from loom.bus.natsio.transport.message import Msg, format_headers, parse_headers

TOKEN = st.text("abcXYZ09_-", min_size=1, max_size=12)
HEADERS = st.dictionaries(TOKEN, st.text(st.characters(blacklist_categories=["C", "Z"]), max_size=12), max_size=3)
MESSAGE = st.tuples(st.integers(1, 9), TOKEN, st.one_of(st.just(""), TOKEN), st.binary(max_size=80), HEADERS)
Seen = tuple[int, str, str, bytes, dict[str, str]]


class RecordingClient(FastClient):
    """A client without a connection that records delivered messages."""

    def __init__(self) -> None:
        self.messages: list[Seen] = []
        super().__init__()

    def deliver(self, sid: int, subject: bytes, reply: bytes, data: bytes, headers: bytes) -> None:
        msg = Msg(subject.decode(), reply.decode(), data, headers)
        self.messages.append((sid, msg.subject, msg.reply, msg.data, dict(msg.headers)))


def line(message: Seen) -> bytes:
    """A message as the server sends it."""
    sid, subject, reply, data, headers = message
    to = f"{subject} {sid} {reply} " if reply else f"{subject} {sid} "
    if not headers:
        return b"MSG %b%d\r\n%b\r\n" % (to.encode(), len(data), data)
    block = format_headers(headers)
    return b"HMSG %b%d %d\r\n%b%b\r\n" % (to.encode(), len(block), len(block) + len(data), block, data)


@given(st.lists(MESSAGE, max_size=8), st.lists(st.integers(0, 400), max_size=12))
async def test_messages_are_parsed_alike_in_any_pieces(messages: list[Seen], cuts: list[int]) -> None:
    stream = b"+OK\r\n".join(line(message) for message in messages)
    client = RecordingClient()
    parser = FastParser(client)
    edges = [0, *sorted(cut % (len(stream) + 1) for cut in cuts), len(stream)]
    for start, end in pairwise(edges):
        await parser.parse(stream[start:end])
    assert client.messages == messages


async def test_the_remainder_of_a_lost_connection_is_discarded() -> None:
    client = RecordingClient()
    parser = FastParser(client)
    await parser.parse(b"MSG a 1 5\r\nhal")
    parser.reset()
    await parser.parse(line((1, "b", "", b"whole", {})))
    assert [message[1] for message in client.messages] == ["b"]


@pytest.mark.parametrize("rubbish", [b"HELLO there\r\n", b"x" * 5000])
async def test_bytes_outside_the_protocol_end_the_reading(rubbish: bytes) -> None:
    with pytest.raises(ProtocolError):
        await FastParser(RecordingClient()).parse(rubbish)


@pytest.mark.parametrize("subject", ["", "a b", "a\r\nPUB x 0\r\n", "a\tb", "a\0"])
def test_a_subject_that_would_break_the_protocol_is_refused(subject: str) -> None:
    with pytest.raises(BadSubjectError):
        FastClient().send(subject, "", b"x", b"")
    with pytest.raises(BadSubjectError):
        FastClient().send("fine", subject or " ", b"x", b"")


@given(HEADERS)
def test_headers_come_back_as_they_were_sent(headers: dict[str, str]) -> None:
    assert parse_headers(format_headers(headers)) == headers


def test_a_value_cannot_inject_a_header() -> None:
    block = format_headers({"traceparent": "a\r\nNats-Msg-Id: mine\r\n\r\nbody"})
    assert parse_headers(block) == {"traceparent": "a Nats-Msg-Id: mine  body"}


@pytest.mark.parametrize("name", ["", "a b", "a:b", "a\r\n"])
def test_an_invalid_header_name_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="cannot name a header"):
        format_headers({name: "x"})


@pytest.mark.parametrize(
    ("raw", "status", "headers"),
    [
        (b"NATS/1.0 503\r\n\r\n", "503", {"Status": "503"}),
        (b"NATS/1.0 404 No Messages\r\n\r\n", "404", {"Status": "404", "Description": "No Messages"}),
        (
            b"NATS/1.0 409 Gone\r\nNats-Pending-Messages: 3\r\n\r\n",
            "409",
            {"Status": "409", "Description": "Gone", "Nats-Pending-Messages": "3"},
        ),
        (b"NATS/1.0\r\nStatus: 503\r\n\r\n", None, {"Status": "503"}),
        (b"NATS/1.0\r\nA: 1\r\nA: 2\r\nno line\r\n\r\n", None, {"A": "1"}),
        (b"", None, {}),
        (b"\xff\xfe", None, {}),
    ],
)
def test_only_a_message_of_the_server_has_a_status(raw: bytes, status: str | None, headers: dict[str, str]) -> None:
    msg = Msg("a", raw_headers=raw)
    assert msg.status == status
    assert dict(msg.headers) == headers
