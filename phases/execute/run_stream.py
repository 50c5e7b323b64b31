"""One run as EXECUTE follows it: the request, its events in order, and the silence between them."""

import asyncio
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, Self

from msgspec.structs import replace

from loom.bus.bus import Bus
from loom.bus.host_directory import HostKey
from loom.bus.logs.left_out import as_reason
from loom.bus.logs.logger import get_logger
from loom.bus.natsio.transport.message import Msg
from loom.phases.execute.run_inbox import EventSubjects, count_discarded
from loom.phases.execute.stops import STOP_AGAIN_S, STOPS, HostRun, Stops
from loom.schemas.base import Undecodable, total
from loom.schemas.errors import LoomError
from loom.schemas.events import Progress, TextDelta
from loom.schemas.run import Delegated, Delta, RunEvent, RunRequest, read_events
from loom.schemas.task import TaskError, TaskResult

log = get_logger()

ABSENT_S = 1.0  # nobody listens: a host may be a little later than we are to come back after an outage
ACCEPT_S = 3.0  # it may be busy; on a machine at its limit hundreds answered later than after one
ASK_AGAIN_S = 1.0
"""Silence after which a request is repeated: a host that takes long to answer must not get it many times."""
ABSENT_AGAIN_S = 0.3
"""The same while the server knows of no host that would get it."""
GAP_ASKS = 3
"""Requests for missing events after which the run goes on without them."""
HELD = 1024
"""Events kept while others before them are missing."""
CATCH_UP_S = 5.0
HEARTBEAT_S = 2.0
SILENCE_S = 3 * HEARTBEAT_S + 0.5  # three heartbeats missed
LATE_S = 600.0
"""For so long the last event of a silent run is waited for, to be refused and counted; a host keeps it for as long."""
STOPPED_S = STOPS * STOP_AGAIN_S + 1
"""For so long the last event of a stopped run is waited for."""
MAX_RUN_BYTES = 16 * 2**20
MAX_RUN_EVENTS = 100_000
"""What a run may send; more ends it."""
BREATH = 64
"""Events in a row after which the other runs of the process have their turn."""
TOO_MANY = TaskError(
    code="agent_failed",
    message=f"too many events: a run may send {MAX_RUN_EVENTS:,} of them and {MAX_RUN_BYTES // 2**20} MiB",
)

Reason = Literal["cancelled", "recalled", "late"]


class HostSilent(Exception):
    """The host has not been heard from in time."""


def nobody_waits() -> None:
    """Wake nobody."""


@dataclass(frozen=True)
class Hosts:
    """The means by which EXECUTE reaches node hosts."""

    bus: Bus
    events: EventSubjects
    stops: Stops


class Interrupt:
    """What ends the watching of a run from outside: the first of a cancel, a recall and the deadline."""

    def __init__(self) -> None:
        self.reason: Reason | None = None
        self.wake: Callable[[], None] = nobody_waits
        """Ends the wait for an event that is going on."""

    def cancelled(self) -> bool:
        """Whether the task was cancelled."""
        return self.reason == "cancelled"

    @property
    def ends_attempt(self) -> bool:
        """Whether the run's result is not wanted any more, here or elsewhere."""
        return self.reason in ("cancelled", "late")

    def set(self, reason: Reason) -> None:
        """Have the run watched no further."""
        if self.reason is None:
            self.reason = reason
            self.wake()


class RunStream:
    """The events of a run on a host.

    Use as a context manager: the request is sent on entering. Each watching has an event subject of its own. It is
    closed on leaving, unless the run is given up: then it stays open for the run's last event.

    Args:
        host: The host that the run was awarded to.
        interrupt: Ends `next` early.
        attached: Whether the run may be going on already. Then its host has the time of three heartbeats to answer.
    """

    def __init__(
        self, hosts: Hosts, host: HostKey, request: RunRequest, interrupt: Interrupt, *, attached: bool = False
    ) -> None:
        self._hosts = hosts
        self._bus = hosts.bus
        self._host = host
        self._request = request
        self._interrupt = interrupt
        self._until = time.monotonic() + request.remaining_s
        self._events: deque[RunEvent] = deque()
        self._waiting: asyncio.Future[None] | None = None
        self._subject = ""
        """Where the run's events arrive."""
        self._next_seq = request.from_seq
        self._bytes = self._count = 0
        """Of all events received."""
        self._chars = 0
        """Of text in deltas."""
        self._held: dict[int, RunEvent] = {}
        """Number -> event that came while others before it were missing."""
        self._gap_asks = 0
        """How often the events from `_next_seq` on were asked for."""
        self._gap_asked_at = 0.0
        self._attached = attached
        self._in_a_row = 0
        """Events handed on without a wait between them."""
        self._given_up = False
        self._asked = 0
        """Requests sent. Only what was asked for again may come again."""
        self._ended = False
        """Whether the last event has come."""
        self._unread = ""
        """Why the newest event that was left out was."""
        self._absent_since: float | None = None
        self.heard = False
        """Whether the host has said anything."""

    async def __aenter__(self) -> Self:
        self._subject = self._hosts.events.open(self._host, self._take)
        self._interrupt.wake = self._wake
        await self._ask()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._interrupt.wake = nobody_waits  # each would keep the other until a collection
        if self._ended or not (isinstance(error, HostSilent) or self._interrupt.ends_attempt):
            self._close()
            return
        self._given_up = True
        keep_s = min(LATE_S, self._request.remaining_s) if isinstance(error, HostSilent) else STOPPED_S
        asyncio.get_running_loop().call_later(keep_s, self._close)

    def _close(self) -> None:
        # A run asked for twice may repeat its end, and a run that goes on elsewhere is not to blame for its events.
        self._hosts.events.close(self._subject, expect_more=not self._ended or self._asked > 1)

    async def _ask(self, **facts: Any) -> None:
        self._asked += 1
        left_s = max(0.0, self._until - time.monotonic())
        request = replace(self._request, remaining_s=left_s, sent_at=self._bus.clock.now(), **facts)
        subject = self._bus.subjects.of("run", self._host.owner, self._host.host_id)
        await self._bus.connection.publish(subject, request, reply=self._subject)

    async def hand(self, delegated: Delegated, answer: TaskResult | None = None) -> None:
        """Send the run the id of delegated work, and how it ended: the same request, from the next event on."""
        answers = () if answer is None else (answer,)
        await self._ask(from_seq=self._next_seq, delegated=(delegated,), answers=answers)

    async def next(self) -> RunEvent | None:
        """Return the next event, each once and in order; None when the watching is stopped.

        Raises:
            Silent: Nobody is there, no `accepted` came in time, or three heartbeats were missed.
        """
        while True:
            if not self._events:
                await (self._hear(SILENCE_S, SILENCE_S) if self.heard else self._hear_first())
            if self._interrupt.reason is not None and not self._events:
                return None
            event = self._events.popleft()
            self.heard = True
            self._in_a_row = 0 if not self._events else self._in_a_row + 1
            if self._in_a_row == BREATH:
                self._in_a_row = 0
                await asyncio.sleep(0)
            if event.final or event.seq == self._next_seq:
                self._advance(event.seq + 1)
                return event
            if event.seq > self._next_seq:
                await self._miss(event)
                if event.kind == "heartbeat":
                    return event
            elif event.kind != "heartbeat" and self._asked == 1 and not self._request.from_seq:
                self._discard(f"its number {event.seq} came again: each event of a run takes the next one")

    def delta(self, seq: int, event: Progress) -> Delta:
        """Return the delta of the next piece of progress, and count its text."""
        at = self._chars
        if isinstance(event, TextDelta):
            self._chars = total(at, len(event.text))
        return Delta(task_id=self._request.task_id, attempt=self._request.attempt, seq=seq, at=at, event=event)

    def _advance(self, next_seq: int) -> None:
        self._next_seq, self._gap_asks = next_seq, 0
        if next_seq in self._held:
            self._events.appendleft(self._held.pop(next_seq))

    async def _miss(self, event: RunEvent) -> None:
        """Ask for the events that are missing before this one; without them the run goes on in the end.

        A host publishes what it has kept in order, so a second copy of a held event means that no more will come.
        """
        heartbeat = event.kind == "heartbeat"  # these are not kept by a host: a lost one leaves a gap for good
        complete = event.seq in self._held or len(self._held) >= HELD
        if not heartbeat:
            self._held[event.seq] = event
        late = heartbeat and time.monotonic() - self._gap_asked_at >= ASK_AGAIN_S
        if not self._gap_asks or (late and self._gap_asks < GAP_ASKS):
            self._gap_asks, self._gap_asked_at = self._gap_asks + 1, time.monotonic()
            await self._ask(from_seq=self._next_seq)
        elif complete or late:
            found = min(self._held, default=event.seq + 1)
            log.info(
                "run_events_missing",
                host_id=str(self._host),
                task_id=self._request.task_id,
                seq=self._next_seq,
                until=found,
            )
            self._advance(found)

    async def _hear(self, wait_s: float, limit_s: float) -> None:
        """Wait until there is an event, for what is left of the time a host has."""
        await self._wait(wait_s)
        if not self._here:
            with suppress(TimeoutError, LoomError):  # it may be us who are late: what has come by now counts
                await self._bus.requests.flush(timeout_s=CATCH_UP_S)
        if not self._here:
            left_out = f"; an event of it was left out: {self._unread}" if self._unread else ""
            raise HostSilent(f"host {self._host} was silent for {limit_s:g} s{left_out}")

    async def _hear_first(self) -> None:
        """Ask until something is heard: after an outage a host may be back later than we are, and miss the request."""
        wait_s, patience_s = (SILENCE_S, ACCEPT_S) if self._attached else (ACCEPT_S, ABSENT_S)
        give_up = time.monotonic() + wait_s
        while not self._here:
            if self._absent_s >= patience_s:
                raise HostSilent(f"host {self._host} is not there")
            left_s = give_up - time.monotonic()
            if left_s <= ASK_AGAIN_S:
                await self._hear(max(0.0, left_s), wait_s)
                return
            await self._wait(ASK_AGAIN_S)  # the server's answer that there is no host ends it early
            if self._absent_since is not None:
                await self._wait(ABSENT_AGAIN_S)
            if not self._here:
                await self._ask()

    @property
    def _here(self) -> bool:
        """Whether there is something to act on."""
        return bool(self._events) or self._interrupt.reason is not None

    async def _wait(self, seconds: float) -> None:
        """Wait for an event or a stop."""
        if self._here:
            return
        loop = asyncio.get_running_loop()
        self._waiting = loop.create_future()
        timer = loop.call_later(seconds, self._wake)
        try:
            await self._waiting
        finally:
            timer.cancel()

    def _wake(self) -> None:
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(None)

    @property
    def _absent_s(self) -> float:
        """For how long the server has known of nobody who listens."""
        return 0.0 if self._absent_since is None else time.monotonic() - self._absent_since

    def again(self) -> "RunStream":
        """Return a watch for what this one has missed: the host keeps events, and starts no run twice."""
        self._close()
        left_s = max(0.0, self._until - time.monotonic())
        request = replace(self._request, from_seq=self._next_seq, remaining_s=left_s)
        watch = RunStream(self._hosts, self._host, request, self._interrupt)
        watch._bytes, watch._count, watch._chars = self._bytes, self._count, self._chars
        watch._unread = self._unread
        return watch

    def _discard(self, reason: str) -> None:
        self._unread = as_reason(reason)
        self._count_discarded("run_event_left_out", reason)

    def _count_discarded(self, event: str, reason: str, **facts: Any) -> None:
        facts = {"task_id": self._request.task_id, "attempt": self._request.attempt, **facts}
        count_discarded(self._bus, self._host, event, reason, **facts)

    def _until_the_end(self, events: tuple[RunEvent, ...]) -> tuple[RunEvent, ...]:
        """The events up to the first final one of the run; what comes after it is left out."""
        end = 0 if self._ended else next((at for at, event in enumerate(events, 1) if event.final), None)
        if end is None:
            return events
        self._ended = True
        late = [event.kind for event in events[end:] if event.kind != "heartbeat"]
        if late and self._asked == 1:
            self._discard(f"{late[0]} after the last event: the first result, error or rejection ends the run")
        return events[:end]

    def _take(self, msg: Msg) -> None:
        if msg.status == "503":
            if self._absent_since is None:
                self._absent_since = time.monotonic()
            if not self.heard:
                self._wake()
            return
        self._absent_since = None
        events: tuple[RunEvent, ...] = ()
        try:
            events = self._until_the_end(read_events(msg.data, self._discard))
        except Undecodable as error:
            self._discard(error.message)
        if not self._given_up:
            self._bytes += len(msg.data)
            self._count += max(1, len(events))
            if self._bytes > MAX_RUN_BYTES or self._count > MAX_RUN_EVENTS:
                self._hosts.events.close(self._subject)
                self._events.clear()
                events = (RunEvent(seq=self._next_seq, kind="error", error=TOO_MANY),)
        if not events:
            return  # an empty array is a sign of life without an event
        if not self._given_up:
            self._events.extend(events)
            self._wake()
        elif events[-1].final:
            self._end_late(events[-1])

    def _end_late(self, last: RunEvent) -> None:
        """Take the last event of a run that was given up: it answers the stop, or comes too late."""
        self._close()
        request = self._request
        self._hosts.stops.ended(HostRun(self._host, request.task_id, request.attempt))
        stopped = self._interrupt.ends_attempt or (last.error is not None and last.error.code == "cancelled")
        if not stopped:
            why = "the run was given up before its last event came"
            self._count_discarded("late_run_refused", why, kind=last.kind)
