"""One run on a host: its events, numbered and kept, and where they are sent."""

import asyncio
import time
from collections import OrderedDict, deque
from collections.abc import Iterable
from typing import Any

import structlog
from msgspec.structs import replace

from loom.bus.client import Bus
from loom.schemas.errors import LoomError
from loom.schemas.events import Progress, ToolCallEnd, ToolCallStart
from loom.schemas.run import RunEvent, RunKind, RunRequest
from loom.schemas.task import RunResult, TaskAd, TaskResult
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
        self.seated = asyncio.Event()
        """Whether it has its slot back after it waited for others."""
        self.others = RunResult()
        """What others have spent on its behalf."""
        self._bus = bus
        self._inbox = inbox
        self._n = 0
        self._kept: deque[RunEvent] = deque(maxlen=HISTORY)
        self._waits: dict[str, RunEvent] = {}
        """Delegated task -> the event that told of it; kept however much is said meanwhile."""
        self._answers: dict[str, asyncio.Future[TaskResult]] = {}
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
        if event.ad is not None:
            self._waits[event.ad.task_id] = event
        elif kind != "heartbeat":
            self._kept.append(event)
        if event.final:
            self.last = event
        async with self._sending:
            await send(self._bus, self._inbox, event)

    async def progress(self, event: Progress) -> None:
        """Send what the agent says on its way."""
        await self.say("tool_call" if isinstance(event, ToolCallStart | ToolCallEnd) else "delta", event=event)

    async def ask(self, ad: TaskAd) -> TaskResult:
        """Have others do `ad` and return how it ended; who watches is told when nobody waits for it any more."""
        answer: asyncio.Future[TaskResult] = asyncio.get_running_loop().create_future()
        self._answers[ad.task_id] = answer
        try:
            await self.say("waiting", ad=ad)
            return await answer
        finally:
            del self._answers[ad.task_id]
            self._waits.pop(ad.task_id, None)
            await self.say("resumed", task_id=ad.task_id)

    def answer(self, results: Iterable[TaskResult]) -> None:
        """Hand over what came of delegated work; what has been handed over before, or nobody awaits, is left out."""
        for result in results:
            answer = self._answers.get(result.task_id)
            if answer is not None and not answer.done():
                answer.set_result(result)

    def charge(self, result: TaskResult) -> None:
        """Count what delegated work has spent."""
        self.others = replace(
            self.others,
            prompt_tokens=self.others.prompt_tokens + result.prompt_tokens,
            completion_tokens=self.others.completion_tokens + result.completion_tokens,
        )

    def charged(self, result: RunResult | None) -> RunResult | None:
        """Return what the run itself has produced and spent together with what others have spent on its behalf."""
        if not self.others.tokens:
            return result
        own = result or RunResult()
        return replace(
            own,
            prompt_tokens=own.prompt_tokens + self.others.prompt_tokens,
            completion_tokens=own.completion_tokens + self.others.completion_tokens,
        )

    async def move(self, inbox: str, from_n: int) -> None:
        """Send all events from number `from_n` on to `inbox`, and every later one; the old inbox is told."""
        async with self._sending:
            if inbox != self._inbox:
                await send(self._bus, self._inbox, RunEvent(n=self._n, kind="moved"))
                self._inbox = inbox
            kept = sorted([*self._kept, *self._waits.values()], key=lambda event: event.n)
            for event in [event for event in kept if event.n >= from_n or event.kind == "accepted"]:
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
