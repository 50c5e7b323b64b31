"""One run as EXECUTE sees it: the request, its events in order, and the silence between them."""

import asyncio
from collections.abc import AsyncIterator
from types import TracebackType
from typing import Self

import structlog
from msgspec.structs import replace

from loom.bus.client import Bus, Msg
from loom.schemas.run import RunEvent, RunRequest
from loom.schemas.wire import Undecodable, decode

log = structlog.get_logger()

ACCEPT_S = 1.0
HEARTBEAT_S = 2.0
SILENCE_S = 3 * HEARTBEAT_S + 0.5  # three heartbeats missed


class Silent(Exception):
    """The host has not been heard from in time."""


class Watch:
    """The events of a run on a host.

    Use as a context manager: the request is sent on entering; leaving forgets the run's inbox.
    """

    def __init__(self, bus: Bus, host_id: str, request: RunRequest) -> None:
        self._bus = bus
        self._host_id = host_id
        self._request = request
        self._events: asyncio.Queue[RunEvent | None] = asyncio.Queue()
        self._inbox = ""
        self._next_n = request.from_n
        self.heard = False
        """Whether the host has said anything."""

    async def __aenter__(self) -> Self:
        self._inbox = self._bus.open_inbox(self._take)
        await self._bus.publish(self._bus.subjects.of("run", self._host_id), self._request, reply=self._inbox)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bus.close_inbox(self._inbox)

    async def events(self) -> AsyncIterator[RunEvent]:
        """Yield the events, oldest first, each once; the last one is final.

        Raises:
            Silent: No `accepted` in a second, three heartbeats missed, or nobody listens.
        """
        wait_s = ACCEPT_S
        while True:
            try:
                async with asyncio.timeout(wait_s):
                    event = await self._events.get()
            except TimeoutError:
                raise Silent(f"host {self._host_id} was silent for {wait_s} s") from None
            if event is None:
                raise Silent(f"host {self._host_id} is not there")
            wait_s, self.heard = SILENCE_S, True
            if event.final or event.n >= self._next_n:
                self._next_n = event.n + 1
                yield event

    def again(self) -> "Watch":
        """Return a watch for what this one has missed: the host keeps events, and starts no run twice."""
        return Watch(self._bus, self._host_id, replace(self._request, from_n=self._next_n))

    def _take(self, msg: Msg) -> None:
        if msg.headers and msg.headers.get("Status") == "503":
            self._events.put_nowait(None)
            return
        try:
            self._events.put_nowait(decode(msg.data, RunEvent))
        except Undecodable as error:
            log.warning("run_event_undecodable", host_id=self._host_id, reason=error.message)
