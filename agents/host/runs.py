"""One run on a host: its events, numbered and kept, and the subject they are published on."""

import asyncio
import time
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from msgspec.structs import replace

from loom.agents.abandonable import Abandonable
from loom.agents.job import MAX_USD
from loom.bus.bus import Bus
from loom.bus.logs.logger import get_logger
from loom.schemas.base import encode, total
from loom.schemas.errors import LoomError
from loom.schemas.events import Progress, ToolCallEnd, ToolCallStart
from loom.schemas.run import FINAL_KINDS, RunEvent, RunKind, RunRequest, encode_event
from loom.schemas.task import RunResult, TaskAd, TaskResult

log = get_logger()

HISTORY = 1024
"""Events of a live run kept for whoever re-attaches."""
BATCH_BYTES = 64 * 1024
"""Most of several events in one message, and how far an agent may be ahead of its connection; larger ones go alone."""
PATIENCE_S = 3.0
"""Age of a request from which no run is begun for it: EXECUTE repeats it each second for as long as it waits."""
REMEMBER_STOP_S = 60.0
STOPS = 10_000
KEEP_S = 600.0
KEEP_BYTES = 32 * 1024 * 1024

Key = tuple[str, int]


class Run:
    """A run in hand, queued or working."""

    def __init__(self, bus: Bus, request: RunRequest, subject: str) -> None:
        self.request = request
        self.work: asyncio.Task[None] | None = None
        """None while it is queued."""
        self.agent: Abandonable[Any] | None = None
        """The user's code, once it has begun."""
        self.last: bytes | None = None
        """The final event as it was sent, once there is one."""
        self.seated = asyncio.Event()
        """Whether it has its slot back after it waited for others."""
        self.others = RunResult()
        """What others have spent on its behalf."""
        self._bus = bus
        self._subject = subject
        self._seq = 0
        self._batch: list[bytes] = []
        """Events said and not sent."""
        self._batch_bytes = 0
        self._ahead_bytes = 0
        """Said since the agent last waited for the connection."""
        self._kept: deque[tuple[int, bytes]] = deque(maxlen=HISTORY)
        self._waits: dict[str, tuple[int, bytes]] = {}
        """Delegated task -> the event that told of it; kept however much is said meanwhile."""
        self._resumed: deque[tuple[int, bytes]] = deque(maxlen=HISTORY)
        """Events that end a wait; no amount of progress pushes them out."""
        self._first: tuple[int, bytes] | None = None
        self._answers: dict[str, asyncio.Future[TaskResult]] = {}
        deadline = request.deadline
        left_s = request.remaining_s if deadline is None or not bus.clock.measured else deadline - bus.clock.now()
        self._until = time.monotonic() + min(request.remaining_s, left_s)

    @property
    def key(self) -> Key:
        """What makes two requests the same run."""
        return (self.request.task_id, self.request.attempt)

    @property
    def subject(self) -> str:
        """The event subject of the EXECUTE that watches it."""
        return self._subject

    @property
    def left_s(self) -> float:
        """Seconds to the task's deadline; waiting in the backlog counts."""
        return max(0.0, self._until - time.monotonic())

    def say(self, kind: RunKind, **facts: Any) -> None:
        """Say the next event: it is sent with all that is said in this turn of the event loop and the next.

        A final one is sent at once and ends the run: nothing is said after it.
        """
        if self.last is not None:
            return
        seq, event = self._seq, encode_event(RunEvent(seq=self._seq, kind=kind, **facts))
        self._seq += 1
        if seq == 0:
            self._first = (seq, event)
        elif kind == "waiting":
            self._waits[facts["ad"].task_id] = (seq, event)
        elif kind == "resumed":
            self._resumed.append((seq, event))
        elif kind != "heartbeat":
            self._kept.append((seq, event))
        self._ahead_bytes += len(event)
        self._add(event)
        if kind in FINAL_KINDS:
            self.last = event
            self.flush()

    def _add(self, event: bytes) -> None:
        if self._batch_bytes + len(event) > BATCH_BYTES:
            self.flush()
        if not self._batch:
            loop = asyncio.get_running_loop()
            loop.call_soon(loop.call_soon, self.flush)  # a turn later: what begins in this one may say more
        self._batch.append(event)
        self._batch_bytes += len(event)

    def flush(self) -> None:
        """Send what has been said and is not sent yet."""
        if self._batch:
            send(self._bus, self._subject, self._packed())

    def _packed(self) -> bytes:
        """Take what has been said as the body of one message."""
        batch, self._batch, self._batch_bytes = self._batch, [], 0
        return batch[0] if len(batch) == 1 else b"[" + b",".join(batch) + b"]"

    async def progress(self, event: Progress) -> None:
        """Say what the agent says on its way; one that says much waits until the connection takes more."""
        self.say("tool_call" if isinstance(event, (ToolCallStart, ToolCallEnd)) else "delta", event=event)
        if self._ahead_bytes >= BATCH_BYTES and self._batch:
            self._ahead_bytes = 0
            with lost_aloud(self._bus):
                await self._bus.connection.publish(self._subject, self._packed())
            await asyncio.sleep(0)  # the connection writes between turns, and an agent may never wait by itself

    async def ask(self, ad: TaskAd, call: int) -> TaskResult:
        """Have others do `ad`, the run's `call`-th delegation, and return how it ended; `resumed` ends the wait."""
        answer: asyncio.Future[TaskResult] = asyncio.get_running_loop().create_future()
        self._answers[ad.task_id] = answer
        try:
            self.say("waiting", ad=ad, call=call)
            return await answer
        finally:
            del self._answers[ad.task_id]
            self._waits.pop(ad.task_id, None)
            self.say("resumed", task_id=ad.task_id)

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
            prompt_tokens=total(self.others.prompt_tokens, result.prompt_tokens),
            completion_tokens=total(self.others.completion_tokens, result.completion_tokens),
            usd=min(MAX_USD, self.others.usd + result.usd),
        )

    def charged(self, result: RunResult | None) -> RunResult | None:
        """Return what the run itself has produced and spent together with what others have spent on its behalf."""
        if not self.others.tokens and not self.others.usd:
            return result
        own = result or RunResult()
        return replace(
            own,
            prompt_tokens=total(own.prompt_tokens, self.others.prompt_tokens),
            completion_tokens=total(own.completion_tokens, self.others.completion_tokens),
            usd=min(MAX_USD, own.usd + self.others.usd),
        )

    def move(self, subject: str, from_seq: int) -> None:
        """Send all events from number `from_seq` on to `subject`, and every later one; the old one gets `moved`."""
        self.flush()
        if subject != self._subject:
            send(self._bus, self._subject, encode(RunEvent(seq=self._seq, kind="moved")))
            self._subject = subject
        if self._first is not None:
            self._add(self._first[1])  # always: it marks the answer to a request
        for seq, event in sorted([*self._kept, *self._resumed, *self._waits.values()]):
            if seq >= from_seq:
                self._add(event)
        self.flush()


def send(bus: Bus, subject: str, body: bytes) -> None:
    """Send an event, or several as an array."""
    with lost_aloud(bus):
        bus.connection.publish_nowait(subject, body)


@contextmanager
def lost_aloud(bus: Bus) -> Iterator[None]:
    """Log what cannot be sent: it is missed by its number or by the watcher's patience."""
    try:
        yield
    except LoomError as error:
        if not bus.connection.closing:
            log.warning("run_event_lost", reason=error.message)


class FinishedRuns:
    """Last events of runs that have ended, kept for ten minutes and at most 32 MiB."""

    def __init__(self) -> None:
        self._kept: OrderedDict[Key, tuple[float, bytes]] = OrderedDict()
        self._bytes = 0

    def keep(self, key: Key, event: bytes, now: float) -> None:
        """Remember how a run ended, at monotonic time `now`."""
        self._drop(key)
        self._kept[key] = (now, event)
        self._bytes += len(event)
        while self._kept:
            oldest, (at, _) = next(iter(self._kept.items()))
            if now - at <= KEEP_S and self._bytes <= KEEP_BYTES:
                return
            self._drop(oldest)

    def get(self, key: Key) -> bytes | None:
        """Return the last event of a run, if it is still known."""
        entry = self._kept.get(key)
        return entry[1] if entry else None

    def _drop(self, key: Key) -> None:
        entry = self._kept.pop(key, None)
        if entry is not None:
            self._bytes -= len(entry[1])


class Stopped:
    """Attempts stopped in the last minute, at most 10,000: their run requests may still be on the way."""

    def __init__(self) -> None:
        self._at: OrderedDict[Key, float] = OrderedDict()

    def add(self, key: Key, now: float) -> None:
        """Remember an attempt stopped at monotonic time `now`."""
        self._at.pop(key, None)
        self._at[key] = now
        while now - next(iter(self._at.values())) > REMEMBER_STOP_S or len(self._at) > STOPS:
            self._at.popitem(last=False)

    def __contains__(self, key: Key) -> bool:
        return key in self._at


def stale(request: RunRequest, bus: Bus) -> str | None:
    """Return why a request is not the occasion to begin a run; None where it is, or the server's time is not known."""
    if not bus.clock.measured:
        return None
    now = bus.clock.now()
    if request.deadline is not None and now >= request.deadline:
        return "its deadline has passed"
    if request.sent_at is not None and now - request.sent_at > PATIENCE_S:
        return f"it was sent {now - request.sent_at:.1f} s ago"
    return None
