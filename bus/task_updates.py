"""The result of a task and its unread progress, as a client receives them."""

import asyncio
from collections import deque
from typing import Final

from loom.bus.bus import Bus
from loom.bus.natsio.connection import Subscription
from loom.bus.natsio.transport.message import Msg
from loom.schemas.base import Undecodable, decode
from loom.schemas.run import Delta
from loom.schemas.task import TaskError, TaskResult

BUFFER: Final = 10_000
"""Most deltas kept for a reader; further ones are dropped until the reader has caught up."""
BUFFER_BYTES: Final = 16 * 2**20
"""Most bytes of these deltas."""


class TaskUpdates:
    """Receives the result and the progress of one task.

    The subscriptions end with the result, or with `close`. This object has no reference to the task's handle, so that
    a dropped handle is collected although its subscriptions still exist.
    """

    def __init__(self, bus: Bus, task_id: str, submitter: str) -> None:
        self._bus = bus
        self._task_id = task_id
        self._submitter = submitter
        self.ad_digest = ""
        """Digest of the published ad; empty if a task of any ad is accepted."""
        self.result: asyncio.Future[TaskResult] = asyncio.get_running_loop().create_future()
        self.changed = asyncio.Event()
        """Set when a delta arrives; a reader clears it before it waits."""
        self._deltas: deque[bytes] = deque()
        self._bytes = 0
        self._readers = 0
        self.subscribed = False
        """Whether the result is subscribed to."""
        self._to_deltas: Subscription | None = None

    async def subscribe(self) -> None:
        """Subscribe to the result, unless it is subscribed to or has arrived."""
        if not self.subscribed and not self.result.done():
            self.subscribed = True
            try:
                await self._bus.results.add(self._submitter, self._task_id, self._on_result)
            except BaseException:
                self.subscribed = False
                raise

    async def subscribe_to_deltas(self) -> None:
        """Subscribe to progress, unless it is subscribed to or the result has arrived."""
        if self._to_deltas is None and not self.result.done():
            subject = self._bus.subjects.of("delta", self._submitter, self._task_id)
            self._to_deltas = await self._bus.connection.subscribe_sync(subject, self._on_delta)

    def begin_reading(self) -> None:
        """Add a reader of deltas."""
        self._readers += 1

    def end_reading(self) -> None:
        """Remove a reader; after the last one the subscription ends, and unread deltas are dropped."""
        self._readers -= 1
        if not self._readers:
            self._end_deltas()
            self._deltas.clear()
            self._bytes = 0

    def next_delta(self) -> Delta | None:
        """Return the oldest unread delta; None if there is none."""
        while self._deltas:
            raw = self._deltas.popleft()
            self._bytes -= len(raw)
            try:
                return decode(raw, Delta)
            except Undecodable as error:
                self._bus.discards.add("delta_undecodable", reason=error.message, task_id=self._task_id)
        return None

    def is_of_another_ad(self, result: TaskResult) -> bool:
        """Return whether a result or state belongs to another task with the same id."""
        return bool(self.ad_digest and result.ad_digest) and result.ad_digest != self.ad_digest

    def finish(self, result: TaskResult) -> None:
        """Set the result and end the subscriptions; further results are ignored, and one of another ad is an error."""
        if not self.result.done():
            if self.is_of_another_ad(result):
                result = TaskResult(task_id=self._task_id, state="failed", error=id_taken(self._task_id))
            self.result.set_result(result)
        self.close()

    def close(self) -> None:
        """End the subscriptions; safe to call twice."""
        self._end_deltas()
        if self.subscribed:
            self.subscribed = False
            self._bus.results.remove(self._submitter, self._task_id, self._on_result)

    def drop(self) -> None:
        """End the subscriptions from any thread; for finalizers."""
        if self.subscribed or self._to_deltas is not None:
            self._bus.connection.call_soon(self.close)

    def _end_deltas(self) -> None:
        if self._to_deltas is not None:
            self._bus.connection.unsubscribe(self._to_deltas)
            self._to_deltas = None

    def _on_result(self, msg: Msg) -> None:
        try:
            result = decode(msg.data, TaskResult)
        except Undecodable as error:  # the result is also in the record, which the handle polls
            self._bus.discards.add("result_undecodable", reason=error.message, task_id=self._task_id)
        else:
            self.finish(result)

    def _on_delta(self, msg: Msg) -> None:
        if len(self._deltas) < BUFFER and self._bytes + len(msg.data) <= BUFFER_BYTES:
            self._deltas.append(msg.data)
            self._bytes += len(msg.data)
            self.changed.set()


def id_taken(task_id: str) -> TaskError:
    """Return the error of an ad whose id belongs to a task of another ad."""
    why = f"the id {task_id} is taken by another ad; choose another one"
    return TaskError(code="invalid_task", message=why, field="task_id")
