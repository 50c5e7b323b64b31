"""What the reply subject of a delivered message states about it, and times as the server writes them."""

from datetime import datetime
from typing import NamedTuple

_OLD_TOKENS = 9


class AckMetadata(NamedTuple):
    """The metadata of one delivery."""

    delivered: int
    """How often the message has been delivered, this time included."""
    stream_seq: int
    stored_at: float
    """Server time the message was stored, seconds since the epoch."""
    pending: int
    consumer_seq: int = 0
    stream: str = ""


def ack_metadata(reply: str) -> AckMetadata:
    """Return the metadata in a `$JS.ACK…` reply subject, in its old form of 9 tokens or the newer one of 11 or 12."""
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
    """Return a server time, seconds since the epoch, as RFC 3339: the form that schedules and consumers take."""
    return datetime.fromtimestamp(at).astimezone().isoformat()
