"""A listener on a namespace: decoded traffic, one message at a time, and nobody notices.

Hears      every family of the namespace, or the families asked for
Says       nothing: a plain subscription, outside every queue group, that acknowledges nothing
Gives up   what comes faster than it is read is skipped and counted
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
from loom.schemas.learning import Lifecycle, Reward
from loom.schemas.notices import read_scale_message
from loom.schemas.run import Delta, RunEvent, RunRequest, Stop
from loom.schemas.task import Submission, TaskAd, TaskResult

ROOM = 10_000
"""Messages that wait for a reader."""
ROOM_BYTES = 64 * 1024 * 1024
"""Their bodies together."""

_READ_BY_TYPE = frozenset({"task", "later"})
"""Families whose messages may be notices for SCALE, too."""
REPEATED = frozenset({"offer", "event"})
"""Families that a tap leaves out unless they are named: awards, deltas and results repeat their content."""
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
"""family -> what its messages are; the others have no body, or one that could not be read before."""


@dataclass(frozen=True, kw_only=True)
class Seen:
    """One message on its way."""

    subject: str
    family: str
    """Empty: not a subject of ours."""
    tokens: dict[str, str]
    """By name, as in the table of subjects: `task_id`, `phase`, …"""
    message: Any
    """What SHAPES says; the body's bytes where it is not that, and for other families."""
    headers: dict[str, str]
    at: float
    """When it was heard, server time."""
    size: int
    """Bytes of the body."""
    skipped: int = 0
    """Messages just before this one for which there was no room."""


class Tap:
    """Traffic as it passes, at most once; a context manager and an async iterator of `Seen`.

    One family comes in the order it was sent; several families asked for by name may overtake each other.

    Args:
        families: Those wanted; none: all of the namespace but REPEATED, one order for everything.
        room: Messages kept for a slow reader; later ones are skipped until it has caught up.
    """

    def __init__(self, bus: Bus, families: Iterable[str] = (), *, room: int = ROOM) -> None:
        self._bus = bus
        wanted = set(families)
        self._subjects = [
            bus.subjects.of(row.name, *("*" for _ in row.tokens)) for row in FAMILIES if row.name in wanted
        ] or [bus.subjects.everything]
        self._left_out = frozenset() if wanted else REPEATED
        self._room = room
        self._waiting: deque[tuple[Msg, float, int]] = deque()
        self._waiting_bytes = 0
        self._skipped = 0
        self._stirred = asyncio.Event()
        self._closed = False
        self._subscriptions: list[Subscription] = []
        self._noticing: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        try:
            for subject in self._subjects:
                self._subscriptions.append(await self._bus.connection.subscribe(subject, self._take))
            await self._bus.requests.flush()
        except BaseException:  # a cancelled entry is not followed by an exit
            self._close()
            raise
        self._noticing = self._bus.tasks.spawn(self._notice_loss(), name="tap")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def _close(self) -> None:
        for subscription in self._subscriptions:
            self._bus.connection.unsubscribe(subscription)
        self._subscriptions.clear()
        if self._noticing is not None:
            self._noticing.cancel()
        self._closed = True
        self._stirred.set()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Seen:
        """Return the next message; ends when the tap is closed.

        Raises:
            BusUnavailable: The connection is closed for good.
        """
        while not self._waiting:
            if self._bus.tasks.lost.is_set():
                raise self._bus.connection.loss()
            if self._closed:
                raise StopAsyncIteration
            self._stirred.clear()
            await self._stirred.wait()
        msg, at, skipped = self._waiting.popleft()
        self._waiting_bytes -= len(msg.data)
        return self._seen(msg, at, skipped)

    async def _take(self, msg: Msg) -> None:
        if self._left_out and _family(msg.subject) in self._left_out:
            return
        if len(self._waiting) >= self._room or self._waiting_bytes + len(msg.data) > ROOM_BYTES:
            self._skipped += 1
            return
        self._waiting.append((msg, self._bus.clock.now(), self._skipped))
        self._waiting_bytes += len(msg.data)
        self._skipped = 0
        self._stirred.set()

    def _seen(self, msg: Msg, at: float, skipped: int) -> Seen:
        parsed = self._bus.subjects.parse(msg.subject)
        family = parsed.family if parsed else ""
        message: Any = msg.data
        if family in SHAPES:
            try:
                by_type = family in _READ_BY_TYPE
                message = read_scale_message(msg.data) if by_type else decode(msg.data, SHAPES[family])
            except Undecodable:
                message = msg.data  # shown as it came: judging it is the receiver's part
        return Seen(
            subject=msg.subject,
            family=family,
            tokens=parsed.tokens if parsed else {},
            message=message,
            headers=dict(msg.headers),
            at=at,
            size=len(msg.data),
            skipped=skipped,
        )

    async def _notice_loss(self) -> None:
        await self._bus.tasks.lost.wait()
        self._stirred.set()


def _family(subject: str) -> str:
    """The second token of a subject, read before anything else of a message is."""
    return subject.split(".", 2)[1]
