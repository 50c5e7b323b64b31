"""The tasks that one run delegates: each is published as a task, and its result is sent to the run."""

import asyncio
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack, suppress

from msgspec.structs import replace

from loom.bus.bus import Bus
from loom.bus.hops.delivery import Delivery
from loom.bus.hops.duplicates import store_once
from loom.bus.logs.log_fields import error_fields
from loom.bus.logs.logger import get_logger
from loom.bus.natsio.transport.message import Msg
from loom.bus.records import records
from loom.bus.task_client import cancel_and_confirm
from loom.phases.execute.claims import ownership
from loom.phases.execute.run_stream import RunStream
from loom.phases.execute.timings import ExecuteTimings
from loom.phases.shared.inherited_ad import inherited_ad
from loom.phases.shared.token_usage import total_usage
from loom.schemas.base import MAX_INPUTS_BYTES, cut_utf8
from loom.schemas.checks.ad import check_ad
from loom.schemas.config import ClusterConfig
from loom.schemas.envelope import Envelope, Split
from loom.schemas.errors import InvalidTask, LoomError
from loom.schemas.record import MAX_DELEGATED, TaskRecord
from loom.schemas.run import MAX_OPEN_DELEGATIONS, Delegated, RunEvent, delegated_id
from loom.schemas.task import RunResult, TaskAd, TaskError, TaskResult

log = get_logger()

RETRY_S = 1.0
REPEAT_S = 1.0  # least time between repetitions of unconfirmed results


class Delegations:
    """Publishes the tasks that one run delegates, waits for their ends, and sends the results to the run.

    While a delegated task is open the delivery holds no slot of this phase.

    Args:
        bus: A connected bus.
        config: Limits for delegated tasks.
        envelope: Envelope of the delegating task.
        delivery: The message of the delegating run.
        top_up: Called when a slot has become free.
        earlier: Ids of the tasks that this run, or one before it, has already delegated.
        poll_record_s: Seconds after which a record is read although no result message has arrived.
    """

    def __init__(
        self,
        bus: Bus,
        config: ClusterConfig,
        envelope: Envelope,
        delivery: Delivery,
        top_up: Callable[[], None],
        earlier: Iterable[str] = (),
        *,
        poll_record_s: float = ExecuteTimings.poll_record_s,
    ) -> None:
        self._bus, self._config, self._envelope, self._delivery = bus, config, envelope, delivery
        self._top_up = top_up
        self._poll_record_s = poll_record_s
        self._records = records(bus)
        self._open: dict[str, asyncio.Task[None]] = {}
        self._calls: dict[str, int] = {}
        """Open delegated task -> number of the delegation within the attempt."""
        self._results: dict[str, TaskResult] = {}
        """Results whose receipt the run has not confirmed."""
        self._unfinished = set(earlier)
        """Delegated tasks to cancel if the run ends now."""
        self._failed = False
        """Whether a result was not a success."""
        self._released = ExitStack()
        """Frees the slot of the delivery while a delegated task is open."""
        self._refusals = 0
        self._repeated_at = 0.0
        self._stream: RunStream | None = None
        self._recording = asyncio.Lock()
        self._usage = RunResult()

    @property
    def usage(self) -> RunResult | None:
        """Tokens and cost of delegated tasks, for a run that cannot report them any more; None if there are none."""
        return self._usage if self._usage.tokens or self._usage.usd else None

    async def on_event(self, event: RunEvent, stream: RunStream) -> None:
        """Process an event about delegated tasks; a heartbeat triggers the repetition of unconfirmed results."""
        self._stream = stream
        if event.kind == "waiting" and event.ad is not None:
            task_id = delegated_id(self._envelope.task_id, self._envelope.attempt, event.call)
            await self._delegate(replace(event.ad, task_id=task_id), event.call, stream)
        elif event.kind == "resumed" and event.task_id in self._open:
            self._close_task(event.task_id)
        elif event.kind == "heartbeat" and time.monotonic() - self._repeated_at >= REPEAT_S:
            self._repeated_at = time.monotonic()
            for task_id, result in list(self._results.items()):
                await stream.send_answer(Delegated(call=self._calls[task_id], task_id=task_id), result)

    async def _delegate(self, ad: TaskAd, call: int, stream: RunStream) -> None:
        """Start a delegated task and send the run its id; for a task that is already open, send only the id."""
        delegated = Delegated(call=call, task_id=ad.task_id)
        refused = None if ad.task_id in self._open else refusal(call, len(self._open))
        if refused is None:
            if ad.task_id not in self._open:
                self._start(ad, call)
            await stream.send_answer(delegated)
        elif self._refusals < MAX_OPEN_DELEGATIONS:  # a flood gets a limited number of answers
            self._refusals += 1
            log.warning("delegation_refused", task_id=self._envelope.task_id, reason=refused.message)
            self._failed = self._failed or refused.code != "invalid_task"  # a wrong number is an error of the host
            # Sent once and not kept, so that a flood of refusals takes no memory.
            await stream.send_answer(delegated, TaskResult(task_id=ad.task_id, state="failed", error=refused))

    def _start(self, ad: TaskAd, call: int) -> None:
        if not self._open:
            self._released.enter_context(self._delivery.released_slot())
            self._top_up()
        self._calls[ad.task_id] = call
        self._open[ad.task_id] = self._bus.tasks.spawn(self._run(ad), name=f"delegated {ad.task_id}")
        self._unfinished.add(ad.task_id)

    async def failed(self) -> bool:
        """Return whether a task that this run has delegated ended without success, also under an earlier handler."""
        if self._failed:
            return True
        task_id, attempt = self._envelope.task_id, self._envelope.attempt
        record = await self._records.get(task_id)
        if record is None or not record.value.delegated:
            return False
        own_ids = {delegated_id(task_id, attempt, call) for call in range(1, MAX_DELEGATED + 1)}
        for child_id in own_ids.intersection(record.value.delegated):
            entry = await self._records.get(child_id)
            if entry is not None and is_child_of(entry.value, task_id) and entry.value.state in ("failed", "cancelled"):
                return True
        return False

    def _close_task(self, task_id: str) -> None:
        """Close a delegated task that the run does not wait for any more; without a result it is cancelled."""
        self._open.pop(task_id).cancel()
        self._calls.pop(task_id)
        self._unfinished.discard(task_id)
        if not self._open:
            self._released.close()
        if self._results.pop(task_id, None) is None:
            cancelling = cancel_tasks(self._bus, self._envelope.task_id, [task_id], admitted=False)
            self._bus.tasks.spawn(cancelling, name=f"cancel {task_id}")

    async def close(self, *, cancelling: bool) -> None:
        """Wait for no more results: the run continues elsewhere, or has ended.

        Args:
            cancelling: Whether to cancel unfinished delegated tasks, because the run has ended.
        """
        for waiting in self._open.values():
            waiting.cancel()
        self._released.close()
        self._open.clear()
        if cancelling:
            await cancel_tasks(self._bus, self._envelope.task_id, self._unfinished)

    async def _run(self, ad: TaskAd) -> None:
        """Publish a delegated task and send its result to the run; retry after any error, for every step may repeat."""
        while True:
            try:
                result = await self._result(ad)
                if result is not None and self._stream is not None:
                    self._failed = self._failed or not result.success
                    self._results[ad.task_id] = result
                    delegated = Delegated(call=self._calls[ad.task_id], task_id=ad.task_id)
                    await self._stream.send_answer(delegated, result)
            except LoomError as error:
                log.warning("delegation_retry", delegated=ad.task_id, **error_fields(error))
                await asyncio.sleep(RETRY_S)
            else:
                return

    async def _result(self, ad: TaskAd) -> TaskResult | None:
        """Return the result for the run; None if this message does not own the attempt any more."""
        try:
            child = delegated_envelope(self._envelope, ad, self._config)
        except InvalidTask as error:
            self._unfinished.discard(ad.task_id)
            return TaskResult(task_id=ad.task_id, state="failed", error=TaskError.of(error))
        if not await self._record(ad.task_id):
            return None
        record = await self._ended(child)
        self._unfinished.discard(ad.task_id)
        parent = await self._records.get(self._envelope.task_id)
        if parent is None or not self._owns_claim(parent.value):
            return None
        if not is_child_of(record, self._envelope.task_id):
            other = TaskError(code="invalid_task", message="the id names another task", field="task_id")
            return TaskResult(task_id=ad.task_id, state="failed", error=other)
        if ad.task_id not in self._results:
            self._usage = self._usage.usage_with(total_usage(record))
        return result_for_run(record)

    async def _record(self, task_id: str) -> bool:
        """Add the id to the delegating task's record before the task exists, so that the end of the parent finds it.

        Returns:
            Whether this message still owns the attempt.
        """

        def add(record: TaskRecord) -> TaskRecord | None:
            if not self._owns_claim(record) or task_id in record.delegated:
                return None
            return replace(record, delegated=(*record.delegated, task_id)[-MAX_DELEGATED:])

        async with self._recording:  # concurrent writes of one run would only conflict
            entry = await self._records.update_with(self._envelope.task_id, add)
        return entry is not None and self._owns_claim(entry.value)

    def _owns_claim(self, record: TaskRecord) -> bool:
        facts = self._delivery.facts
        return ownership(record, self._envelope.attempt, self._bus.instance, facts.stream_seq) == "own"

    async def _ended(self, child: Envelope) -> TaskRecord:
        """Publish the delegated task and return its record once it has ended."""
        result_published = asyncio.Event()

        async def on_result(_msg: Msg) -> None:
            result_published.set()

        subjects, connection = self._bus.subjects, self._bus.connection
        subscription = await connection.subscribe(subjects.of("result", child.submitter, child.task_id), on_result)
        try:
            subject = subjects.task("sense", child.priority, child.task_id)
            await store_once(self._bus, subject, child, msg_id=f"{child.task_id}:delegate")
            while True:
                entry = await self._records.get(child.task_id)
                if entry is not None and entry.value.ended:
                    return entry.value
                with suppress(TimeoutError):
                    async with asyncio.timeout(self._poll_record_s):
                        await result_published.wait()
                result_published.clear()
        finally:
            connection.unsubscribe(subscription)


def delegated_envelope(envelope: Envelope, ad: TaskAd, config: ClusterConfig) -> Envelope:
    """Return the first envelope of a task that a run of `envelope` delegates.

    The delegated task has the parent's priority and deadline. It may spend no more, be divided no further and use no
    other tools than the parent.

    Raises:
        InvalidTask: The task would be nested too deep, or breaks a rule of ads.
    """
    depth, limits = envelope.depth + 1, envelope.ad.limits
    max_depth = config.max_depth
    if limits is not None and limits.max_depth is not None:
        max_depth = min(max_depth, limits.max_depth)
    if depth > max_depth:
        raise InvalidTask(f"delegating once more would be {depth} deep, and max_depth is {max_depth}", field="limits")
    budgets = [tokens for tokens in (ad.token_budget, envelope.budget) if tokens is not None]
    grant = min(budgets, default=None)
    if grant is not None and grant < 1:
        raise InvalidTask("no tokens are left to delegate with", field="token_budget")
    ad = check_ad(inherited_ad(replace(ad, priority=envelope.priority, token_budget=grant), envelope.ad))
    split = Split(parent=envelope.task_id, depth=depth, grant=grant, deadline=envelope.deadline)
    return Envelope(
        ad=ad,
        submitter=envelope.submitter,
        split=split,
        deadline=envelope.deadline,
        budget=grant,
        trace=envelope.trace,
    )


def result_for_run(record: TaskRecord) -> TaskResult:
    """Return the result of an ended task as its delegating run gets it.

    It counts all tokens that the task has used. Its content is cut to what a message may carry. Labels are removed,
    because they are not meant for agents.
    """
    result, used = record.to_result(), total_usage(record)
    content, cut = cut_utf8(result.content, MAX_INPUTS_BYTES)
    return replace(
        result,
        content=content,
        truncated=result.truncated or cut,
        prompt_tokens=used.prompt_tokens,
        completion_tokens=used.completion_tokens,
        estimated_usage=used.estimated_usage,
        labels={},
    )


def is_child_of(record: TaskRecord, parent: str) -> bool:
    """Return whether the record is of a task that `parent` has delegated."""
    return record.envelope.split is not None and record.envelope.split.parent == parent


def refusal(call: int, opened: int) -> TaskError | None:
    """Return the reason why a run may not delegate; None if it may.

    Args:
        call: Number of the delegation within the attempt, from 1, as in the event.
        opened: Number of delegated tasks that the run has open.
    """
    if call < 1:
        return TaskError(code="invalid_task", message="the delegations of an attempt are numbered from 1", field="call")
    if opened >= MAX_OPEN_DELEGATIONS:
        why = f"{opened} delegated tasks are open, and no more are allowed; wait until one of them has ended"
        return TaskError(code="overloaded", message=why)
    if call > MAX_DELEGATED:
        why = f"a run may delegate {MAX_DELEGATED} tasks, as many as the record of its task keeps"
        return TaskError(code="overloaded", message=why)
    return None


async def cancel_tasks(bus: Bus, parent: str, task_ids: Iterable[str], *, admitted: bool = True) -> None:
    """Cancel tasks that `parent` has delegated, and wait until they have ended; tasks of another parent are skipped.

    Args:
        bus: A connected bus.
        parent: Id of the delegating task.
        task_ids: Tasks to cancel.
        admitted: Whether a task without a record is skipped: its parent has ended, so its admission will end it.
            Otherwise its record is awaited.
    """

    def is_over(record: TaskRecord | None) -> bool:
        return admitted if record is None else not is_running_child(record, parent)

    async def cancel(task_id: str) -> None:
        try:
            await cancel_and_confirm(bus, task_id, is_over)
        except LoomError as error:
            log.warning("delegated_task_not_cancelled", delegated=task_id, **error_fields(error))

    await asyncio.gather(*map(cancel, task_ids))


def is_running_child(record: TaskRecord, parent: str) -> bool:
    """Return whether the record is of a task that `parent` has delegated and that has not ended."""
    return not record.ended and is_child_of(record, parent)
