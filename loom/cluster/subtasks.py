"""News of the parts of one task, should SCALE divide it."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress
from types import TracebackType
from typing import Self

from msgspec.structs import replace

from loom.bus.client import Bus, Msg, Subscription
from loom.bus.kv import Bucket
from loom.bus.log import get_logger
from loom.bus.records import records
from loom.bus.tasks import TaskHandle
from loom.schemas.envelope import SplitPlan, Subtask, TaskRecord
from loom.schemas.errors import LoomError
from loom.schemas.events import SubtaskEvent
from loom.schemas.notices import PlanTimeout, SubtaskEnded, read_scale_message
from loom.schemas.run import Delta
from loom.schemas.wire import Undecodable

log = get_logger()


class Subtasks:
    """Listens, from before a task is published, for what SCALE stores of it; a context manager.

    A divided task is parked under a subject of its own whenever parts of it begin, and SCALE is told of each that
    ends. Both are heard at most once; what was missed is made up for when the task has ended.
    """

    def __init__(self, bus: Bus, task_id: str) -> None:
        self._bus = bus
        self._task_id = task_id
        self._plans = Bucket(bus, "plans", SplitPlan)
        self._records = records(bus)
        self._told: dict[str, bool] = {}
        """Id of a part -> whether its end has been told, not only its begin."""
        self._heard: asyncio.Queue[str | None] = asyncio.Queue()
        """A part's task id: it has ended; None: parts have begun."""
        self._news: asyncio.Queue[Delta | SubtaskEvent | None] = asyncio.Queue()
        self._subscriptions: list[Subscription] = []

    async def __aenter__(self) -> Self:
        subjects = self._bus.subjects
        for subject in (subjects.later("scale", self._task_id, "timer"), subjects.task("scale", "*", self._task_id)):
            self._subscriptions.append(await self._bus.subscribe(subject, self._on_hop))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        subscriptions, self._subscriptions = self._subscriptions, []
        for subscription in subscriptions:
            await self._bus.unsubscribe(subscription)

    async def follow(self, handle: TaskHandle) -> AsyncGenerator[Delta | SubtaskEvent, None]:
        """Yield the task's own progress and that of its parts, until it has ended."""
        working = [asyncio.create_task(self._deltas(handle)), asyncio.create_task(self._look())]
        try:
            while (news := await self._news.get()) is not None:
                yield news
        finally:
            for each in working:
                each.cancel()
            await asyncio.gather(*working, return_exceptions=True)
        if self._told:
            with suppress(LoomError):  # the task has its result; of its parts there is no more to say then
                await self._tell_plan()
        while not self._news.empty():
            if (news := self._news.get_nowait()) is not None:
                yield news

    async def _on_hop(self, msg: Msg) -> None:
        try:
            message = read_scale_message(msg.data)
        except Undecodable as error:
            self._bus.discards.add("envelope_undecodable", reason=error.message, subject=msg.subject)
            return
        if isinstance(message, PlanTimeout):
            self._heard.put_nowait(None)
        elif isinstance(message, SubtaskEnded):
            self._heard.put_nowait(message.child_id)

    async def _deltas(self, handle: TaskHandle) -> None:
        try:
            async with aclosing(handle.events()) as deltas:
                async for delta in deltas:
                    self._news.put_nowait(delta)
        finally:
            self._news.put_nowait(None)

    async def _look(self) -> None:
        while True:
            child_id = await self._heard.get()
            try:
                await (self._tell_plan() if child_id is None else self._tell_end(child_id))
            except LoomError as error:  # the task itself goes on
                log.info("subtasks_not_seen", task_id=self._task_id, reason=error.message)

    async def _tell_plan(self) -> None:
        entry = await self._plans.get(self._task_id)
        for part in entry.value.subtasks if entry is not None else ():
            self._tell(part)

    async def _tell_end(self, child_id: str) -> None:
        entry = await self._records.get(child_id)
        if entry is not None and entry.value.ended:
            self._tell(_ended(entry.value))

    def _tell(self, part: Subtask) -> None:
        """Say what is new of a part; nobody hears of its end before its begin."""
        if part.state == "waiting" or part.child_id is None:
            return
        begun = SubtaskEvent(id=part.id, task_id=part.child_id, state="running", description=part.description)
        if part.id not in self._told:
            self._told[part.id] = False
            self._news.put_nowait(begun)
        if part.state != "running" and not self._told[part.id]:
            self._told[part.id] = True
            error = part.error.code if part.error else ""
            self._news.put_nowait(replace(begun, state=part.state, node_id=part.node_id, error=error))


def _ended(record: TaskRecord) -> Subtask:
    """An ended part, as its own record tells."""
    envelope, result = record.envelope, record.to_result()
    return Subtask(
        id=envelope.split.subtask if envelope.split and envelope.split.subtask else record.task_id,
        description=envelope.ad.description,
        state=record.state if record.state in {"succeeded", "failed", "cancelled"} else "running",
        child_id=record.task_id,
        node_id=result.node_id,
        error=result.error,
    )
