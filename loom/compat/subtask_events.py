"""Events of the subtasks of one task, for AmoebaLoop of loom-agent 0.6."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress
from types import TracebackType
from typing import Self

from msgspec.structs import replace

from loom.bus.bus import Bus
from loom.bus.natsio.connection import Subscription
from loom.bus.natsio.transport.message import Msg
from loom.bus.task_client import TaskHandle
from loom.schemas.auction import DESCRIPTION_BYTES
from loom.schemas.base import Undecodable, cut_utf8, decode
from loom.schemas.errors import LoomError
from loom.schemas.events import SubtaskEvent
from loom.schemas.plan import SplitPlan, Subtask
from loom.schemas.run import Delta


class Subtasks:
    """Subscribes to SCALE's events of a task's subtasks before the task is submitted; a context manager.

    An event may be lost, or come twice. It is yielded once; what was lost is read from the plan when the task has
    ended, where this client may read plans.
    """

    def __init__(self, bus: Bus, task_id: str) -> None:
        self._bus = bus
        self._task_id = task_id
        self._plans = bus.bucket("plans", SplitPlan)
        self._ended: dict[str, bool] = {}
        """Id of a subtask -> whether its end was yielded, too."""
        self._news: asyncio.Queue[Delta | SubtaskEvent | None] = asyncio.Queue()
        self._subscription: Subscription | None = None

    async def __aenter__(self) -> Self:
        subject = self._bus.subjects.of("subtask", self._bus.identity.submitter, self._task_id)
        self._subscription = await self._bus.connection.subscribe(subject, self._on_event)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        subscription, self._subscription = self._subscription, None
        if subscription is not None:
            self._bus.connection.unsubscribe(subscription)

    async def follow(self, handle: TaskHandle) -> AsyncGenerator[Delta | SubtaskEvent, None]:
        """Yield the progress of the task and the events of its subtasks until its end."""
        deltas = asyncio.create_task(self._deltas(handle))
        try:
            while (news := await self._news.get()) is not None:
                yield news
        finally:
            deltas.cancel()
            await asyncio.gather(deltas, return_exceptions=True)
        if self._ended:
            with suppress(LoomError):  # only these events are missing: the task has its result
                await self._report_plan()
        while not self._news.empty():
            if (news := self._news.get_nowait()) is not None:
                yield news

    async def _on_event(self, msg: Msg) -> None:
        try:
            self._report(decode(msg.data, SubtaskEvent))
        except Undecodable as error:
            self._bus.discards.add("subtask_undecodable", reason=error.message, subject=msg.subject)

    async def _deltas(self, handle: TaskHandle) -> None:
        try:
            async with aclosing(handle.events()) as deltas:
                async for delta in deltas:
                    self._news.put_nowait(delta)
        finally:
            self._news.put_nowait(None)

    async def _report_plan(self) -> None:
        entry = await self._plans.get(self._task_id)
        for part in entry.value.subtasks if entry is not None else ():
            event = _latest(self._task_id, part, self._bus.clock.now())
            if event is not None:
                self._report(event)

    def _report(self, event: SubtaskEvent) -> None:
        """Queue an event unless it was queued before; a lost start is queued before its end."""
        if event.subtask not in self._ended:
            self._ended[event.subtask] = False
            self._news.put_nowait(replace(event, state="begun", child_state=None, node_id=None, owner=None, error=""))
        if event.state == "ended" and not self._ended[event.subtask]:
            self._ended[event.subtask] = True
            self._news.put_nowait(event)


def _latest(parent_id: str, part: Subtask, now: float) -> SubtaskEvent | None:
    """Return the last event of a subtask, derived from its plan; None before its start."""
    if part.state == "waiting" or part.child_id is None:
        return None
    begun = SubtaskEvent(
        parent_id=parent_id,
        child_id=part.child_id,
        subtask=part.id,
        state="begun",
        description=cut_utf8(part.description, DESCRIPTION_BYTES)[0],
        at=now,
    )
    if part.state == "running":
        return begun
    code = part.error.code if part.error else ""
    return replace(begun, state="ended", child_state=part.state, node_id=part.node_id, owner=part.owner, error=code)
