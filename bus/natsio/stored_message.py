"""Reads single messages of a stream, by sequence or by subject."""

import base64
from collections.abc import Mapping
from datetime import datetime
from typing import Any, NamedTuple

from loom.bus.natsio.jetstream import JetStream
from loom.bus.natsio.server_errors import Refused, ServerErrorCode
from loom.bus.natsio.transport.message import parse_headers


class StoredMessage(NamedTuple):
    """A message of a stream."""

    subject: str
    data: bytes
    headers: Mapping[str, str]
    seq: int
    stored_at: float = 0.0
    """Server time, seconds since the epoch."""


async def last_message(jetstream: JetStream, stream: str, subject: str) -> StoredMessage | None:
    """Return the last message of a stream on a subject, which may have wildcards; None if there is none.

    Args:
        stream: Name of the stream on the server, for example `LOOM_TASKS`.

    Raises:
        BusUnavailable: The server does not answer.
        Refused: The stream does not exist.
    """
    return await read_message(jetstream, stream, {"last_by_subj": subject})


async def read_message(jetstream: JetStream, stream: str, which: dict[str, Any]) -> StoredMessage | None:
    """Return a message of a stream; None if there is none.

    Args:
        stream: Name of the stream on the server, for example `LOOM_TASKS`.
        which: Body of STREAM.MSG.GET: `seq`, `last_by_subj`, or `seq` and `next_by_subj`.

    Raises:
        BusUnavailable: The server does not answer.
        Refused: The stream does not exist.
    """
    try:
        message = (await jetstream.api(f"STREAM.MSG.GET.{stream}", which))["message"]
    except Refused as refusal:
        if refusal.err_code == ServerErrorCode.NO_MESSAGE:
            return None
        raise
    return StoredMessage(
        subject=message["subject"],
        data=base64.b64decode(message.get("data", "")),
        headers=parse_headers(base64.b64decode(message.get("hdrs", ""))),
        seq=message["seq"],
        stored_at=datetime.fromisoformat(message["time"]).timestamp(),
    )
