"""One run as EXECUTE sees it: the request, its events in order, and the silence between them."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from types import TracebackType
from typing import Any, Self

import structlog
from msgspec.structs import replace

from loom.bus.client import Bus, Msg
from loom.schemas.errors import LoomError
from loom.schemas.run import RunEvent, RunRequest
from loom.schemas.task import TaskResult
from loom.schemas.wire import Undecodable, decode

log = structlog.get_logger()

ABSENT_S = 1.0  # nobody listens: a host may be a little later than we are to come back after an outage
ACCEPT_S = 3.0  # it may be busy; on a machine at its limit hundreds answered later than after one
ASK_AGAIN_S = 0.3
CATCH_UP_S = 5.0
HEARTBEAT_S = 2.0
SILENCE_S = 3 * HEARTBEAT_S + 0.5  # three heartbeats missed
LATE_S = 600.0  # a host repeats a result for as long


class Silent(Exception):
    """The host has not been heard from in time."""


class Watch:
    """The events of a run on a host.

    Use as a context manager: the request is sent on entering; leaving forgets the run's inbox.

    Args:
        attached: Whether the run may be going on already. Then its host has the time of three heartbeats to answer.
    """

    def __init__(self, bus: Bus, host_id: str, request: RunRequest, *, attached: bool = False) -> None:
        self._bus = bus
        self._host_id = host_id
        self._request = request
        self._until = time.monotonic() + request.remaining_s
        self._events: asyncio.Queue[RunEvent] = asyncio.Queue()
        self._inbox = ""
        self._next_n = request.from_n
        self._attached = attached
        self._given_up = False
        self._absent_since: float | None = None
        self.heard = False
        """Whether the host has said anything."""

    async def __aenter__(self) -> Self:
        self._inbox = self._bus.open_inbox(self._take)
        await self._ask()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, Silent):
            self._given_up = True  # should it wake, its last word is refused aloud
            keep_s = min(LATE_S, self._request.remaining_s)
            asyncio.get_running_loop().call_later(keep_s, self._bus.close_inbox, self._inbox)
        else:
            self._bus.close_inbox(self._inbox)

    async def _ask(self, **facts: Any) -> None:
        request = replace(self._request, remaining_s=max(0.0, self._until - time.monotonic()), **facts)
        await self._bus.publish(self._bus.subjects.of("run", self._host_id), request, reply=self._inbox)

    async def hand(self, answer: TaskResult) -> None:
        """Tell the run what came of work it has delegated: the same request again, from the next event on."""
        await self._ask(from_n=self._next_n, answers=(answer,))

    async def events(self) -> AsyncIterator[RunEvent]:
        """Yield the events, oldest first, each once; the last one is final.

        Raises:
            Silent: Nobody is there, no `accepted` came in time, or three heartbeats were missed.
        """
        wait_s = SILENCE_S if self._attached else ACCEPT_S
        while True:
            event = await self._next(wait_s)
            wait_s, self.heard = SILENCE_S, True
            if event.final or event.n >= self._next_n:
                self._next_n = event.n + 1
                yield event

    async def _next(self, wait_s: float) -> RunEvent:
        try:
            async with asyncio.timeout(wait_s):
                return await (self._events.get() if self.heard else self._first())
        except TimeoutError:
            with suppress(TimeoutError, LoomError):  # it may be us who are late: what has come by now counts
                await self._bus.echo(timeout_s=CATCH_UP_S)
        if self._events.empty():
            raise Silent(f"host {self._host_id} was silent for {wait_s} s")
        return self._events.get_nowait()

    async def _first(self) -> RunEvent:
        """Ask until something is heard: after an outage a host may be back later than we are, and miss the request."""
        patience_s = ACCEPT_S if self._attached else ABSENT_S
        while self._absent_s < patience_s:
            with suppress(TimeoutError):
                async with asyncio.timeout(ASK_AGAIN_S):
                    return await self._events.get()
            await self._ask()
        raise Silent(f"host {self._host_id} is not there")

    @property
    def _absent_s(self) -> float:
        """For how long the server has known of nobody who listens."""
        return 0.0 if self._absent_since is None else time.monotonic() - self._absent_since

    def again(self) -> "Watch":
        """Return a watch for what this one has missed: the host keeps events, and starts no run twice."""
        self._bus.close_inbox(self._inbox)
        left_s = max(0.0, self._until - time.monotonic())
        return Watch(self._bus, self._host_id, replace(self._request, from_n=self._next_n, remaining_s=left_s))

    def _take(self, msg: Msg) -> None:
        if msg.status == "503":
            self._absent_since = self._absent_since or time.monotonic()
            return
        self._absent_since = None
        try:
            event = decode(msg.data, RunEvent)
        except Undecodable as error:
            log.warning("run_event_undecodable", host_id=self._host_id, reason=error.message)
            return
        if not self._given_up:
            self._events.put_nowait(event)
        elif event.final:
            self._bus.close_inbox(self._inbox)
            log.info(
                "late_run_refused",
                task_id=self._request.task_id,
                attempt=self._request.attempt,
                host_id=self._host_id,
                kind=event.kind,
            )
