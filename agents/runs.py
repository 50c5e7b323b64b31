"""One run on a host: its events, numbered and kept, and where they are sent."""

import asyncio
import time
from collections import OrderedDict, deque
from typing import Any

import structlog

from loom.bus.client import Bus
from loom.schemas.errors import LoomError
from loom.schemas.events import Progress, ToolCallEnd, ToolCallStart
from loom.schemas.run import RunEvent, RunKind, RunRequest
from loom.schemas.wire import encode

log = structlog.get_logger()

HISTORY = 1024
"""Events of a live run kept for whoever re-attaches."""
KEEP_S = 600.0
KEEP_BYTES = 32 * 1024 * 1024

Key = tuple[str, int]


class Run:
    """A run in hand, queued or working."""

    def __init__(self, bus: Bus, request: RunRequest, inbox: str) -> None:
        self.request = request
        self.work: asyncio.Task[None] | None = None
        """None while it is queued."""
        self.cancelled = False
        self.last: RunEvent | None = None
        """The final event, once there is one."""
        self._bus = bus
        self._inbox = inbox
        self._n = 0
        self._kept: deque[RunEvent] = deque(maxlen=HISTORY)
        self._until = time.monotonic() + request.remaining_s
        self._sending = asyncio.Lock()  # a watcher drops what comes out of order

    @property
    def key(self) -> Key:
        """What makes two requests the same run."""
        return (self.request.task_id, self.request.attempt)

    @property
    def left_s(self) -> float:
        """Seconds to the task's deadline; waiting in the backlog counts."""
        return max(0.0, self._until - time.monotonic())

    async def say(self, kind: RunKind, **facts: Any) -> None:
        """Send the next event; a final one ends the run, and nothing is sent after it."""
        if self.last is not None:
            return
        event = RunEvent(n=self._n, kind=kind, **facts)
        self._n += 1
        if kind != "heartbeat":
            self._kept.append(event)
        if event.final:
            self.last = event
        async with self._sending:
            await send(self._bus, self._inbox, event)

    async def progress(self, event: Progress) -> None:
        """Send what the agent says on its way."""
        await self.say("tool_call" if isinstance(event, ToolCallStart | ToolCallEnd) else "delta", event=event)

    async def move(self, inbox: str, from_n: int) -> None:
        """Send all events from number `from_n` on to `inbox`, and every later one; the old inbox is told."""
        async with self._sending:
            if inbox != self._inbox:
                await send(self._bus, self._inbox, RunEvent(n=self._n, kind="moved"))
                self._inbox = inbox
            for event in [event for event in self._kept if event.n >= from_n or event.kind == "accepted"]:
                await send(self._bus, inbox, event)


async def send(bus: Bus, inbox: str, event: RunEvent) -> None:
    """Send one event; a lost one is missed by its number or by the watcher's patience."""
    try:
        await bus.publish(inbox, event)
    except LoomError as error:
        log.warning("run_event_lost", kind=event.kind, reason=error.message)


class Finished:
    """Last events of runs that have ended, kept for ten minutes and at most 32 MiB."""

    def __init__(self) -> None:
        self._kept: OrderedDict[Key, tuple[float, int, RunEvent]] = OrderedDict()
        self._bytes = 0

    def keep(self, key: Key, event: RunEvent, now: float) -> None:
        """Remember how a run ended, at monotonic time `now`."""
        self._drop(key)
        size = len(encode(event))
        self._kept[key] = (now, size, event)
        self._bytes += size
        while self._kept:
            oldest, (at, _, _) = next(iter(self._kept.items()))
            if now - at <= KEEP_S and self._bytes <= KEEP_BYTES:
                return
            self._drop(oldest)

    def get(self, key: Key) -> RunEvent | None:
        """Return the last event of a run, if it is still known."""
        entry = self._kept.get(key)
        return entry[2] if entry else None

    def _drop(self, key: Key) -> None:
        entry = self._kept.pop(key, None)
        if entry is not None:
            self._bytes -= entry[1]
