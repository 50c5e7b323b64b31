"""The plans of divided tasks: stored in the bucket `plans`, changed by compare-and-set, and carried out.

Every change is stored before the messages that follow from it are published. A process that dies in between leaves a
plan from which the next message about it publishes them again; their message ids make repeated ones harmless.
"""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from weakref import WeakValueDictionary

from msgspec.structs import replace

from loom.bus.bus import Bus
from loom.bus.hops.duplicates import store_once
from loom.bus.hops.hop_loop import schedule
from loom.bus.hops.outcomes import Done, Fail, Next, Outcome
from loom.bus.logs.logger import get_logger
from loom.bus.natsio.server_errors import Conflict
from loom.bus.records import records
from loom.bus.task_client import cancel_and_confirm
from loom.phases.scale import subtask_graph
from loom.phases.shared.scale_rule import with_undivided_note
from loom.phases.shared.token_usage import with_subtask_usage
from loom.schemas.base import MAX_CONTENT_BYTES, Undecodable, cut_utf8
from loom.schemas.envelope import Envelope
from loom.schemas.errors import BusUnavailable
from loom.schemas.events import SubtaskEvent
from loom.schemas.notices import PlanTimeout
from loom.schemas.plan import SplitPlan, Subtask
from loom.schemas.record import TaskRecord
from loom.schemas.task import RunResult, TaskError

log = get_logger()

PLAN_OVER = TaskError(code="subtask_failed", message="the plan of the task is over")


class Division:
    """Stores the plans of divided tasks and publishes the messages that follow from them."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self._records = records(bus)
        self._plans = bus.bucket("plans", SplitPlan)
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        """Parent id -> lock of its plan in this process, so that only other replicas cause conflicts."""

    async def get(self, parent_id: str) -> SplitPlan | None:
        """Return the plan of a task; None without one.

        Raises:
            Undecodable: The stored plan cannot be decoded.
        """
        entry = await self._plans.get(parent_id)
        return None if entry is None else entry.value

    async def get_if_readable(self, parent_id: str) -> SplitPlan | None:
        """Return the plan of a task; None without one and, with a warning in the log, for one that is undecodable."""
        try:
            return await self.get(parent_id)
        except Undecodable as error:
            log.warning("plan_undecodable", reason=error.message)
            return None

    async def create(self, plan: SplitPlan) -> bool:
        """Store a new plan; return False where the task has a plan already."""
        try:
            await self._plans.create(plan.parent_id, plan)
        except Conflict:  # another copy of the message was faster
            return False
        return True

    async def resume(self, plan: SplitPlan, envelope: Envelope) -> Outcome:
        """Carry out a stored plan for an attempt of its task; the hops continue from that attempt's message.

        A newer attempt replaces the parked one before anything is published, so that later results of the plan reach
        the newer one. An older attempt ends here, because the message of the newer one goes on.

        Args:
            plan: As read or created.
            envelope: Of the attempt.
        """
        if not plan.subtasks:
            return Next("execute", _undivided(subtask_graph.with_planning_usage(plan, envelope), plan.note))
        change = await self._update(envelope.task_id, lambda plan: subtask_graph.with_newer_attempt(plan, envelope))
        if change is None:
            raise BusUnavailable(f"the plan of {envelope.task_id} is gone")
        plan = change[1]
        if envelope.attempt < plan.envelope.attempt:
            return Done()
        if plan.state == "done" and plan.error is None:
            return await self._end_without_plan(plan)
        outcome = await self.carry_out(plan, subtask_graph.running_subtasks(plan))
        return Next(outcome.phase, outcome.envelope) if isinstance(outcome, Next) else outcome

    async def record_child(self, parent_id: str, child_id: str) -> Outcome:
        """Record the end of a subtask, and publish the messages that follow from it."""
        child = await self._records.get(child_id)
        if child is None or not child.value.ended:
            log.warning("subtask_not_ended", child_id=child_id)
            return Done()
        change = await self._update(parent_id, lambda plan: subtask_graph.record_child(plan, child.value))
        if change is None:
            log.info("subtask_without_plan", child_id=child_id)
            return Done()
        before, plan = change
        await self._publish_event(plan, subtask_graph.ended_event(plan, child.value, self._bus.clock.now()))
        if plan != before and before.state == "done":
            return Done()  # a message of its own ends the parent, or has ended it
        if plan != before:
            running = {subtask.id for subtask in subtask_graph.running_subtasks(before)}
            started = [subtask for subtask in subtask_graph.running_subtasks(plan) if subtask.id not in running]
            return await self.carry_out(plan, started)
        # Recorded before, perhaps by a process that died before it published: the messages are published again.
        return await self.carry_out(plan, subtask_graph.unblocked_by(plan, child_id))

    async def finish(self, parent_id: str) -> None:
        """End the plan of a task that has ended, and cancel the subtasks that still run.

        A subtask that is not admitted yet finds at its admission that its parent has ended.

        Raises:
            BusUnavailable: The cancellation of a subtask was not confirmed.
        """
        change = await self._update(parent_id, subtask_graph.finish)
        if change is not None:
            await self._remove_timer(parent_id)
            running = subtask_graph.running_subtasks(change[1])
            await asyncio.gather(
                *(cancel_and_confirm(self._bus, subtask.child_id or "", _is_over) for subtask in running)
            )

    async def carry_out(self, plan: SplitPlan, started: Sequence[Subtask]) -> Outcome:
        """Publish the messages that follow from a stored plan; consumers ignore repeated ones.

        Args:
            started: The subtasks to publish.
        """
        match plan.state:
            case "running":
                if started:
                    await self._start(plan, started)
                return Done()
            case "joining":
                await self._remove_timer(plan.parent_id)
                outputs = await self._outputs(plan, [subtask.id for subtask in plan.subtasks])
                return Next("execute", subtask_graph.synthesis_envelope(plan, outputs), _message_id(plan, "join"))
            case "done":
                return await self._fail(plan)

    async def _update(
        self, parent_id: str, decide: Callable[[SplitPlan], SplitPlan]
    ) -> tuple[SplitPlan, SplitPlan] | None:
        """Change a plan by compare-and-set; return it before and after the change, None without a plan."""
        before: list[SplitPlan] = []

        def change(plan: SplitPlan) -> SplitPlan | None:
            before[:] = [plan]
            changed = decide(plan)
            return None if changed == plan else changed

        async with self._locks.setdefault(parent_id, asyncio.Lock()):
            entry = await self._plans.update_with(parent_id, change)
        return None if entry is None else (before[0], entry.value)

    async def _end_without_plan(self, plan: SplitPlan) -> Outcome:
        """Fail a task that runs although its plan is over, because no other message can end it."""
        record = await self._records.get(plan.parent_id)
        if record is None or record.value.ended:
            return Done()
        return Fail(PLAN_OVER, with_subtask_usage(plan.envelope, plan.subtasks))

    async def _start(self, plan: SplitPlan, started: Sequence[Subtask]) -> None:
        parent = plan.envelope
        await schedule(
            self._bus,
            self._bus.subjects.later("scale", plan.parent_id, "timer"),
            target=self._bus.subjects.task("scale", parent.priority, plan.parent_id),
            at=parent.deadline,
            message=PlanTimeout(envelope=parent),
            msg_id=_message_id(plan, "timer"),
        )
        # Read after the plan is stored and the timer set: a process that ends or joins the parent reads one of them.
        record, entry = await asyncio.gather(self._records.get(plan.parent_id), self._plans.get(plan.parent_id))
        if record is None or record.value.ended:
            await self.finish(plan.parent_id)
            return
        if entry is not None and entry.value.state != "running":
            await self._remove_timer(plan.parent_id)
            return
        outputs = await self._outputs(plan, [name for subtask in started for name in subtask.dependencies])
        await asyncio.gather(*(self._publish_subtask(plan, subtask, outputs) for subtask in started))

    async def _publish_subtask(self, plan: SplitPlan, subtask: Subtask, outputs: Mapping[str, str]) -> None:
        now = self._bus.clock.now()
        child = subtask_graph.child_envelope(plan, subtask, outputs, now)
        await self._publish_event(plan, subtask_graph.begun_event(plan, subtask, now))  # precedes the event of its end
        subject = self._bus.subjects.task("sense", child.priority, child.task_id)
        await store_once(self._bus, subject, child, msg_id=f"{child.task_id}:begin")

    async def _publish_event(self, plan: SplitPlan, event: SubtaskEvent | None) -> None:
        """Publish the start or the end of a subtask for clients; a repeated message repeats the event."""
        if event is not None:
            subject = self._bus.subjects.of("subtask", plan.envelope.submitter, plan.parent_id)
            await self._bus.connection.publish(subject, event)

    async def _outputs(self, plan: SplitPlan, names: Sequence[str]) -> dict[str, str]:
        """Return subtask id -> output for the named subtasks, read from their records."""
        child_ids = {
            subtask.id: subtask.child_id for subtask in plan.subtasks if subtask.id in names and subtask.child_id
        }
        entries = await asyncio.gather(*(self._records.get(child_id) for child_id in child_ids.values()))
        return {
            name: entry.value.envelope.result.content
            for name, entry in zip(child_ids, entries, strict=True)
            if entry is not None and entry.value.envelope.result is not None
        }

    async def _fail(self, plan: SplitPlan) -> Outcome:
        """Pass the parent of a failed plan to EVALUATE; a plan without an error is over because its parent ended."""
        error = plan.error
        if error is None:
            return Done()
        await self._remove_timer(plan.parent_id)
        failed = with_subtask_usage(plan.envelope, plan.subtasks)
        failed = replace(failed, error=error, result=await self._partial_result(plan, error))
        return Next("evaluate", failed, _message_id(plan, "planfail"))

    async def _partial_result(self, plan: SplitPlan, error: TaskError) -> RunResult | None:
        """Return the outputs so far as the result of a task whose budget is spent; None for other errors."""
        if error.code != "budget_exceeded":
            return None
        ended = [subtask.id for subtask in plan.subtasks if subtask.state in ("succeeded", "failed")]
        outputs = await self._outputs(plan, ended)
        content, cut = cut_utf8("\n\n".join(filter(None, outputs.values())), MAX_CONTENT_BYTES)
        return RunResult(content=content, truncated=cut) if content else None

    async def _remove_timer(self, parent_id: str) -> None:
        """Purge the parked parent from the stream, where it would count as work."""
        stream = self._bus.subjects.stream("TASKS")
        await self._bus.jetstream.api(
            f"STREAM.PURGE.{stream}", {"filter": self._bus.subjects.later("scale", parent_id, "timer")}
        )


def _is_over(record: TaskRecord | None) -> bool:
    return record is None or record.ended


def _message_id(plan: SplitPlan, kind: str) -> str:
    """Return the id of a message that follows from a plan, unique per attempt of the parent."""
    return f"{plan.parent_id}:{kind}-{plan.envelope.attempt}"


def _undivided(envelope: Envelope, why: str) -> Envelope:
    """Return the envelope of a task that stays whole, with the reason in its note."""
    spec = envelope.spec
    return envelope if spec is None else replace(envelope, spec=replace(with_undivided_note(spec, why), whole=True))
