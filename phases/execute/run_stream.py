"""The event stream of one run on a host: the request, its events in order, and the time limits on silence."""

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
from loom.bus.logs.discard_reports import as_reason
from loom.bus.logs.logger import get_logger
from loom.bus.natsio.transport.message import Msg
from loom.phases.execute.run_inbox import EventSubjects, count_discarded
from loom.phases.execute.stops import HostRun, Stops
from loom.phases.execute.timings import ExecuteTimings
from loom.schemas.base import Undecodable, total
from loom.schemas.errors import LoomError
from loom.schemas.events import Progress, TextDelta
from loom.schemas.run import Delegated, Delta, RunEvent, RunRequest, read_events
from loom.schemas.task import TaskError, TaskResult

log = get_logger()

GAP_REQUESTS = 3
"""Requests for missing events after which the run continues without them."""
MAX_OUT_OF_ORDER = 1024
"""Events kept while earlier ones are missing, at most."""
CATCH_UP_S = 5.0
LATE_EVENT_S = 600.0
"""Seconds for which a silent run's last event is awaited, to be discarded and counted. A host keeps it as long."""
MAX_RUN_BYTES = 16 * 2**20
MAX_RUN_EVENTS = 100_000
"""Limits of what a run may send; exceeding one ends it."""
YIELD_EVERY = 64
"""Events in a row after which the event loop runs other tasks."""
TOO_MANY = TaskError(
    code="agent_failed",
    message=f"too many events: a run may send {MAX_RUN_EVENTS:,} of them and {MAX_RUN_BYTES // 2**20} MiB",
)

Reason = Literal["cancelled", "recalled", "late"]


class HostSilent(Exception):
    """The host has not sent an event in time."""


def no_waiter() -> None:
    """Do nothing: the `wake` of an interrupt that no stream waits on."""


@dataclass(frozen=True)
class Hosts:
    """The parts by which EXECUTE communicates with node hosts: the bus, event subjects, stops and waits."""

    bus: Bus
    events: EventSubjects
    stops: Stops
    timings: ExecuteTimings = ExecuteTimings()


class Interrupt:
    """Ends the handling of a run from outside. The first of a cancel, a recall and the deadline is the reason."""

    def __init__(self) -> None:
        self.reason: Reason | None = None
        self.wake: Callable[[], None] = no_waiter
        """Ends a wait for an event."""

    def cancelled(self) -> bool:
        """Return whether the task was cancelled."""
        return self.reason == "cancelled"

    @property
    def ends_attempt(self) -> bool:
        """Whether the run's result is not needed any more, in any process."""
        return self.reason in ("cancelled", "late")

    def set(self, reason: Reason) -> None:
        """Set the reason, unless one is set, and end the wait for an event."""
        if self.reason is None:
            self.reason = reason
            self.wake()


class RunStream:
    """Requests a run from a host and returns its events in order.

    A context manager: entering publishes the request. Each stream has its own event subject. Leaving closes the
    subject, unless the run is given up: then it stays open for the run's last event.

    Args:
        hosts: The connections to node hosts.
        host: The host that the run was awarded to.
        request: The run request.
        interrupt: Ends `next` early.
        attached: Whether the run may already be in progress. Its host then has three heartbeats' time to answer.
    """

    def __init__(
        self, hosts: Hosts, host: HostKey, request: RunRequest, interrupt: Interrupt, *, attached: bool = False
    ) -> None:
        self._hosts = hosts
        self._bus = hosts.bus
        self._timings = hosts.timings
        self._silence_s = hosts.timings.silence_s
        self._host = host
        self._request = request
        self._interrupt = interrupt
        self._until = time.monotonic() + request.remaining_s
        self._events: deque[RunEvent] = deque()
        self._waiting: asyncio.Future[None] | None = None
        self._subject = ""
        """Subject on which the run's events arrive."""
        self._next_seq = request.from_seq
        self._bytes = self._count = 0
        """Bytes and events received, in all."""
        self._chars = 0
        """Characters of text in the deltas so far."""
        self._out_of_order: dict[int, RunEvent] = {}
        """Number -> event that arrived while earlier ones were missing."""
        self._gap_requests = 0
        """Requests for the events from `_next_seq` on."""
        self._gap_requested_at = 0.0
        self._attached = attached
        self._in_a_row = 0
        """Events returned without a wait between them."""
        self._given_up = False
        self._requests = 0
        """Requests sent. Events may repeat only after a second request."""
        self._ended = False
        """Whether the last event has arrived."""
        self._last_discard = ""
        """Reason for the newest discarded event."""
        self._absent_since: float | None = None
        self.has_events = False
        """Whether an event of the host has been returned."""

    async def __aenter__(self) -> Self:
        self._subject = self._hosts.events.open(self._host, self._on_message)
        self._interrupt.wake = self._wake
        await self._send_request()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._interrupt.wake = no_waiter  # stream and interrupt would be a reference cycle
        if self._ended or not (isinstance(error, HostSilent) or self._interrupt.ends_attempt):
            self._close()
            return
        self._given_up = True
        keep_s = self._hosts.stops.last_event_wait_s
        if isinstance(error, HostSilent):
            keep_s = min(LATE_EVENT_S, self._request.remaining_s)
        asyncio.get_running_loop().call_later(keep_s, self._close)

    def _close(self) -> None:
        # A run that was requested twice may repeat its end, and a run that continues elsewhere may still send events.
        self._hosts.events.close(self._subject, expect_more=not self._ended or self._requests > 1)

    async def _send_request(self, **facts: Any) -> None:
        self._requests += 1
        left_s = max(0.0, self._until - time.monotonic())
        request = replace(self._request, remaining_s=left_s, sent_at=self._bus.clock.now(), **facts)
        subject = self._bus.subjects.of("run", self._host.owner, self._host.host_id)
        await self._bus.connection.publish(subject, request, reply=self._subject)

    async def send_answer(self, delegated: Delegated, answer: TaskResult | None = None) -> None:
        """Send the run the id of a delegated task and, once it has ended, its result.

        The message is the same run request, for the events from the next one on.
        """
        answers = () if answer is None else (answer,)
        await self._send_request(from_seq=self._next_seq, delegated=(delegated,), answers=answers)

    async def next(self) -> RunEvent | None:
        """Return the next event, each once and in order; None after an interrupt.

        Raises:
            HostSilent: The host is absent, sent no `accepted` in time, or missed three heartbeats.
        """
        while True:
            if not self._events:
                silence_s = self._silence_s
                await (self._wait_for_event(silence_s, silence_s) if self.has_events else self._wait_for_first())
            if self._interrupt.reason is not None and not self._events:
                return None
            event = self._events.popleft()
            self.has_events = True
            self._in_a_row = 0 if not self._events else self._in_a_row + 1
            if self._in_a_row == YIELD_EVERY:
                self._in_a_row = 0
                await asyncio.sleep(0)
            if event.final or event.seq == self._next_seq:
                self._advance(event.seq + 1)
                return event
            if event.seq > self._next_seq:
                await self._request_missing(event)
                if event.kind == "heartbeat":
                    return event
            elif event.kind != "heartbeat" and self._requests == 1 and not self._request.from_seq:
                self._discard(f"number {event.seq} came again: each event of a run takes the next number")

    def delta(self, seq: int, event: Progress) -> Delta:
        """Return the delta for an event, and count its text."""
        at = self._chars
        if isinstance(event, TextDelta):
            self._chars = total(at, len(event.text))
        return Delta(task_id=self._request.task_id, attempt=self._request.attempt, seq=seq, at=at, event=event)

    def _advance(self, next_seq: int) -> None:
        self._next_seq, self._gap_requests = next_seq, 0
        if next_seq in self._out_of_order:
            self._events.appendleft(self._out_of_order.pop(next_seq))

    async def _request_missing(self, event: RunEvent) -> None:
        """Request the events that are missing before this one; after three requests the run continues without them.

        A host publishes kept events in order. So a second copy of an out-of-order event means that the missing ones
        will not arrive.
        """
        heartbeat = event.kind == "heartbeat"  # a host does not keep heartbeats: a lost one leaves a permanent gap
        complete = event.seq in self._out_of_order or len(self._out_of_order) >= MAX_OUT_OF_ORDER
        if not heartbeat:
            self._out_of_order[event.seq] = event
        late = heartbeat and time.monotonic() - self._gap_requested_at >= self._timings.repeat_request_s
        if not self._gap_requests or (late and self._gap_requests < GAP_REQUESTS):
            self._gap_requests, self._gap_requested_at = self._gap_requests + 1, time.monotonic()
            await self._send_request(from_seq=self._next_seq)
        elif complete or late:
            next_seq = min(self._out_of_order, default=event.seq + 1)
            log.info(
                "run_events_missing",
                host_id=str(self._host),
                task_id=self._request.task_id,
                seq=self._next_seq,
                until=next_seq,
            )
            self._advance(next_seq)

    async def _wait_for_event(self, wait_s: float, limit_s: float) -> None:
        """Wait up to `wait_s` for an event, the last part of the `limit_s` that the host has."""
        await self._wait(wait_s)
        if not self._is_ready:
            with suppress(TimeoutError, LoomError):  # this process may be late: events that have arrived by now count
                await self._bus.requests.flush(timeout_s=CATCH_UP_S)
        if not self._is_ready:
            discarded = f"; an event of it was left out: {self._last_discard}" if self._last_discard else ""
            raise HostSilent(f"host {self._host} was silent for {limit_s:g} s{discarded}")

    async def _wait_for_first(self) -> None:
        """Repeat the request until an event arrives: a host that reconnects late after an outage misses the first."""
        times = self._timings
        wait_s, patience_s = times.accept_s, times.absent_s
        if self._attached:
            wait_s, patience_s = self._silence_s, times.accept_s
        give_up = time.monotonic() + wait_s
        while not self._is_ready:
            if self._absent_s >= patience_s:
                raise HostSilent(f"host {self._host} is not connected")
            left_s = give_up - time.monotonic()
            if left_s <= times.repeat_request_s:
                await self._wait_for_event(max(0.0, left_s), wait_s)
                return
            await self._wait(times.repeat_request_s)  # the server's no-responders reply ends this wait early
            if self._absent_since is not None:
                await self._wait(times.repeat_absent_s)
            if not self._is_ready:
                await self._send_request()

    @property
    def _is_ready(self) -> bool:
        """Whether an event or an interrupt has arrived."""
        return bool(self._events) or self._interrupt.reason is not None

    async def _wait(self, seconds: float) -> None:
        """Wait up to `seconds` for an event or an interrupt."""
        if self._is_ready:
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
        """Seconds since the server first reported no subscriber."""
        return 0.0 if self._absent_since is None else time.monotonic() - self._absent_since

    def reattach(self) -> "RunStream":
        """Close this stream and return one for the events after it: a host keeps events, and starts no run twice."""
        self._close()
        left_s = max(0.0, self._until - time.monotonic())
        request = replace(self._request, from_seq=self._next_seq, remaining_s=left_s)
        stream = RunStream(self._hosts, self._host, request, self._interrupt)
        stream._bytes, stream._count, stream._chars = self._bytes, self._count, self._chars
        stream._last_discard = self._last_discard
        return stream

    def _discard(self, reason: str) -> None:
        self._last_discard = as_reason(reason)
        self._count_discarded("run_event_left_out", reason)

    def _count_discarded(self, event: str, reason: str, **facts: Any) -> None:
        facts = {"task_id": self._request.task_id, "attempt": self._request.attempt, **facts}
        count_discarded(self._bus, self._host, event, reason, **facts)

    def _through_last(self, events: tuple[RunEvent, ...]) -> tuple[RunEvent, ...]:
        """Return the events up to the first final one of the run, and discard those after it."""
        end = 0 if self._ended else next((number for number, event in enumerate(events, 1) if event.final), None)
        if end is None:
            return events
        self._ended = True
        late = [event.kind for event in events[end:] if event.kind != "heartbeat"]
        if late and self._requests == 1:
            self._discard(f"{late[0]} after the last event: the first result, error or rejection ends the run")
        return events[:end]

    def _on_message(self, msg: Msg) -> None:
        if msg.status == "503":
            if self._absent_since is None:
                self._absent_since = time.monotonic()
            if not self.has_events:
                self._wake()
            return
        self._absent_since = None
        events: tuple[RunEvent, ...] = ()
        try:
            events = self._through_last(read_events(msg.data, self._discard))
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
            return  # an empty array still counts as a sign of life
        if not self._given_up:
            self._events.extend(events)
            self._wake()
        elif events[-1].final:
            self._on_late_end(events[-1])

    def _on_late_end(self, last: RunEvent) -> None:
        """Process the last event of a run that was given up: it confirms a stop, or is too late and discarded."""
        self._close()
        request = self._request
        self._hosts.stops.cancel(HostRun(self._host, request.task_id, request.attempt))
        stopped = self._interrupt.ends_attempt or (last.error is not None and last.error.code == "cancelled")
        if not stopped:
            why = "the run was given up before its last event came"
            self._count_discarded("late_run_refused", why, kind=last.kind)
