"""The client side of a task: publishes it, follows its progress, and returns its result."""

import asyncio
import contextlib
import weakref
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from typing import Any

from loom.bus.bus import Bus
from loom.bus.logs.logger import get_logger
from loom.bus.natsio.loop_ownership import Owner, running_loop
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

POLL_S = 5.0
"""Seconds between two status requests while a result is awaited, because its message may be lost."""
MAX_FAILED_POLLS = 3
"""Status requests in a row without a reply after which waiting fails; phases may be restarting."""
REPLY_S = 3.0
"""Seconds to wait for a reply of SENSE."""
CONFIRM_CANCEL_S = (0.02, 0.1, 0.4, 1.0, 1.0)
"""Seconds after each cancel message until the record is read again."""


class TaskHandle:
    """One submitted task: its progress, its result, and its cancellation.

    Deltas arrive at most once, and are kept within bounds from `publish` on until they are read. If the message with
    the result is lost, the result is requested. The subscriptions end with the task, or when the handle is dropped. A
    handle works in the event loop in which it was created.

    If the id of the ad belongs to another task, the result is a failure with `invalid_task`. It arrives immediately if
    that task has ended or has another submitter, else within seconds. That task is not affected.

    Args:
        submitter: Submitter of the task, if an operator submits it again; default: the submitter of the connection.
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
        """Publish the ad. Once this method returns, the task is stored and will end.

        Args:
            deltas: Whether progress is kept from now on; otherwise from the first step of `events` on.

        Raises:
            InvalidTask: A field of the ad is invalid; `field` names it.
            Overloaded: The intake is full.
            BusUnavailable: The server does not acknowledge.
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
        except BaseException:  # a cancelled caller has no handle to close
            self._updates.close()
            raise

    async def open(self, *, deltas: bool) -> None:
        """Subscribe to the result, and with `deltas` to progress; to be called before the task is published."""
        await self._updates.subscribe()
        if deltas:
            await self._updates.subscribe_to_deltas()

    async def close(self) -> None:
        """End the subscriptions; safe to call twice and from another event loop. `result` and `events` renew them."""
        if running_loop() is self._owner.loop:
            self._updates.close()
        else:
            self._updates.drop()

    async def result(self, timeout_s: float | None = None) -> TaskResult:
        """Wait for the end of the task and return its result, also that of a failed or cancelled task.

        Raises:
            TimeoutError: The task has not ended within `timeout_s`.
            BusUnavailable: No phase has answered for about half a minute.
            WrongEventLoop: The handle was created in another event loop.
        """
        result = self._updates.result
        if result.done():
            return result.result()
        self._owner.check()
        failed_polls = 0
        async with asyncio.timeout(timeout_s):
            wait_s = POLL_S if self._updates.subscribed else 0.0  # the result may have been published before
            await self._updates.subscribe()
            while True:
                await asyncio.wait([result], timeout=wait_s)
                if result.done():
                    break
                wait_s = POLL_S
                try:
                    await self._poll()
                except BusUnavailable:
                    failed_polls += 1
                    if failed_polls == MAX_FAILED_POLLS:
                        raise
                else:
                    failed_polls = 0
        return result.result()

    async def content(self, timeout_s: float | None = None) -> str:
        """Wait for the end of the task and return the text of its answer.

        Raises:
            LoomError: The task failed; class and code depend on the failure.
            TimeoutError: The task has not ended within `timeout_s`.
            WrongEventLoop: The handle was created in another event loop.
        """
        result = await self.result(timeout_s)
        if result.error is not None:
            raise result.error.to_exception(self.task_id)
        return result.content

    async def events(self) -> AsyncGenerator[Delta, None]:
        """Yield the progress of the task in order until it ends, each step once; a new attempt starts over.

        If the iteration is ended early, the task continues, and a further iteration starts with its then current
        progress.

        Raises:
            WrongEventLoop: The handle was created in another event loop.
        """
        self._owner.check()
        updates = self._updates
        updates.begin_reading()
        waiting = asyncio.ensure_future(self.result())
        waiting.add_done_callback(lambda _: updates.changed.set())
        try:
            await updates.subscribe_to_deltas()
            while True:
                while (delta := updates.next_delta()) is not None:
                    if (delta.attempt, delta.seq) >= (self._attempt, self._next_seq):
                        self._attempt, self._next_seq = delta.attempt, delta.seq + 1
                        yield delta
                if waiting.done():
                    return
                updates.changed.clear()
                await updates.changed.wait()
        finally:
            updates.end_reading()
            waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)  # the exception is raised again by `result`

    async def status(self) -> TaskResult:
        """Return the state of the task, and its result once it has ended."""
        return await status(self._bus, self.task_id)

    async def record(self) -> TaskRecord | None:
        """Return the record of the task; None while the task waits for admission."""
        return await record(self._bus, self.task_id)

    async def cancel(self) -> TaskResult:
        """Cancel the task and return its result; a task that has ended keeps its result.

        Raises:
            InvalidTask: The id belongs to a task with another ad, which is not cancelled.
        """
        if self._updates.ad_digest and self._updates.is_of_another_ad(await status(self._bus, self.task_id)):
            raise id_taken(self.task_id).to_exception(self.task_id)
        return await cancel(self._bus, self.task_id)

    async def _poll(self) -> None:
        current = await status(self._bus, self.task_id)
        if current.state in ENDED or self._updates.is_of_another_ad(current):
            self._updates.finish(current)


async def publish(bus: Bus, ad: TaskAd, *, deltas: bool = True, submitter: str = "") -> TaskHandle:
    """Publish a task and return its handle. Once this function returns, the task is stored and will end.

    Args:
        deltas: Whether progress is kept from now on.
        submitter: As for TaskHandle.

    Raises:
        InvalidTask: A field of the ad is invalid; `field` names it.
        Overloaded: The intake is full.
        BusUnavailable: The server does not acknowledge.
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
    """Publish a task and yield its handle, which is closed at the end of the block.

    Args:
        deltas: Whether progress is kept from the start.
        cancel_with_caller: Whether the task is cancelled when the caller is cancelled or ends an iteration early.
        cancelled: Called with the result of a task that was cancelled with its caller.

    Raises:
        InvalidTask: A field of the ad is invalid; `field` names it.
        Overloaded: The intake is full.
        BusUnavailable: The server does not acknowledge.
    """
    handle = TaskHandle(bus, ad)
    try:
        await handle.publish(deltas=deltas)
        yield handle
    except (asyncio.CancelledError, GeneratorExit):
        if cancel_with_caller:
            with contextlib.suppress(LoomError):  # the task was never stored, or no phase answers
                result = await handle.cancel()
                if cancelled is not None:
                    cancelled(result)
        raise
    finally:
        await handle.close()


def log_warnings(result: TaskResult) -> None:
    """Log the warnings of a result."""
    for warning in result.warnings:
        log.warning("task_warning", task_id=result.task_id, warning=warning)


async def request(
    bus: Bus, subject: str, message: Any = b"", *, timeout_s: float = REPLY_S, task_id: str | None = None
) -> bytes:
    """Send a request to SENSE and return the body of the reply, which may be the result of a failed task.

    Args:
        task_id: Task of the request, for the error if the request is refused.

    Raises:
        LoomError: The request is refused; its class is that of the error code.
        BusUnavailable: No phase answers.
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
    """Return the error of a refused request; None if the body is the result of a failed task."""
    try:
        return decode(raw, ErrorReply)
    except Undecodable:
        return None


def request_subject(bus: Bus, family: str, *task_id: str) -> str:
    """Return the subject of a request to SENSE, with the submitter if the client has one.

    Args:
        family: `submit`, `status` or `cancel`.
        task_id: Not for `submit`.
    """
    name = (bus.identity.submitter,) if bus.by_name else ()
    return bus.subjects.of(family, *name, *task_id)


async def status(bus: Bus, task_id: str) -> TaskResult:
    """Return the state of a task, and its result once it has ended.

    Raises:
        UnknownTask: No task has that id.
        BusUnavailable: No phase answers.
    """
    return decode(await request(bus, request_subject(bus, "status", task_id), task_id=task_id), TaskResult)


async def record(bus: Bus, task_id: str) -> TaskRecord | None:
    """Return the record of a task; None while the task waits for admission.

    Raises:
        UnknownTask: No task has that id.
        BusUnavailable: No phase answers.
    """
    reply = await request(bus, request_subject(bus, "status", task_id), StatusQuery(full=True), task_id=task_id)
    return decode(reply, TaskStatus).record


async def cancel(bus: Bus, task_id: str) -> TaskResult:
    """Cancel a task and return its result; a task that has ended keeps its result.

    Raises:
        UnknownTask: No task has that id.
        BusUnavailable: No phase answers.
    """
    return decode(await request(bus, request_subject(bus, "cancel", task_id), task_id=task_id), TaskResult)


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
