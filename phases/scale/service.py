"""Scale: divide a hard task into a graph of subtasks, ask for a node where one is missing, and pass the rest on.

Consumes   task.scale.*.*    awarded tasks; the notices SubtaskEnded, PlanTimeout and ParentEnded
Publishes  task.sense        the first envelope of each subtask, once all it depends on has succeeded
           later.<parent>    a PlanTimeout with the parked parent, due at its deadline
           task.execute      a task as it came, or a parent with its subtasks' outputs, to be put together
           cancel.<child>    that a subtask is to stop, once its parent has ended
           subtask.<submitter>.<parent>   that a subtask has begun or ended
           spawn             a request for one more node, to hosts that can start some
State      plans: one per divided task, changed by compare-and-set, then what follows is published. A plan
           answers for the newest attempt that has asked for it
Gives up   deadline_exceeded, invalid_plan, subtask_failed, budget_exceeded
"""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from weakref import WeakValueDictionary

from msgspec.structs import replace

from loom.bus.bus import Bus
from loom.bus.hops.delivery import Delivery
from loom.bus.hops.duplicates import store_once
from loom.bus.hops.health import Health
from loom.bus.hops.hop_loop import SLOTS, HopLoop, Service, schedule
from loom.bus.hops.outcomes import Dead, Done, Fail, Next, Outcome
from loom.bus.logs.logger import get_logger
from loom.bus.natsio.server_errors import Conflict
from loom.bus.records import records
from loom.bus.topology import SCALE_LANE
from loom.phases.scale import planner, subtask_graph
from loom.phases.scale.spawn_requests import SpawnRequests
from loom.phases.shared.division import is_saturated, undivided, wants_scale
from loom.phases.shared.token_usage import before_the_run, charged, with_parts
from loom.schemas.base import MAX_CONTENT_BYTES, Undecodable, cut_utf8
from loom.schemas.config import ClusterConfig
from loom.schemas.envelope import Envelope
from loom.schemas.errors import BusUnavailable, InvalidPlan
from loom.schemas.events import SubtaskEvent
from loom.schemas.llm import LLMProvider
from loom.schemas.notices import ParentEnded, PlanTimeout, ScaleMessage, SubtaskEnded, read_scale_message
from loom.schemas.plan import SplitPlan, Subtask
from loom.schemas.task import RunResult, TaskError

log = get_logger()

CANCEL_S = (0.02, 0.1, 0.4, 1.0, 1.0)  # waits for SENSE to record a cancel
TRIES = 64  # notices of one plan come together; each of them is one change
LATE = TaskError(code="deadline_exceeded", message="the deadline passed before the run began")
PARKED = TaskError(code="deadline_exceeded", message="the deadline passed before all subtasks had ended")
OVER = TaskError(code="subtask_failed", message="the plan of the task is over")


class Scale:
    """The third phase."""

    def __init__(self, bus: Bus, config: ClusterConfig, llm: LLMProvider | None = None) -> None:
        self._bus = bus
        self._config = config
        self._llm = llm
        self._records = records(bus)
        self._plans = bus.bucket("plans", SplitPlan)
        self._nodes = SpawnRequests(bus)
        self._turns: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        """Parent -> held by who changes its plan: only other replicas are met at the compare-and-set."""
        self._loop: HopLoop[ScaleMessage] = HopLoop(
            bus,
            Service("scale", [(SCALE_LANE, SLOTS)], Envelope, self.handle, read=read_scale_message, end=self.end_dead),
        )

    def health(self) -> Health:
        """Return how far the work has got."""
        return self._loop.health()

    async def start(self) -> None:
        """Begin to divide tasks and to pass them on."""
        await self._loop.start()

    async def drain(self, timeout_s: float) -> None:
        """Take nothing new, finish for at most `timeout_s`."""
        await self._loop.drain(timeout_s)

    async def handle(self, message: ScaleMessage, _delivery: Delivery) -> Outcome:
        """Divide the task, or pass it on; or go on with a plan after a notice about it."""
        match message:
            case SubtaskEnded(task_id=parent_id, child_id=child_id):
                return await self._on_subtask_ended(parent_id, child_id)
            case ParentEnded(task_id=parent_id):
                return await self._on_end(parent_id)
            case PlanTimeout(envelope=envelope):
                return Fail(PARKED, await self._as_parked(envelope))
            case Envelope() as envelope:
                return await self._on_task(envelope)

    async def end_dead(self, envelope: Envelope, raw: bytes) -> None:
        """Hand a task whose message is dead to EVALUATE; one about which a notice is dead, unless that has ended."""
        notice = _notice_in(raw)
        if isinstance(notice, ParentEnded):
            return
        if isinstance(notice, SubtaskEnded):
            try:
                plan = await self._plans.get(envelope.task_id)
            except Undecodable as error:  # the timer of the parked task ends it
                log.warning("plan_undecodable", reason=error.message)
                return
            if plan is None or plan.value.state != "running":
                return
            envelope = replace(plan.value.envelope, error=envelope.error)
        subject = self._bus.subjects.task("evaluate", envelope.priority, envelope.task_id)
        msg_id = f"{envelope.task_id}:dead:scale-{envelope.attempt}"
        await store_once(self._bus, subject, envelope, msg_id=msg_id)

    async def _as_parked(self, envelope: Envelope) -> Envelope:
        """Return a parked task's envelope with what its subtasks have used; `envelope` where its plan is unreadable."""
        try:
            entry = await self._plans.get(envelope.task_id)
        except Undecodable as error:
            log.warning("plan_undecodable", reason=error.message)
            return envelope
        if entry is None:
            return envelope
        plan = subtask_graph.for_attempt(entry.value, envelope)
        return with_parts(plan.envelope, plan.subtasks)

    async def _on_task(self, envelope: Envelope) -> Outcome:
        if envelope.spec is None:
            return Dead("the envelope came without a spec")
        if self._bus.clock.now() >= envelope.deadline:
            return Fail(LATE, envelope)
        if envelope.award is not None and is_saturated(envelope.award):
            self._nodes.ask(envelope, saturated=True)
        match wants_scale(envelope):
            case "no_bids":
                self._nodes.ask(envelope, saturated=False)
                return Next("match", envelope)
            case "divide":
                return await self._divide(envelope)
            case _:
                return Next("execute", envelope)

    # -- dividing

    async def _divide(self, envelope: Envelope) -> Outcome:
        """Park the task and begin its subtasks; a task that has a plan already goes on with that."""
        entry = await self._plans.get(envelope.task_id)
        if entry is not None:
            return await self._answer(envelope, entry.value)
        try:
            subtasks = planner.plan_from_ad(envelope.ad, self._config)
        except InvalidPlan as error:
            return Fail(TaskError.of(error), envelope)
        if subtasks is not None:
            plan = subtask_graph.start_plan(envelope, subtasks)
        elif self._llm is not None:
            plan = await self._ask_for_plan(envelope, self._llm)
        else:
            plan = subtask_graph.keep_whole(envelope, "no model is there to plan")
        try:
            await self._plans.create(envelope.task_id, plan)
        except Conflict:  # a twin of the message was faster
            return await self._divide(envelope)
        log.info("divided", subtasks=len(plan.subtasks), begun=len(subtask_graph.running(plan)), note=plan.note)
        return await self._answer(envelope, plan)

    async def _answer(self, envelope: Envelope, plan: SplitPlan) -> Outcome:
        """Carry out a stored plan for the attempt that asks; the hops follow from its own message.

        A newer attempt takes the place of the parked one before anything is published: whatever the plan comes to
        later, comes with it. An older one has nothing to wait for, because the message of the newer one goes on.
        """
        if not plan.subtasks:
            return Next("execute", _whole(subtask_graph.charged_as(plan, envelope), plan.note))
        change = await self._change(envelope.task_id, lambda plan: subtask_graph.for_attempt(plan, envelope))
        if change is None:
            raise BusUnavailable(f"the plan of {envelope.task_id} is gone")
        plan = change[1]
        if envelope.attempt < plan.envelope.attempt:
            return Done()
        if plan.state == "done" and plan.error is None:
            return await self._over(plan)
        outcome = await self._carry_out(plan, subtask_graph.running(plan))
        return Next(outcome.phase, outcome.envelope) if isinstance(outcome, Next) else outcome

    async def _over(self, plan: SplitPlan) -> Outcome:
        """Nothing for a task that has ended; one that still runs with such a plan has no way to end, and fails."""
        record = await self._records.get(plan.parent_id)
        if record is None or record.value.ended:
            return Done()
        return Fail(OVER, with_parts(plan.envelope, plan.subtasks))

    async def _ask_for_plan(self, envelope: Envelope, llm: LLMProvider) -> SplitPlan:
        """A model's plan; where it has none of use, the task stays whole, and the plan says why."""
        left_s, budget = envelope.deadline - self._bus.clock.now(), before_the_run(envelope)
        answer = await planner.plan_from_model(llm, envelope.ad, self._config, left_s, budget)
        envelope, subtasks = charged(envelope, "scale", answer.usage), answer.value
        if isinstance(answer.error, InvalidPlan):
            return subtask_graph.keep_whole(envelope, f"the model's plan cannot be used: {answer.error.message}")
        if subtasks is None:
            return subtask_graph.keep_whole(envelope, f"the model could not be asked: {answer.why}")
        if len(subtasks) == 1:
            return subtask_graph.keep_whole(envelope, "the model sees one task in it")
        return subtask_graph.start_plan(envelope, subtasks)

    # -- notices

    async def _on_subtask_ended(self, parent_id: str, child_id: str) -> Outcome:
        """A subtask has ended: note it, and publish what follows."""
        child = await self._records.get(child_id)
        if child is None or not child.value.ended:
            log.warning("notice_too_early", child_id=child_id)
            return Done()
        change = await self._change(parent_id, lambda plan: subtask_graph.record_child(plan, child.value))
        if change is None:
            log.info("notice_without_plan", child_id=child_id)
            return Done()
        before, plan = change
        await self._report(plan, subtask_graph.ended_event(plan, child.value, self._bus.clock.now()))
        if plan != before and before.state == "done":
            return Done()  # the parent's end is published already, or will be by a message of its own
        if plan != before:
            known = {part.id for part in subtask_graph.running(before)}
            return await self._carry_out(plan, [part for part in subtask_graph.running(plan) if part.id not in known])
        # Told before, perhaps by a process that died right then: what followed is published again.
        return await self._carry_out(plan, subtask_graph.begun_by(plan, child_id))

    async def _on_end(self, parent_id: str) -> Outcome:
        """The divided task has ended: its plan is over, and so are the subtasks that still run."""
        change = await self._change(parent_id, subtask_graph.finish)
        if change is not None:
            await self._drop_timer(parent_id)
            await asyncio.gather(*(self._cancel(part) for part in subtask_graph.running(change[1])))
        return Done()

    async def _change(
        self, parent_id: str, decide: Callable[[SplitPlan], SplitPlan]
    ) -> tuple[SplitPlan, SplitPlan] | None:
        """Change a plan, and return how it was and how it is; None when there is none."""
        async with self._turns.setdefault(parent_id, asyncio.Lock()):
            for _ in range(TRIES):
                entry = await self._plans.get(parent_id)
                if entry is None:
                    return None
                wanted = decide(entry.value)
                if wanted == entry.value:
                    return wanted, wanted
                try:
                    await self._plans.update(parent_id, wanted, entry.revision)
                except Conflict:
                    continue
                return entry.value, wanted
        raise BusUnavailable(f"the plan of {parent_id} would not hold still")

    async def _cancel(self, part: Subtask) -> None:
        """Have a subtask cancelled, and see that it is; a phase's inbox gets no answer of SENSE.

        One that is not admitted yet finds at its admission that its parent has ended.
        """
        child_id = part.child_id or ""
        for wait_s in CANCEL_S:
            entry = await self._records.get(child_id)
            if entry is None or entry.value.ended:
                return
            await self._bus.connection.publish(self._bus.subjects.of("cancel", child_id))
            await asyncio.sleep(wait_s)
        raise BusUnavailable(f"nobody cancels {child_id}")

    # -- what a plan implies

    async def _carry_out(self, plan: SplitPlan, begun: Sequence[Subtask]) -> Outcome:
        """Publish what the stored plan implies; every reader bears hearing it twice.

        Args:
            begun: The subtasks to publish.
        """
        match plan.state:
            case "running":
                if begun:
                    await self._begin(plan, begun)
                return Done()
            case "joining":
                await self._drop_timer(plan.parent_id)
                outputs = await self._outputs(plan, [part.id for part in plan.subtasks])
                return Next("execute", subtask_graph.synthesis_envelope(plan, outputs), _id(plan, "join"))
            case "done":
                return await self._fail(plan)

    async def _begin(self, plan: SplitPlan, begun: Sequence[Subtask]) -> None:
        parent = plan.envelope
        await schedule(
            self._bus,
            self._bus.subjects.later("scale", plan.parent_id, "timer"),
            target=self._bus.subjects.task("scale", parent.priority, plan.parent_id),
            at=parent.deadline,
            message=PlanTimeout(envelope=parent),
            msg_id=_id(plan, "timer"),
        )
        # Read after the plan is stored and the timer set: whoever ends or joins the parent sees one of them.
        record, entry = await asyncio.gather(self._records.get(plan.parent_id), self._plans.get(plan.parent_id))
        if record is None or record.value.ended:
            await self._on_end(plan.parent_id)
            return
        if entry is not None and entry.value.state != "running":
            await self._drop_timer(plan.parent_id)
            return
        outputs = await self._outputs(plan, [name for part in begun for name in part.dependencies])
        await asyncio.gather(*(self._publish(plan, part, outputs) for part in begun))

    async def _publish(self, plan: SplitPlan, part: Subtask, outputs: Mapping[str, str]) -> None:
        now = self._bus.clock.now()
        child = subtask_graph.child_of(plan, part, outputs, now)
        await self._report(
            plan, subtask_graph.begun_event(plan, part, now)
        )  # first, so that it precedes the subtask's end
        subject = self._bus.subjects.task("sense", child.priority, child.task_id)
        await store_once(self._bus, subject, child, msg_id=f"{child.task_id}:begin")

    async def _report(self, plan: SplitPlan, event: SubtaskEvent | None) -> None:
        """Publish for clients that a subtask has begun or ended, each time it is handled."""
        if event is not None:
            await self._bus.connection.publish(
                self._bus.subjects.of("subtask", plan.envelope.submitter, plan.parent_id), event
            )

    async def _outputs(self, plan: SplitPlan, names: Sequence[str]) -> dict[str, str]:
        """What came out of the named subtasks, read from their records."""
        wanted = {part.id: part.child_id for part in plan.subtasks if part.id in names and part.child_id}
        entries = await asyncio.gather(*(self._records.get(child_id) for child_id in wanted.values()))
        return {
            name: entry.value.envelope.result.content
            for name, entry in zip(wanted, entries, strict=True)
            if entry is not None and entry.value.envelope.result is not None
        }

    async def _fail(self, plan: SplitPlan) -> Outcome:
        """Hand the parent of a failed plan to EVALUATE; one that is over for another reason has ended already."""
        error = plan.error
        if error is None:
            return Done()
        await self._drop_timer(plan.parent_id)
        failed = with_parts(plan.envelope, plan.subtasks)
        failed = replace(failed, error=error, result=await self._partial(plan, error))
        return Next("evaluate", failed, _id(plan, "planfail"))

    async def _partial(self, plan: SplitPlan, error: TaskError) -> RunResult | None:
        """What there is for a budget that is spent: the outputs so far."""
        if error.code != "budget_exceeded":
            return None
        outputs = await self._outputs(
            plan, [part.id for part in plan.subtasks if part.state in ("succeeded", "failed")]
        )
        content, cut = cut_utf8("\n\n".join(filter(None, outputs.values())), MAX_CONTENT_BYTES)
        return RunResult(content=content, truncated=cut) if content else None

    async def _drop_timer(self, parent_id: str) -> None:
        """Take the parked parent out of the stream, where it would count as work."""
        stream = self._bus.subjects.stream("TASKS")
        await self._bus.jetstream.api(
            f"STREAM.PURGE.{stream}", {"filter": self._bus.subjects.later("scale", parent_id, "timer")}
        )


def _notice_in(raw: bytes) -> ScaleMessage | None:
    try:
        return read_scale_message(raw)
    except Undecodable:
        return None


def _id(plan: SplitPlan, what: str) -> str:
    """The id of a message that follows from a plan, for the attempt it answers for."""
    return f"{plan.parent_id}:{what}-{plan.envelope.attempt}"


def _whole(envelope: Envelope, why: str) -> Envelope:
    """Return the envelope saying that its task is not to be divided, and why not."""
    spec = envelope.spec
    return envelope if spec is None else replace(envelope, spec=replace(undivided(spec, why), whole=True))
