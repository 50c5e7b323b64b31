"""What one run delegates, from its `waiting` to the answer: published as a task, waited for, handed to the run."""

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
from loom.bus.records import records, update_record
from loom.bus.task_client import cancel_and_confirm
from loom.phases.execute.fencing import may_report
from loom.phases.execute.run_stream import RunStream
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

LOOK_AGAIN_S = 5.0  # a lost result message is found out this late
RETRY_S = 1.0
REPEAT_S = 1.0  # least time between repetitions of unconfirmed answers


class Delegations:
    """The delegated work of one run; while some of it is open the delivery holds no slot of this phase.

    Args:
        envelope: The delegating task's.
        top_up: Called when a slot has become free.
        earlier: What the run, or one before it, has delegated already.
    """

    def __init__(
        self,
        bus: Bus,
        config: ClusterConfig,
        envelope: Envelope,
        delivery: Delivery,
        top_up: Callable[[], None],
        earlier: Iterable[str] = (),
    ) -> None:
        self._bus, self._config, self._envelope, self._delivery = bus, config, envelope, delivery
        self._top_up = top_up
        self._records = records(bus)
        self._open: dict[str, asyncio.Task[None]] = {}
        self._calls: dict[str, int] = {}
        """Open errand -> which delegation of the attempt it is."""
        self._answers: dict[str, TaskResult] = {}
        """Answers the run has not said to have."""
        self._wanted = set(earlier)
        """What is to be cancelled should the run end now."""
        self._failed = False
        """Whether an answer was not a success."""
        self._released = ExitStack()
        """Takes no slot while a delegated task is open."""
        self._refusals = 0
        self._repeated_at = 0.0
        self._watch: RunStream | None = None
        self._noting = asyncio.Lock()
        self._spent = RunResult()

    @property
    def result(self) -> RunResult | None:
        """What delegated work has spent, for a run that can no longer say so itself."""
        return self._spent if self._spent.tokens or self._spent.usd else None

    async def hear(self, event: RunEvent, watch: RunStream) -> None:
        """Act on an event about delegated work; a heartbeat is an occasion to repeat answers that may be lost."""
        self._watch = watch
        if event.kind == "waiting" and event.ad is not None:
            task_id = delegated_id(self._envelope.task_id, self._envelope.attempt, event.call)
            await self._delegate(replace(event.ad, task_id=task_id), event.call, watch)
        elif event.kind == "resumed" and event.task_id in self._open:
            self._forget(event.task_id)
        elif event.kind == "heartbeat" and time.monotonic() - self._repeated_at >= REPEAT_S:
            self._repeated_at = time.monotonic()
            for task_id, answer in list(self._answers.items()):
                await watch.hand(Delegated(call=self._calls[task_id], task_id=task_id), answer)

    async def _delegate(self, ad: TaskAd, call: int, watch: RunStream) -> None:
        """Begin an errand and send the run its id; one that is open already only has its id sent again."""
        delegated = Delegated(call=call, task_id=ad.task_id)
        refused = None if ad.task_id in self._open else refusal(call, len(self._open))
        if refused is None:
            if ad.task_id not in self._open:
                self._begin(ad, call)
            await watch.hand(delegated)
        elif self._refusals < MAX_OPEN_DELEGATIONS:  # a flood is not answered one by one
            self._refusals += 1
            log.warning("delegation_refused", task_id=self._envelope.task_id, reason=refused.message)
            self._failed = self._failed or refused.code != "invalid_task"  # a wrong number is the host's own doing
            # Once: it is not kept, so that a flood of refused ones takes no memory.
            await watch.hand(delegated, TaskResult(task_id=ad.task_id, state="failed", error=refused))

    def _begin(self, ad: TaskAd, call: int) -> None:
        if not self._open:
            self._released.enter_context(self._delivery.released_slot())
            self._top_up()
        self._calls[ad.task_id] = call
        self._open[ad.task_id] = self._bus.tasks.spawn(self._run(ad), name=f"errand {ad.task_id}")
        self._wanted.add(ad.task_id)

    async def failed(self) -> bool:
        """Whether a task this run has delegated ended without a success, also under an earlier watcher of the run."""
        if self._failed:
            return True
        task_id, attempt = self._envelope.task_id, self._envelope.attempt
        own = await self._records.get(task_id)
        if own is None or not own.value.delegated:
            return False
        mine = {delegated_id(task_id, attempt, call) for call in range(1, MAX_DELEGATED + 1)}
        for child_id in mine.intersection(own.value.delegated):
            entry = await self._records.get(child_id)
            if entry is not None and child_of(entry.value, task_id) and entry.value.state in ("failed", "cancelled"):
                return True
        return False

    def _forget(self, task_id: str) -> None:
        """Close an errand the run does not wait for any more; without an answer it is cancelled."""
        self._open.pop(task_id).cancel()
        self._calls.pop(task_id)
        self._wanted.discard(task_id)
        if not self._open:
            self._released.close()
        if self._answers.pop(task_id, None) is None:
            cancelling = call_off(self._bus, self._envelope.task_id, [task_id], admitted=False)
            self._bus.tasks.spawn(cancelling, name=f"call off {task_id}")

    async def close(self, *, cancelling: bool) -> None:
        """Wait for nothing more; the run goes on elsewhere, or has ended and what it has delegated with it."""
        for errand in self._open.values():
            errand.cancel()
        self._released.close()
        self._open.clear()
        if cancelling:
            await call_off(self._bus, self._envelope.task_id, self._wanted)

    async def _run(self, ad: TaskAd) -> None:
        """See one errand through; whatever the bus refuses is tried again, for every step may be repeated."""
        while True:
            try:
                answer = await self._answer(ad)
                if answer is not None and self._watch is not None:
                    self._failed = self._failed or not answer.success
                    self._answers[ad.task_id] = answer
                    await self._watch.hand(Delegated(call=self._calls[ad.task_id], task_id=ad.task_id), answer)
            except LoomError as error:
                log.warning("errand_waits", errand=ad.task_id, **error_fields(error))
                await asyncio.sleep(RETRY_S)
            else:
                return

    async def _answer(self, ad: TaskAd) -> TaskResult | None:
        """What the run is to be told; None when it is no longer this message's to tell."""
        try:
            child = errand_for(self._envelope, ad, self._config)
        except InvalidTask as error:
            self._wanted.discard(ad.task_id)
            return TaskResult(task_id=ad.task_id, state="failed", error=TaskError.of(error))
        if not await self._note(ad.task_id):
            return None
        record = await self._ended(child)
        self._wanted.discard(ad.task_id)
        own = await self._records.get(self._envelope.task_id)
        if own is None or not self._mine(own.value):
            return None
        if not child_of(record, self._envelope.task_id):
            other = TaskError(code="invalid_task", message="the id names another task", field="task_id")
            return TaskResult(task_id=ad.task_id, state="failed", error=other)
        if ad.task_id not in self._answers:
            self._spent = self._spent.usage_with(total_usage(record))
        return answer_in(record)

    async def _note(self, task_id: str) -> bool:
        """Write the errand onto the delegating task's record, before there is one: who ends the task must see it."""

        def add(record: TaskRecord) -> TaskRecord | None:
            if not self._mine(record) or task_id in record.delegated:
                return None
            return replace(record, delegated=(*record.delegated, task_id)[-MAX_DELEGATED:])

        async with self._noting:  # errands of one run would only get into each other's way
            entry = await update_record(self._records, self._envelope.task_id, add)
        return entry is not None and self._mine(entry.value)

    def _mine(self, record: TaskRecord) -> bool:
        facts = self._delivery.facts
        return may_report(record, self._envelope.attempt, self._bus.instance, facts.stream_seq) == "report"

    async def _ended(self, child: Envelope) -> TaskRecord:
        """Publish the errand and return its record once it has ended."""
        told = asyncio.Event()

        async def tell(_msg: Msg) -> None:
            told.set()

        subjects = self._bus.subjects
        listening = await self._bus.connection.subscribe(subjects.of("result", child.submitter, child.task_id), tell)
        try:
            subject = subjects.task("sense", child.priority, child.task_id)
            await store_once(self._bus, subject, child, msg_id=f"{child.task_id}:delegate")
            while True:
                entry = await self._records.get(child.task_id)
                if entry is not None and entry.value.ended:
                    return entry.value
                with suppress(TimeoutError):
                    async with asyncio.timeout(LOOK_AGAIN_S):
                        await told.wait()
                told.clear()
        finally:
            self._bus.connection.unsubscribe(listening)


def errand_for(envelope: Envelope, ad: TaskAd, config: ClusterConfig) -> Envelope:
    """Return the first envelope of what a run of `envelope` delegates by `ad`.

    It is as urgent as the task it is for, ends no later, may spend no more, be divided no further and use no other
    tools.

    Raises:
        InvalidTask: It would be too deep, or breaks a rule of ads.
    """
    depth, limits = envelope.depth + 1, envelope.ad.limits
    most = config.max_depth
    if limits is not None and limits.max_depth is not None:
        most = min(most, limits.max_depth)
    if depth > most:
        raise InvalidTask(f"delegating once more would be {depth} deep, and max_depth is {most}", field="limits")
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


def answer_in(record: TaskRecord) -> TaskResult:
    """Return what the run gets of ended work: with all tokens it has taken, no longer than a message may be.

    Labels are not for agents, and are left out.
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


def child_of(record: TaskRecord, parent: str) -> bool:
    """Return whether a task was delegated by `parent`, as its record has it."""
    return record.envelope.split is not None and record.envelope.split.parent == parent


def refusal(call: int, opened: int) -> TaskError | None:
    """Return why a run may not delegate, or None.

    Args:
        call: Number of the delegation within the attempt, from 1, as the event has it.
        opened: Delegated tasks the run has open.
    """
    if call < 1:
        return TaskError(code="invalid_task", message="the delegations of an attempt are numbered from 1", field="call")
    if opened >= MAX_OPEN_DELEGATIONS:
        why = f"{opened} delegated tasks are open, and no more are allowed; wait until one of them has ended"
        return TaskError(code="overloaded", message=why)
    if call > MAX_DELEGATED:
        why = f"a run may delegate {MAX_DELEGATED} tasks, as many as the record of its task remembers"
        return TaskError(code="overloaded", message=why)
    return None


def goes_on(record: TaskRecord, parent: str) -> bool:
    """Return whether a task that `parent` has delegated has not ended."""
    return not record.ended and child_of(record, parent)


async def call_off(bus: Bus, parent: str, task_ids: Iterable[str], *, admitted: bool = True) -> None:
    """Cancel tasks that `parent` has delegated, and see that they are; those of another parent are left alone.

    Args:
        admitted: Whether a task without a record is left alone: it ends at its admission, for its parent has ended.
            Otherwise its record is waited for.
    """

    def is_over(record: TaskRecord | None) -> bool:
        return admitted if record is None else not goes_on(record, parent)

    async def call_off_one(task_id: str) -> None:
        try:
            await cancel_and_confirm(bus, task_id, is_over)
        except LoomError as error:
            log.warning("delegated_task_not_cancelled", delegated=task_id, **error_fields(error))

    await asyncio.gather(*map(call_off_one, task_ids))
