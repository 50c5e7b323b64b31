"""The client's side of a task: publish it, follow it, get its answer."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

from loom.bus.client import Bus, Msg, NoResponders, Subscription
from loom.schemas.envelope import TaskRecord
from loom.schemas.errors import BusUnavailable, LoomError, error_for
from loom.schemas.run import Delta
from loom.schemas.task import ErrorReply, Submission, TaskAd, TaskResult, check_ad
from loom.schemas.wire import Undecodable, decode, new_id

ASK_AGAIN_S = 5.0  # a lost result message is found out this late
UNANSWERED = 3  # questions in a row; phases may be on their way up again
BUFFER = 10_000  # deltas kept for a reader that has not come yet
ANSWER_S = 3.0


class TaskHandle:
    """One submitted task.

    Deltas are at-most-once and kept only while the handle is open; the result is asked for again when its
    message was lost.
    """

    def __init__(self, bus: Bus, ad: TaskAd) -> None:
        self.ad = ad
        self.task_id = ad.task_id
        self._bus = bus
        self._deltas: asyncio.Queue[Delta | None] = asyncio.Queue(BUFFER)
        self._result: asyncio.Future[TaskResult] = asyncio.get_running_loop().create_future()
        self._subscriptions: list[Subscription] = []
        self._attempt = 0
        self._next_n = 0

    async def open(self, *, deltas: bool) -> None:
        """Listen for the result, and for deltas if wanted; to be called before the task is published."""
        self._subscriptions.append(
            await self._bus.listen(self._bus.subjects.of("result", self.task_id), self._on_result)
        )
        if deltas:
            self._subscriptions.append(
                await self._bus.listen(self._bus.subjects.of("delta", self.task_id), self._on_delta)
            )

    async def close(self) -> None:
        """Stop listening; safe to call twice."""
        subscriptions, self._subscriptions = self._subscriptions, []
        for subscription in subscriptions:
            await self._bus.unsubscribe(subscription)
        self._end_deltas()

    async def result(self, timeout_s: float | None = None) -> TaskResult:
        """Return the task's result once it has ended, however it ended.

        Raises:
            TimeoutError: It has not ended in `timeout_s`.
            BusUnavailable: No phases answer, for about half a minute.
        """
        unanswered = 0
        async with asyncio.timeout(timeout_s):
            while not self._result.done():
                await asyncio.wait([self._result], timeout=ASK_AGAIN_S)
                if self._result.done():
                    break
                try:
                    await self._look()
                except BusUnavailable:
                    unanswered += 1
                    if unanswered == UNANSWERED:
                        raise
                else:
                    unanswered = 0
        await self.close()
        return self._result.result()

    async def content(self, timeout_s: float | None = None) -> str:
        """Return the answer's text.

        Raises:
            LoomError: The task failed; the class and code say how.
            TimeoutError: It has not ended in `timeout_s`.
        """
        result = await self.result(timeout_s)
        if result.error is not None:
            raise result.error.to_exception(self.task_id)
        return result.content

    async def events(self) -> AsyncIterator[Delta]:
        """Yield progress in order until the task ends, each step once; a later attempt starts anew."""
        watching = asyncio.ensure_future(self.result())
        watching.add_done_callback(lambda _: self._end_deltas())
        try:
            while (delta := await self._deltas.get()) is not None:
                if (delta.attempt, delta.n) >= (self._attempt, self._next_n):
                    self._attempt, self._next_n = delta.attempt, delta.n + 1
                    yield delta
        finally:
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)  # `result` raises it again for who asks

    async def status(self) -> TaskRecord | TaskResult:
        """Return the task's record; a TaskResult in state `accepted` while it waits for admission."""
        return await status(self._bus, self.task_id)

    async def cancel(self) -> TaskRecord:
        """Cancel the task and return its record; one that has ended stays as it ended."""
        return await cancel(self._bus, self.task_id)

    async def _look(self) -> None:
        found = await status(self._bus, self.task_id)
        if isinstance(found, TaskRecord) and found.ended and not self._result.done():
            self._result.set_result(found.to_result())

    def _on_result(self, msg: Msg) -> None:
        if not self._result.done():
            try:
                result = decode(msg.data, TaskResult)
            except Undecodable as error:  # the record holds the result, and is read before long
                self._bus.discards.add("result_undecodable", reason=error.message, task_id=self.task_id)
            else:
                self._result.set_result(result)

    def _on_delta(self, msg: Msg) -> None:
        try:
            delta = decode(msg.data, Delta)
        except Undecodable as error:
            self._bus.discards.add("delta_undecodable", reason=error.message, task_id=self.task_id)
            return
        with contextlib.suppress(asyncio.QueueFull):  # nobody reads: at most once allows it
            self._deltas.put_nowait(delta)

    def _end_deltas(self) -> None:
        if self._deltas.full():  # the end must get through; a delta need not
            self._deltas.get_nowait()
        self._deltas.put_nowait(None)


async def publish(bus: Bus, ad: TaskAd, *, deltas: bool = True) -> TaskHandle:
    """Hand a task to the loop and return its handle; once this returns, the task will end.

    Raises:
        InvalidTask: The ad breaks a rule; `field` names it.
        Overloaded: The intake is full.
        BusUnavailable: The server does not confirm.
    """
    check_ad(ad)
    handle = TaskHandle(bus, ad)
    await handle.open(deltas=deltas)
    submission = Submission(ad=ad, submission=new_id())
    try:
        await bus.store(
            bus.subjects.intake(ad.priority, ad.task_id), submission, msg_id=f"{ad.task_id}:{submission.submission}"
        )
    except LoomError:
        await handle.close()
        raise
    return handle


async def ask(bus: Bus, subject: str, message: Any = b"", *, timeout_s: float = ANSWER_S) -> bytes:
    """Return the body of an answer.

    Raises:
        LoomError: The answer is an error, as the class of its code.
        BusUnavailable: No phases answer.
    """
    try:
        msg = await bus.request(subject, message, timeout_s=timeout_s)
    except (TimeoutError, NoResponders) as error:
        raise BusUnavailable('no phases answer; run "loom up"', url=bus.address) from error
    if "Nats-Service-Error-Code" in msg.headers:
        reply = decode(msg.data, ErrorReply)
        raise error_for(reply.code, reply.message, field=reply.field, task_id=reply.task_id)
    return msg.data


async def status(bus: Bus, task_id: str) -> TaskRecord | TaskResult:
    """Return what is known of a task: its record, or a TaskResult `accepted` while it waits for admission.

    Raises:
        UnknownTask: No task of that id is known.
        BusUnavailable: No phases answer.
    """
    return _read_status(await ask(bus, bus.subjects.of("status", task_id)))


async def cancel(bus: Bus, task_id: str) -> TaskRecord:
    """Cancel a task and return its record.

    Raises:
        UnknownTask: No task of that id is known.
        BusUnavailable: No phases answer.
    """
    return decode(await ask(bus, bus.subjects.of("cancel", task_id)), TaskRecord)


def _read_status(raw: bytes) -> TaskRecord | TaskResult:
    try:
        return decode(raw, TaskRecord)
    except Undecodable:
        return decode(raw, TaskResult)
