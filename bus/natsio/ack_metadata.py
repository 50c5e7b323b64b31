"""The delivery metadata in the reply subject of a message, and times in the format of the JetStream API."""

from datetime import datetime
from typing import NamedTuple

_OLD_TOKENS = 9


class AckMetadata(NamedTuple):
    """The metadata of one delivery."""

    delivered: int
    """Number of deliveries, including this one."""
    stream_seq: int
    stored_at: float
    """Server time at which the message was stored, seconds since the epoch."""
    pending: int
    """Messages that the consumer has not delivered yet."""
    consumer_seq: int = 0
    stream: str = ""


def ack_metadata(reply: str) -> AckMetadata:
    """Return the metadata in a `$JS.ACK…` reply subject, of 9 tokens (old form) or of 11 or 12 (new form)."""
    tokens = reply.split(".")
    first = 2 if len(tokens) == _OLD_TOKENS else 4
    stream, _, delivered, stream_seq, consumer_seq, stored_at, pending = tokens[first : first + 7]
    return AckMetadata(
        delivered=int(delivered),
        stream_seq=int(stream_seq),
        consumer_seq=int(consumer_seq),
        stored_at=int(stored_at) / 1e9,
        pending=int(pending),
        stream=stream,
    )


def rfc3339(at: float) -> str:
    """Return a server time, seconds since the epoch, in RFC 3339 format, as schedules and consumers require."""
    return datetime.fromtimestamp(at).astimezone().isoformat()
