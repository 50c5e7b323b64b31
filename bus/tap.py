"""A tap: the decoded traffic of a namespace, one message at a time, without effects on it.

Consumes   all subject families, or selected ones, by plain subscriptions outside every queue group
Publishes  nothing, not even acknowledgements
Gives up   on messages that arrive faster than they are read: skips and counts them
"""

import asyncio
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from loom.bus.bus import Bus
from loom.bus.natsio.connection import Subscription
from loom.bus.natsio.transport.message import Msg
from loom.bus.subjects import FAMILIES
from loom.schemas.auction import CallForBids, HostAnnouncement, Offer, RetireRequest, SpawnRequest
from loom.schemas.base import Undecodable, decode
from loom.schemas.envelope import Envelope
from loom.schemas.events import SubtaskEvent
from loom.schemas.learning.lifecycle import Lifecycle
from loom.schemas.learning.reward import Reward
from loom.schemas.notices import read_scale_message
from loom.schemas.run import Delta, RunEvent, RunRequest, Stop
from loom.schemas.task import Submission, TaskAd, TaskResult

ROOM = 10_000
"""Most messages that wait for the reader."""
ROOM_BYTES = 64 * 1024 * 1024
"""Most bytes of their bodies."""

_READ_BY_TYPE = frozenset({"task", "later"})
"""Families whose messages may also be notices for SCALE."""
REPEATED = frozenset({"offer", "event"})
"""Families left out unless selected: awards, deltas and results have the same content."""
SHAPES: dict[str, type[Any]] = {
    "submit": TaskAd,
    "intake": Submission,
    "task": Envelope,
    "later": Envelope,
    "auction": CallForBids,
    "call": CallForBids,
    "offer": Offer,
    "run": RunRequest,
    "host": HostAnnouncement,
    "spawn": SpawnRequest,
    "retire": RetireRequest,
    "delta": Delta,
    "result": TaskResult,
    "reward": Reward,
    "lifecycle": Lifecycle,
    "subtask": SubtaskEvent,
    "event": RunEvent,
    "stop": Stop,
}
"""Family -> type of its messages; the other families have no body, or one without a type of its own."""


@dataclass(frozen=True, kw_only=True)
class TappedMessage:
    """A message that a tap has received."""

    subject: str
    family: str
    """Empty for a subject outside the table of subjects."""
    tokens: dict[str, str]
    """Variable tokens by name, as in the table of subjects: `task_id`, `phase`, …"""
    message: Any
    """An object of the type in SHAPES; the bytes of the body if they cannot be decoded, or the family has no type."""
    headers: dict[str, str]
    at: float
    """Server time at which the message was received."""
    size: int
    """Bytes of the body."""
    skipped: int = 0
    """Number of skipped messages directly before this one."""


class Tap:
    """Yields messages as they are published, at most once; a context manager and an async iterator of `TappedMessage`.

    The messages of one family arrive in the order in which they were sent; messages of several selected families may
    overtake each other.

    Args:
        families: Selected families; default: all except REPEATED, in one common order.
        room: Most messages kept for a slow reader; further ones are skipped until it has caught up.
    """

    def __init__(self, bus: Bus, families: Iterable[str] = (), *, room: int = ROOM) -> None:
        self._bus = bus
        selected = set(families)
        self._subjects = [
            bus.subjects.of(row.name, *("*" for _ in row.tokens)) for row in FAMILIES if row.name in selected
        ] or [bus.subjects.everything]
        self._left_out = frozenset() if selected else REPEATED
        self._room = room
        self._waiting: deque[tuple[Msg, float, int]] = deque()
        self._waiting_bytes = 0
        self._skipped = 0
        self._changed = asyncio.Event()
        self._closed = False
        self._subscriptions: list[Subscription] = []
        self._watching: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        try:
            for subject in self._subjects:
                self._subscriptions.append(await self._bus.connection.subscribe(subject, self._on_message))
            await self._bus.requests.flush()
        except BaseException:  # a cancelled entry is not followed by an exit
            self._close()
            raise
        self._watching = self._bus.tasks.spawn(self._watch_connection(), name="tap")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def _close(self) -> None:
        for subscription in self._subscriptions:
            self._bus.connection.unsubscribe(subscription)
        self._subscriptions.clear()
        if self._watching is not None:
            self._watching.cancel()
        self._closed = True
        self._changed.set()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> TappedMessage:
        """Return the next message; the iteration ends when the tap is closed.

        Raises:
            BusUnavailable: The connection is closed for good.
        """
        while not self._waiting:
            if self._bus.tasks.lost.is_set():
                raise self._bus.connection.loss()
            if self._closed:
                raise StopAsyncIteration
            self._changed.clear()
            await self._changed.wait()
        msg, at, skipped = self._waiting.popleft()
        self._waiting_bytes -= len(msg.data)
        return self._decoded(msg, at, skipped)

    async def _on_message(self, msg: Msg) -> None:
        if self._left_out and _family(msg.subject) in self._left_out:
            return
        if len(self._waiting) >= self._room or self._waiting_bytes + len(msg.data) > ROOM_BYTES:
            self._skipped += 1
            return
        self._waiting.append((msg, self._bus.clock.now(), self._skipped))
        self._waiting_bytes += len(msg.data)
        self._skipped = 0
        self._changed.set()

    def _decoded(self, msg: Msg, at: float, skipped: int) -> TappedMessage:
        parsed = self._bus.subjects.parse(msg.subject)
        family = parsed.family if parsed else ""
        message: Any = msg.data
        if family in SHAPES:
            try:
                by_type = family in _READ_BY_TYPE
                message = read_scale_message(msg.data) if by_type else decode(msg.data, SHAPES[family])
            except Undecodable:
                message = msg.data  # invalid messages are shown, too
        return TappedMessage(
            subject=msg.subject,
            family=family,
            tokens=parsed.tokens if parsed else {},
            message=message,
            headers=dict(msg.headers),
            at=at,
            size=len(msg.data),
            skipped=skipped,
        )

    async def _watch_connection(self) -> None:
        await self._bus.tasks.lost.wait()
        self._changed.set()


def _family(subject: str) -> str:
    """Return the second token of a subject, without parsing the rest."""
    return subject.split(".", 2)[1]
