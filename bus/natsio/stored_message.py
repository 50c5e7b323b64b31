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
    pending: int = 0
    """For a message of a consumer: how many messages followed it when it was delivered."""


async def message_at(jetstream: JetStream, stream: str, seq: int) -> StoredMessage | None:
    """Return the message of a stream with sequence `seq`; None if there is none.

    Args:
        stream: Name of the stream on the server, for example `LOOM_TASKS`.

    Raises:
        BusUnavailable: The server does not answer.
        Refused: The stream does not exist.
    """
    return await _get(jetstream, stream, {"seq": seq})


async def next_message(jetstream: JetStream, stream: str, subject: str, seq: int) -> StoredMessage | None:
    """Return the first message on a subject from sequence `seq` on; the rest is as for `last_message`."""
    return await _get(jetstream, stream, {"seq": seq, "next_by_subj": subject})


async def last_message(jetstream: JetStream, stream: str, subject: str) -> StoredMessage | None:
    """Return the last message of a stream on a subject; None if there is none.

    Args:
        stream: Name of the stream on the server, for example `LOOM_TASKS`.
        subject: Subject, which may have wildcards.

    Raises:
        BusUnavailable: The server does not answer.
        Refused: The stream does not exist.
    """
    return await _get(jetstream, stream, {"last_by_subj": subject})


async def _get(jetstream: JetStream, stream: str, which: dict[str, Any]) -> StoredMessage | None:
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
