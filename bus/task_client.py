"""The client's side of a task: publish it, follow it, get its answer."""

import asyncio
import contextlib
import weakref
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from typing import Any

from loom.bus.bus import Bus
from loom.bus.logs.logger import get_logger
from loom.bus.natsio.ownership import Owner, running_loop
from loom.bus.natsio.requests import NoResponders
from loom.bus.records import records
from loom.bus.task_updates import TaskUpdates, id_taken
from loom.schemas.base import Undecodable, decode, new_id
from loom.schemas.checks.ad import check_ad
from loom.schemas.errors import BusUnavailable, LoomError, error_for
from loom.schemas.record import ENDED, TaskRecord, TaskStatus
from loom.schemas.run import Delta
from loom.schemas.task import ErrorReply, StatusQuery, Submission, TaskAd, TaskResult, ad_digest

log = get_logger()

ASK_AGAIN_S = 5.0  # a lost result message is found out this late
UNANSWERED = 3  # questions in a row; phases may be on their way up again
ANSWER_S = 3.0
CONFIRM_CANCEL_S = (0.02, 0.1, 0.4, 1.0, 1.0)
"""Seconds after each cancel message until the record is read again."""


class TaskHandle:
    """One submitted task.

    Deltas are at-most-once and kept, within bounds, from `publish` on until they are read; the result is requested
    again when its message was lost. The subscriptions end with the task, or when the handle is dropped. A handle
    works in the event loop that made it.

    Where the id of the ad is that of another task, the result is a failed one with `invalid_task`: at once if the id
    is of another submitter or of a task that has ended, else within seconds. That task goes on.

    Args:
        submitter: Whose task it is, where an operator submits it again; absent: the connection's own.
    """

    def __init__(self, bus: Bus, ad: TaskAd, *, submitter: str = "") -> None:
        self.ad = ad
        self.task_id = ad.task_id
        self._bus = bus
        self._submitter = submitter or bus.identity.submitter
        self._owner = Owner("task handle")
        self._updates = TaskUpdates(bus, ad.task_id, self._submitter)
        self._attempt = 0
        self._next_seq = 0
        weakref.finalize(self, self._updates.drop).atexit = False

    def __repr__(self) -> str:
        result = self._updates.result
        ended = result.done() and not result.cancelled() and result.exception() is None
        return f"<TaskHandle {self.task_id}, {result.result().state if ended else 'not known to have ended'}>"

    async def publish(self, *, deltas: bool = True) -> None:
        """Publish the ad; once this returns, the task will end.

        Args:
            deltas: Whether progress is kept from now on; otherwise from the first step of `events` on.

        Raises:
            InvalidTask: The ad breaks a rule; `field` names it.
            Overloaded: The intake is full.
            BusUnavailable: The server does not confirm.
        """
        self._updates.ad_digest = ad_digest(check_ad(self.ad))
        submission = Submission(ad=self.ad, submission=new_id())
        try:
            await self.open(deltas=deltas)
            await self._bus.jetstream.publish(
                self._bus.subjects.intake(self._submitter, self.ad.priority, self.task_id),
                submission,
                msg_id=f"{self.task_id}:{submission.submission}",
            )
        except BaseException:  # a caller that is cancelled here gets no handle to close
            self._updates.close()
            raise

    async def open(self, *, deltas: bool) -> None:
        """Subscribe to the result, and to deltas if wanted; to be called before the task is published."""
        await self._updates.subscribe()
        if deltas:
            await self._updates.subscribe_to_deltas()

    async def close(self) -> None:
        """End the subscriptions; safe to call twice, and from another event loop. `result` and `events` renew them."""
        if running_loop() is self._owner.loop:
            self._updates.close()
        else:
            self._updates.drop()

    async def result(self, timeout_s: float | None = None) -> TaskResult:
        """Return the task's result once it has ended, however it ended.

        Raises:
            TimeoutError: It has not ended in `timeout_s`.
            BusUnavailable: No phases answer, for about half a minute.
            WrongEventLoop: The handle was made in another event loop.
        """
        result = self._updates.result
        if result.done():
            return result.result()
        self._owner.check()
        unanswered = 0
        async with asyncio.timeout(timeout_s):
            wait_s = ASK_AGAIN_S if self._updates.subscribed else 0.0  # the result may have come before
            await self._updates.subscribe()
            while True:
                await asyncio.wait([result], timeout=wait_s)
                if result.done():
                    break
                wait_s = ASK_AGAIN_S
                try:
                    await self._look()
                except BusUnavailable:
                    unanswered += 1
                    if unanswered == UNANSWERED:
                        raise
                else:
                    unanswered = 0
        return result.result()

    async def content(self, timeout_s: float | None = None) -> str:
        """Return the answer's text.

        Raises:
            LoomError: The task failed; the class and code say how.
            TimeoutError: It has not ended in `timeout_s`.
            WrongEventLoop: The handle was made in another event loop.
        """
        result = await self.result(timeout_s)
        if result.error is not None:
            raise result.error.to_exception(self.task_id)
        return result.content

    async def events(self) -> AsyncGenerator[Delta, None]:
        """Yield progress in order until the task ends, each step once; a later attempt starts from its first step.

        An iteration that is broken off leaves the task running and drops its progress; another one goes on from then.

        Raises:
            WrongEventLoop: The handle was made in another event loop.
        """
        self._owner.check()
        updates = self._updates
        updates.begin_reading()
        watching = asyncio.ensure_future(self.result())
        watching.add_done_callback(lambda _: updates.changed.set())
        try:
            await updates.subscribe_to_deltas()
            while True:
                while (delta := updates.next_delta()) is not None:
                    if (delta.attempt, delta.seq) >= (self._attempt, self._next_seq):
                        self._attempt, self._next_seq = delta.attempt, delta.seq + 1
                        yield delta
                if watching.done():
                    return
                updates.changed.clear()
                await updates.changed.wait()
        finally:
            updates.end_reading()
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)  # `result` raises it again for its own caller

    async def status(self) -> TaskResult:
        """Return how far the task is: its state, and its result once it has ended."""
        return await status(self._bus, self.task_id)

    async def record(self) -> TaskRecord | None:
        """Return all that is known of the task; None while it waits for admission."""
        return await record(self._bus, self.task_id)

    async def cancel(self) -> TaskResult:
        """Cancel the task and return how it has ended; one that had ended before stays as it ended.

        Raises:
            InvalidTask: The id is that of a task of another ad, which goes on.
        """
        if self._updates.ad_digest and self._updates.is_of_another_ad(await status(self._bus, self.task_id)):
            raise id_taken(self.task_id).to_exception(self.task_id)
        return await cancel(self._bus, self.task_id)

    async def _look(self) -> None:
        found = await status(self._bus, self.task_id)
        if found.state in ENDED or self._updates.is_of_another_ad(found):
            self._updates.finish(found)


async def publish(bus: Bus, ad: TaskAd, *, deltas: bool = True, submitter: str = "") -> TaskHandle:
    """Publish a task and return its handle; once this returns, the task will end.

    Args:
        deltas: Whether progress is kept from now on.
        submitter: As for TaskHandle.

    Raises:
        InvalidTask: The ad breaks a rule; `field` names it.
        Overloaded: The intake is full.
        BusUnavailable: The server does not confirm.
    """
    handle = TaskHandle(bus, ad, submitter=submitter)
    await handle.publish(deltas=deltas)
    return handle


@contextlib.asynccontextmanager
async def published(
    bus: Bus,
    ad: TaskAd,
    *,
    deltas: bool,
    cancel_with_caller: bool,
    cancelled: Callable[[TaskResult], None] | None = None,
) -> AsyncIterator[TaskHandle]:
    """Publish a task and yield its handle, which is closed with the block.

    Args:
        deltas: Whether progress is kept from the start.
        cancel_with_caller: Whether the task is cancelled when the caller is cancelled, or breaks off an iteration.
        cancelled: Called with the result of a task that was cancelled with its caller.

    Raises:
        InvalidTask: The ad breaks a rule; `field` names it.
        Overloaded: The intake is full.
        BusUnavailable: The server does not confirm.
    """
    handle = TaskHandle(bus, ad)
    try:
        await handle.publish(deltas=deltas)
        yield handle
    except (asyncio.CancelledError, GeneratorExit):
        if cancel_with_caller:
            with contextlib.suppress(LoomError):  # the task was never stored, or the cluster is gone
                result = await handle.cancel()
                if cancelled is not None:
                    cancelled(result)
        raise
    finally:
        await handle.close()


def log_warnings(result: TaskResult) -> None:
    """Log what a person should know of a result."""
    for warning in result.warnings:
        log.warning("task_warning", task_id=result.task_id, warning=warning)


async def ask(
    bus: Bus, subject: str, message: Any = b"", *, timeout_s: float = ANSWER_S, task_id: str | None = None
) -> bytes:
    """Return the body of an answer: that a task has failed is one, too.

    Args:
        task_id: The task that the request is about, for the error of a refused one.

    Raises:
        LoomError: The request is refused; the class is that of the code.
        BusUnavailable: No phases answer.
    """
    try:
        msg = await bus.requests.request(subject, message, timeout_s=timeout_s)
    except (TimeoutError, NoResponders) as error:
        raise BusUnavailable('no phases answer; run "loom up"', url=bus.connection.address) from error
    refusal = _refusal(msg.data) if "Nats-Service-Error-Code" in msg.headers else None
    if refusal is not None:
        raise error_for(refusal.code, refusal.message, field=refusal.field, task_id=task_id)
    return msg.data


def _refusal(raw: bytes) -> ErrorReply | None:
    """The refusal of a request; None where the body is the result of a failed task."""
    try:
        return decode(raw, ErrorReply)
    except Undecodable:
        return None


def request_subject(bus: Bus, family: str, *task_id: str) -> str:
    """Return the subject of a request to SENSE: the submitter's own for a client that has a name, else the plain one.

    Args:
        family: submit, status or cancel.
        task_id: None for submit.
    """
    name = (bus.identity.submitter,) if bus.by_name else ()
    return bus.subjects.of(family, *name, *task_id)


async def status(bus: Bus, task_id: str) -> TaskResult:
    """Return how far a task is: its state, and its result once it has ended.

    Raises:
        UnknownTask: No task of that id is known.
        BusUnavailable: No phases answer.
    """
    return decode(await ask(bus, request_subject(bus, "status", task_id), task_id=task_id), TaskResult)


async def record(bus: Bus, task_id: str) -> TaskRecord | None:
    """Return all that is known of a task; None while it waits for admission.

    Raises:
        UnknownTask: No task of that id is known.
        BusUnavailable: No phases answer.
    """
    answer = await ask(bus, request_subject(bus, "status", task_id), StatusQuery(full=True), task_id=task_id)
    return decode(answer, TaskStatus).record


async def cancel(bus: Bus, task_id: str) -> TaskResult:
    """Cancel a task and return how it has ended; one that had ended before stays as it ended.

    Raises:
        UnknownTask: No task of that id is known.
        BusUnavailable: No phases answer.
    """
    return decode(await ask(bus, request_subject(bus, "cancel", task_id), task_id=task_id), TaskResult)


async def cancel_and_confirm(bus: Bus, task_id: str, is_over: Callable[[TaskRecord | None], bool]) -> None:
    """Publish the cancellation of a task until its record shows that the task is over.

    For phases and hosts: SENSE answers requests of clients only.

    Args:
        is_over: Returns whether nothing is left to cancel, given the task's record; None stands for no record yet.

    Raises:
        BusUnavailable: SENSE did not confirm the cancellation in time.
    """
    for wait_s in CONFIRM_CANCEL_S:
        entry = await records(bus).get(task_id)
        if is_over(None if entry is None else entry.value):
            return
        if entry is not None:
            await bus.connection.publish(bus.subjects.of("cancel", task_id))
        await asyncio.sleep(wait_s)
    raise BusUnavailable(f"SENSE did not confirm the cancellation of {task_id} within {sum(CONFIRM_CANCEL_S):g} s")
