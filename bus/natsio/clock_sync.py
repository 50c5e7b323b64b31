"""Measures the server's time: when a connection is made, after each reconnect, after a step, every few minutes."""

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
UNTIL_FIRST_S = 5.0
"""Pause between attempts while the namespace has no streams."""
CHECK_S = 1.0
"""How often the wall clock is compared with the monotonic one."""
TRIES = 3
GOOD_S = 0.02
"""A round trip after which no second try is made: the time is known to half of it."""


class _StreamInfo(msgspec.Struct):
    ts: Annotated[datetime, msgspec.Meta(tz=True)] | None = None


class ClockSync:
    """Keeps a clock at the server's time, which is part of the information of every stream.

    Args:
        stream: A stream that may be asked for.
    """

    def __init__(self, clock: ServerClock, requests: Requests, connection: Connection, stream: str) -> None:
        self._clock = clock
        self._requests = requests
        self._connection = connection
        self._subject = f"$JS.API.STREAM.INFO.{stream}"
        self._answer: OneShot[Msg] | None = None
        self._due = asyncio.Event()
        self._denied = False

    async def sync(self, *, timeout_s: float) -> bool:
        """Measure the time, the best of up to three tries; return whether the server answered in `timeout_s`."""
        for tries in range(TRIES):
            asked = time.monotonic()
            server_time = await self._ask(timeout_s)
            answered = time.monotonic()
            if server_time is None:
                return tries > 0
            self._clock.measure(server_time, asked, answered)
            if answered - asked < GOOD_S:
                break
        return True

    async def keep(self) -> NoReturn:
        """Measure again whenever the offset may no longer be right."""
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
        """Return whether `error` denies the request for the server's time; a running request then ends."""
        text = str(error).lower()
        if "permissions violation" not in text or self._subject.lower() not in text:
            return False
        if not self._denied:
            log.info("server_time_denied", hint=f"allow publishing to {self._subject}; until then this clock counts")
        self._denied = True
        if self._answer is not None:
            self._answer.wake()
        return True

    def _on_reconnect(self) -> None:
        self._denied = False  # permissions may have changed
        self._due.set()

    async def _ask(self, timeout_s: float) -> float | None:
        """Return the server's time, seconds since the epoch; None without an answer that carries it."""
        self._answer = OneShot()
        reply = self._requests.open_inbox(self._answer.set)
        try:
            self._connection.publish_nowait(self._subject, reply=reply)
            msg = await self._answer.wait(timeout_s)
            stamp = msgspec.json.decode(msg.data, type=_StreamInfo).ts if msg is not None else None
        except (LoomError, ValueError, RecursionError):
            return None  # not sent, or not the information of a stream: an error of the API, or "no responders"
        finally:
            self._requests.close_inbox(reply)
        return stamp.timestamp() if stamp is not None else None
