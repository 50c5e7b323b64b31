"""A run on a host: its numbered events, and the subject they are published on."""

import asyncio
import time
from collections import deque
from collections.abc import Iterable
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
"""Events of an active run that are kept for a watcher that reattaches."""
BATCH_BYTES = 64 * 1024
"""Maximum size of several events in one message; a larger event is sent alone.

It also limits how far an agent may run ahead of its connection.
"""
PATIENCE_S = 3.0
"""Age of a request beyond which no run is started for it: EXECUTE repeats the request every second while it waits."""

NO_USAGE = RunResult()
"""Usage of a run that has delegated nothing."""

RunKey = tuple[str, int]
"""Task id and attempt."""


class Run:
    """A queued or working run: emits its events and awaits its delegated tasks.

    Args:
        subject: Event subject of the EXECUTE that watches the run.
    """

    def __init__(self, bus: Bus, request: RunRequest, subject: str) -> None:
        self.request = request
        self.work: asyncio.Task[None] | None = None
        """None while the run is queued."""
        self.agent: Abandonable[Any] | None = None
        """The user's code, after it has started."""
        self.final_event: bytes | None = None
        """The encoded last event, after the run has ended."""
        self.has_slot = asyncio.Event()
        """Set when the run has a slot again after it waited for delegated tasks."""
        self.delegated_usage = NO_USAGE
        """Tokens and dollars of delegated tasks."""
        self._bus = bus
        self._subject = subject
        self._seq = 0
        self._batch: list[bytes] = []
        """Events that are not sent yet."""
        self._batch_bytes = 0
        self._flush_is_scheduled = False
        self._bytes_ahead = 0
        """Bytes emitted since the agent last waited for the connection."""
        self._first: tuple[int, bytes] | None = None
        self._history: deque[tuple[int, bytes]] = deque(maxlen=HISTORY)
        self._waiting: dict[str, tuple[int, bytes]] = {}
        """Delegated task id -> its `waiting` event, which is kept until the wait ends."""
        self._resumed: deque[tuple[int, bytes]] = deque(maxlen=HISTORY)
        """`resumed` events; progress events do not displace them."""
        self._results: dict[str, asyncio.Future[TaskResult]] = {}
        deadline = request.deadline
        left_s = request.remaining_s if deadline is None or not bus.clock.measured else deadline - bus.clock.now()
        self._until = time.monotonic() + min(request.remaining_s, left_s)

    @property
    def key(self) -> RunKey:
        """The task id and the attempt: equal for repeated requests of one run."""
        return (self.request.task_id, self.request.attempt)

    @property
    def subject(self) -> str:
        """The event subject of the EXECUTE that watches the run."""
        return self._subject

    @property
    def left_s(self) -> float:
        """Seconds to the task's deadline, 0 or more; time in the backlog counts."""
        return max(0.0, self._until - time.monotonic())

    def emit(self, kind: RunKind, *, at_once: bool = False, **fields: Any) -> None:
        """Emit the next event, batched with all events of this and the next turn of the event loop.

        A final event is sent at once; later events are dropped.

        Args:
            at_once: Whether the event is sent in this turn, with all that are not sent yet.
        """
        if self.final_event is not None:
            return
        seq, event = self._seq, encode_event(RunEvent(seq=self._seq, kind=kind, **fields))
        self._seq += 1
        if seq == 0:
            self._first = (seq, event)
        elif kind == "waiting":
            self._waiting[fields["ad"].task_id] = (seq, event)
        elif kind == "resumed":
            self._resumed.append((seq, event))
        elif kind != "heartbeat":
            self._history.append((seq, event))
        self._bytes_ahead += len(event)
        if kind in FINAL_KINDS:
            self.final_event = event
            at_once = True
        self._append(event)
        if at_once:
            self.flush()
        elif not self._flush_is_scheduled:
            self._flush_is_scheduled = True
            asyncio.get_running_loop().call_soon(self._flush_next_turn)

    def _append(self, event: bytes) -> None:
        if self._batch_bytes + len(event) > BATCH_BYTES:
            self.flush()
        self._batch.append(event)
        self._batch_bytes += len(event)

    def _flush_next_turn(self) -> None:
        """Flush one turn later, because tasks that start in this turn may emit more events."""
        self._flush_is_scheduled = False
        if self._batch:
            asyncio.get_running_loop().call_soon(self.flush)

    def flush(self) -> None:
        """Send all events that are not sent yet."""
        if self._batch:
            publish_events(self._bus, self._subject, self._take_batch())

    def _take_batch(self) -> bytes:
        """Empty the batch and return its events as the body of one message."""
        batch, self._batch, self._batch_bytes = self._batch, [], 0
        return batch[0] if len(batch) == 1 else b"[" + b",".join(batch) + b"]"

    async def emit_progress(self, event: Progress) -> None:
        """Emit an event of the agent; an agent that is 64 KiB ahead waits until the connection accepts more."""
        self.emit("tool_call" if isinstance(event, (ToolCallStart, ToolCallEnd)) else "delta", event=event)
        if self._bytes_ahead >= BATCH_BYTES and self._batch:
            self._bytes_ahead = 0
            try:
                await self._bus.connection.publish(self._subject, self._take_batch())
            except LoomError as error:
                log_lost_events(self._bus, error)
            await asyncio.sleep(0)  # the connection writes between turns, and an agent may never wait by itself

    async def await_delegated(self, ad: TaskAd, call: int) -> TaskResult:
        """Emit `waiting` for a delegated task, return its result when it has ended, and emit `resumed`.

        Args:
            ad: The task to delegate.
            call: Number of this delegation within the run, from 1.
        """
        result: asyncio.Future[TaskResult] = asyncio.get_running_loop().create_future()
        self._results[ad.task_id] = result
        try:
            self.emit("waiting", ad=ad, call=call)
            return await result
        finally:
            del self._results[ad.task_id]
            self._waiting.pop(ad.task_id, None)
            self.emit("resumed", task_id=ad.task_id)

    def resolve_delegated(self, results: Iterable[TaskResult]) -> None:
        """Return results to the calls that await them; repeated and unexpected results are ignored."""
        for result in results:
            future = self._results.get(result.task_id)
            if future is not None and not future.done():
                future.set_result(result)

    def add_tokens(self, result: TaskResult) -> None:
        """Add the tokens and dollars of a delegated task to those of the run."""
        self.delegated_usage = replace(
            self.delegated_usage,
            prompt_tokens=total(self.delegated_usage.prompt_tokens, result.prompt_tokens),
            completion_tokens=total(self.delegated_usage.completion_tokens, result.completion_tokens),
            usd=min(MAX_USD, self.delegated_usage.usd + result.usd),
        )

    def with_delegated_usage(self, result: RunResult | None) -> RunResult | None:
        """Return the run's own result with the tokens and dollars of its delegated tasks added."""
        delegated = self.delegated_usage
        if delegated is NO_USAGE or not (delegated.tokens or delegated.usd):
            return result
        own = result or RunResult()
        return replace(
            own,
            prompt_tokens=total(own.prompt_tokens, delegated.prompt_tokens),
            completion_tokens=total(own.completion_tokens, delegated.completion_tokens),
            usd=min(MAX_USD, own.usd + delegated.usd),
        )

    def reattach(self, subject: str, from_seq: int) -> None:
        """Send the kept events from number `from_seq` on, and all later events, to another subject.

        The previous subject gets a `moved` event.
        """
        self.flush()
        if subject != self._subject:
            publish_events(self._bus, self._subject, encode(RunEvent(seq=self._seq, kind="moved")))
            self._subject = subject
        if self._first is not None:
            self._append(self._first[1])  # always, because it confirms the request
        for seq, event in sorted([*self._history, *self._resumed, *self._waiting.values()]):
            if seq >= from_seq:
                self._append(event)
        self.flush()


def publish_events(bus: Bus, subject: str, body: bytes) -> None:
    """Publish an encoded event, or several as an array; a failure is logged."""
    try:
        bus.connection.publish_nowait(subject, body)
    except LoomError as error:
        log_lost_events(bus, error)


def log_lost_events(bus: Bus, error: LoomError) -> None:
    """Log events that could not be sent; the watcher detects the gap in their numbers, or the silence."""
    if not bus.connection.closing:
        log.warning("run_event_lost", reason=error.message)


def stale_reason(request: RunRequest, bus: Bus) -> str | None:
    """Return why a request is too old to start a run; None if it is not, or if the server's time is unknown."""
    if not bus.clock.measured:
        return None
    now = bus.clock.now()
    if request.deadline is not None and now >= request.deadline:
        return "its deadline has passed"
    if request.sent_at is not None and now - request.sent_at > PATIENCE_S:
        return f"it was sent {now - request.sent_at:.1f} s ago"
    return None
