"""Measures the server's time: on connect, after each reconnect, after a step of the wall clock, and periodically."""

import asyncio
import time
from datetime import datetime
from typing import Annotated, NoReturn

import msgspec

from loom.bus.logs.logger import get_logger
from loom.bus.natsio.clock import ServerClock
from loom.bus.natsio.connection import Connection
from loom.bus.natsio.one_shot import OneShot
from loom.bus.natsio.requests import Requests
from loom.bus.natsio.transport.message import Msg
from loom.schemas.errors import LoomError

log = get_logger()

EVERY_S = 120.0
"""Seconds between two measurements."""
UNTIL_FIRST_S = 5.0
"""Seconds between two attempts while the namespace has no streams."""
CHECK_S = 1.0
"""Seconds between two comparisons of the wall clock with the monotonic clock."""
TRIES = 3
GOOD_S = 0.02
"""Round trip, in seconds, after which no further try is made; the error of the time is at most half of it."""


class _StreamInfo(msgspec.Struct):
    ts: Annotated[datetime, msgspec.Meta(tz=True)] | None = None


class ClockSync:
    """Keeps a clock at the server's time, which the information of every stream contains.

    Args:
        stream: Name of the stream whose information is requested.
    """

    def __init__(self, clock: ServerClock, requests: Requests, connection: Connection, stream: str) -> None:
        self._clock = clock
        self._requests = requests
        self._connection = connection
        self._subject = f"$JS.API.STREAM.INFO.{stream}"
        self._reply: OneShot[Msg] | None = None
        self._due = asyncio.Event()
        self._denied = False

    async def sync(self, *, timeout_s: float) -> bool:
        """Measure the time, in up to three tries; return whether the server answered within `timeout_s`."""
        for tries in range(TRIES):
            sent_at = time.monotonic()
            server_time = await self._request_time(timeout_s)
            received_at = time.monotonic()
            if server_time is None:
                return tries > 0
            self._clock.measure(server_time, sent_at, received_at)
            if received_at - sent_at < GOOD_S:
                break
        return True

    async def keep(self) -> NoReturn:
        """Measure the time whenever the offset may be outdated; runs until cancelled."""
        self._connection.on_reconnect(self._on_reconnect)
        measured_at = time.monotonic()
        while True:
            pause_s = EVERY_S if self._clock.measured or self._denied else UNTIL_FIRST_S
            if self._due.is_set() or time.monotonic() >= measured_at + pause_s or self._clock.has_stepped():
                self._due.clear()
                measured_at = time.monotonic()
                if not self._denied:
                    await self.sync(timeout_s=CHECK_S)
            await self._until_due()

    async def _until_due(self) -> None:
        try:
            async with asyncio.timeout(CHECK_S):
                await self._due.wait()
        except TimeoutError:
            pass

    def is_denial(self, error: Exception) -> bool:
        """Return whether `error` denies permission to request the server's time; a pending request then ends."""
        text = str(error).lower()
        if "permissions violation" not in text or self._subject.lower() not in text:
            return False
        if not self._denied:
            log.info(
                "server_time_denied", hint=f"allow publishing to {self._subject}; until then the local clock is used"
            )
        self._denied = True
        if self._reply is not None:
            self._reply.wake()
        return True

    def _on_reconnect(self) -> None:
        self._denied = False  # permissions may have changed
        self._due.set()

    async def _request_time(self, timeout_s: float) -> float | None:
        """Return the server's time, seconds since the epoch; None without a reply that contains it."""
        self._reply = OneShot()
        reply = self._requests.open_inbox(self._reply.set)
        try:
            self._connection.publish_nowait(self._subject, reply=reply)
            msg = await self._reply.wait(timeout_s)
            stamp = msgspec.json.decode(msg.data, type=_StreamInfo).ts if msg is not None else None
        except (LoomError, ValueError, RecursionError):
            return None  # not sent, or the reply is an error of the API or "no responders"
        finally:
            self._requests.close_inbox(reply)
        return stamp.timestamp() if stamp is not None else None
