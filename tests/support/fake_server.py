"""A listening socket that plays a server to the byte, and keeps all it is sent."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

INFO = {"server_id": "x", "version": "2.15.1", "proto": 1, "headers": True, "max_payload": 1 << 20}


def info(**facts: Any) -> bytes:
    """The first line of a nats-server."""
    return b"INFO " + json.dumps({**INFO, **facts}).encode() + b"\r\n"


class FakeServer:
    """What a client sent, and how often it came."""

    def __init__(self) -> None:
        self.port = 0
        self.connections = 0
        self.received = b""

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"


@asynccontextmanager
async def fake_server(
    greeting: bytes | Callable[[], bytes] = b"", *, answer: bytes = b"", hang_up: bool = False
) -> AsyncIterator[FakeServer]:
    """Greet each client, answer what it sends first, and keep the bytes of all of them.

    Args:
        greeting: What each gets at once.
        answer: What each gets after the first it has sent.
        hang_up: Whether the connection is closed then; else it stays open.
    """
    fake = FakeServer()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        fake.connections += 1
        with suppress(ConnectionError):
            writer.write(greeting() if callable(greeting) else greeting)
            if answer:
                fake.received += await reader.read(65_536)
                writer.write(answer)
            await writer.drain()
            while not hang_up and (chunk := await reader.read(65_536)):
                fake.received += chunk
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        fake.port = server.sockets[0].getsockname()[1]
        yield fake
