"""One stream saved into a file and restored from it, by the server's snapshot protocol.

A snapshot holds the messages of a stream with their sequences and times, and its consumers with what they have
acknowledged. The server sends it in chunks and waits for an acknowledgement of each; a restore is the same in reverse.
The content of the file belongs to nats-server: a compressed archive of the stream's folder.
"""

import asyncio
from pathlib import Path
from typing import Any

from loom.bus.bus import Bus
from loom.bus.natsio.server_errors import ApiError, Refused
from loom.bus.natsio.transport.message import Msg
from loom.schemas.base import Message, Undecodable, decode
from loom.schemas.errors import BusUnavailable

CHUNK_BYTES = 128 * 1024
"""Bytes of one message of a snapshot; far below the smallest usual limit of a server."""
CHUNK_S = 30.0
"""Longest wait for the next chunk, or for the acknowledgement of one."""
START_S = 30.0
"""Longest wait for the server to begin: a large stream is first flushed to its disk."""
_OK = {None, "200", "204"}
"""Status of the last, empty message of a complete snapshot."""


class StreamSnapshot(Message, frozen=True, kw_only=True):
    """What the server needs in addition to the chunks to restore a stream."""

    config: dict[str, Any]
    state: dict[str, Any]


class _RestoreStart(Message, frozen=True, kw_only=True):
    deliver_subject: str


class _Reply(Message, frozen=True, kw_only=True):
    error: ApiError | None = None


async def save_stream(bus: Bus, stream: str, path: Path) -> StreamSnapshot:
    """Write a snapshot of a stream into a new file.

    Raises:
        Refused: The server has no such stream, or refused.
        BusUnavailable: The server does not answer, or the snapshot is incomplete.
        OSError: The file exists or cannot be written.
    """
    chunks: asyncio.Queue[Msg] = asyncio.Queue()
    inbox = bus.requests.new_inbox()  # of its own: the server waits 2 s where only a wildcard covers the subject
    subscription = await bus.connection.subscribe_sync(inbox, chunks.put_nowait)
    try:
        request = {"deliver_subject": inbox, "chunk_size": CHUNK_BYTES}
        snapshot = await bus.jetstream.api(
            f"STREAM.SNAPSHOT.{stream}", request, timeout_s=START_S, shape=StreamSnapshot
        )
        with path.open("xb") as file:
            while (chunk := await _next(chunks, stream)).data:
                await asyncio.to_thread(file.write, chunk.data)
                if chunk.reply:
                    await bus.connection.publish(chunk.reply)
    finally:
        bus.connection.unsubscribe(subscription)
    if chunk.status not in _OK:
        raise BusUnavailable(f"the snapshot of {stream} is incomplete: {chunk.headers.get('Description', 'no reason')}")
    return snapshot


async def _next(chunks: asyncio.Queue[Msg], stream: str) -> Msg:
    try:
        async with asyncio.timeout(CHUNK_S):
            return await chunks.get()
    except TimeoutError:
        raise BusUnavailable(f"the snapshot of {stream} stopped: no data for {CHUNK_S:.0f} s") from None


async def restore_stream(bus: Bus, stream: str, snapshot: StreamSnapshot, path: Path) -> None:
    """Create a stream from a snapshot.

    Raises:
        Refused: A stream of that name exists, or the server refused the snapshot; no stream was created.
        BusUnavailable: The server does not answer.
        OSError: The file cannot be read.
    """
    start = await bus.jetstream.api(f"STREAM.RESTORE.{stream}", snapshot, timeout_s=START_S, shape=_RestoreStart)
    with path.open("rb") as file:
        while chunk := await asyncio.to_thread(file.read, CHUNK_BYTES):
            await _send(bus, start.deliver_subject, chunk)
    await _send(bus, start.deliver_subject, b"")  # the end: the reply comes once the stream is there


async def _send(bus: Bus, subject: str, chunk: bytes) -> None:
    try:
        reply = await bus.requests.request(subject, chunk, timeout_s=CHUNK_S)
        error = decode(reply.data, _Reply).error if b'"error"' in reply.data else None
    except (TimeoutError, Undecodable) as cause:
        raise BusUnavailable(f"the server did not acknowledge a chunk in {CHUNK_S:.0f} s") from cause
    if error is not None:
        raise Refused(error.description, error.err_code)
