"""One message of a stream, read by its sequence or its subject."""

import base64
from collections.abc import Mapping
from datetime import datetime
from typing import Any, NamedTuple

from loom.bus.natsio.jetstream import JetStream
from loom.bus.natsio.server_errors import Refused, ServerErrorCode
from loom.bus.natsio.transport.message import parse_headers


class StoredMessage(NamedTuple):
    """A message as its stream holds it."""

    subject: str
    data: bytes
    headers: Mapping[str, str]
    seq: int
    stored_at: float = 0.0
    """Server time, seconds since the epoch."""


async def read_message(jetstream: JetStream, stream: str, which: dict[str, Any]) -> StoredMessage | None:
    """Return a message of a stream; None when there is none.

    Args:
        stream: As the server names it.
        which: As STREAM.MSG.GET takes it: `seq`, `last_by_subj`, or `seq` and `next_by_subj`.

    Raises:
        BusUnavailable: No answer.
        Refused: No such stream.
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
