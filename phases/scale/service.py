"""Scale: divide a hard task into a graph of subtasks, and request a node where one is missing.

Consumes   task.scale.*.*    tasks to be divided, without offers, or awarded to a full node, from MATCH, which sends all
                             others to EXECUTE; the notices SubtaskEnded, PlanTimeout and ParentEnded
Publishes  task.sense        the first envelope of each subtask, once all of its dependencies have succeeded
           later.<parent>    a PlanTimeout with the parked parent, due at the parent's deadline
           task.match        a task without offers, after the request for a node
           task.execute      an undivided task, or a parent with the outputs of its subtasks for the synthesis
           cancel.<child>    the cancellation of a subtask whose parent has ended
           subtask.<submitter>.<parent>   the start or the end of a subtask
           spawn             a request for one more node, to hosts that can start some
State      plans: one per divided task, changed by compare-and-set before anything is published (see division.py).
           A plan serves the newest attempt of its task
Gives up   deadline_exceeded, invalid_plan, subtask_failed, budget_exceeded
"""

from msgspec.structs import replace

from loom.bus.bus import Bus
from loom.bus.hops.delivery import Delivery
from loom.bus.hops.duplicates import store_once
from loom.bus.hops.health import Health
from loom.bus.hops.hop_loop import SLOTS, HopLoop, Service
from loom.bus.hops.outcomes import Dead, Done, Fail, Next, Outcome
from loom.bus.logs.logger import get_logger
from loom.bus.topology import SCALE_LANE
from loom.phases.scale import planner, subtask_graph
from loom.phases.scale.division import Division
from loom.phases.scale.spawn_requests import SpawnRequests
from loom.phases.scale.timings import ScaleTimings
from loom.phases.shared.scale_rule import is_saturated, scale_reason
from loom.phases.shared.token_usage import budget_before_run, with_phase_usage, with_subtask_usage
from loom.schemas.base import Undecodable
from loom.schemas.config import ClusterConfig
from loom.schemas.envelope import Envelope
from loom.schemas.errors import InvalidPlan
from loom.schemas.llm import LLMProvider
from loom.schemas.notices import ParentEnded, PlanTimeout, ScaleMessage, SubtaskEnded, read_scale_message
from loom.schemas.plan import SplitPlan
from loom.schemas.task import TaskError

log = get_logger()

LATE = TaskError(code="deadline_exceeded", message="the deadline passed before the run began")
LATE_WHILE_PARKED = TaskError(code="deadline_exceeded", message="the deadline passed before all subtasks had ended")


class Scale:
    """The SCALE service: divides hard tasks into subtasks and requests nodes.

    A divided task is parked until its subtasks have ended, and then goes to EXECUTE with their outputs.

    Args:
        bus: A connected bus.
        config: Limits of plans.
        llm: The model that plans; None: only plans of ads are used.
        timings: Intervals.
    """

    def __init__(
        self,
        bus: Bus,
        config: ClusterConfig,
        llm: LLMProvider | None = None,
        *,
        timings: ScaleTimings = ScaleTimings(),
    ) -> None:
        self._bus = bus
        self._config = config
        self._llm = llm
        self._division = Division(bus)
        self._spawn_requests = SpawnRequests(bus, timings.spawn_interval_s)
        self._loop: HopLoop[ScaleMessage] = HopLoop(
            bus,
            Service("scale", [(SCALE_LANE, SLOTS)], Envelope, self.handle, read=read_scale_message, end=self.end_dead),
        )

    def health(self) -> Health:
        """Return the counters of handled messages and of messages in progress."""
        return self._loop.health()

    async def start(self) -> None:
        """Start to take tasks and notices."""
        await self._loop.start()

    async def drain(self, timeout_s: float) -> None:
        """Stop taking messages, and finish those in progress within `timeout_s` seconds."""
        await self._loop.drain(timeout_s)

    async def handle(self, message: ScaleMessage, _delivery: Delivery) -> Outcome:
        """Divide a task or pass it on; update its plan after a notice."""
        match message:
            case SubtaskEnded(task_id=parent_id, child_id=child_id):
                return await self._division.record_child(parent_id, child_id)
            case ParentEnded(task_id=parent_id):
                await self._division.finish(parent_id)
                return Done()
            case PlanTimeout(envelope=envelope):
                return Fail(LATE_WHILE_PARKED, await self._with_parked_usage(envelope))
            case Envelope() as envelope:
                return await self._on_task(envelope)

    async def end_dead(self, envelope: Envelope, raw: bytes) -> None:
        """Pass the task of a dead message to EVALUATE; after a dead notice, only if its plan still runs."""
        notice = _notice_in(raw)
        if isinstance(notice, ParentEnded):
            return
        if isinstance(notice, SubtaskEnded):
            # The timer of the parked task ends one whose plan is undecodable.
            plan = await self._division.get_if_readable(envelope.task_id)
            if plan is None or plan.state != "running":
                return
            envelope = replace(plan.envelope, error=envelope.error)
        subject = self._bus.subjects.task("evaluate", envelope.priority, envelope.task_id)
        msg_id = f"{envelope.task_id}:dead:scale-{envelope.attempt}"
        await store_once(self._bus, subject, envelope, msg_id=msg_id)

    async def _with_parked_usage(self, envelope: Envelope) -> Envelope:
        """Return a parked task's envelope with the usage of its subtasks; unchanged where its plan is unreadable."""
        plan = await self._division.get_if_readable(envelope.task_id)
        if plan is None:
            return envelope
        plan = subtask_graph.with_newer_attempt(plan, envelope)
        return with_subtask_usage(plan.envelope, plan.subtasks)

    async def _on_task(self, envelope: Envelope) -> Outcome:
        if envelope.spec is None:
            return Dead("the envelope came without a spec")
        if self._bus.clock.now() >= envelope.deadline:
            return Fail(LATE, envelope)
        if envelope.award is not None and is_saturated(envelope.award):
            self._spawn_requests.request(envelope, saturated=True)
        match scale_reason(envelope):
            case "no_bids":
                self._spawn_requests.request(envelope, saturated=False)
                return Next("match", envelope)
            case "divide":
                return await self._divide(envelope)
            case _:
                return Next("execute", envelope)

    async def _divide(self, envelope: Envelope) -> Outcome:
        """Park the task and start its subtasks; a task that already has a plan continues with it."""
        plan = await self._division.get(envelope.task_id)
        while plan is None:
            try:
                created = await self._new_plan(envelope)
            except InvalidPlan as error:
                return Fail(TaskError.of(error), envelope)
            if await self._division.create(created):
                plan, started = created, len(subtask_graph.running_subtasks(created))
                log.info("plan_created", subtasks=len(plan.subtasks), started=started, note=plan.note)
            else:
                plan = await self._division.get(envelope.task_id)
        return await self._division.resume(plan, envelope)

    async def _new_plan(self, envelope: Envelope) -> SplitPlan:
        """Return the plan of the ad, or of a model; without either, a plan that keeps the task whole.

        Raises:
            InvalidPlan: The plan of the ad breaks a rule.
        """
        subtasks = planner.plan_from_ad(envelope.ad, self._config)
        if subtasks is not None:
            return subtask_graph.start_plan(envelope, subtasks)
        if self._llm is None:
            return subtask_graph.keep_whole(envelope, "no model is configured to plan")
        return await self._plan_from_model(envelope, self._llm)

    async def _plan_from_model(self, envelope: Envelope, llm: LLMProvider) -> SplitPlan:
        """Return the plan of a model; without a usable one, a plan that keeps the task whole and notes the reason."""
        left_s, budget = envelope.deadline - self._bus.clock.now(), budget_before_run(envelope)
        answer = await planner.plan_from_model(llm, envelope.ad, self._config, left_s, budget)
        envelope, subtasks = with_phase_usage(envelope, "scale", answer.usage), answer.value
        if isinstance(answer.error, InvalidPlan):
            return subtask_graph.keep_whole(envelope, f"the model's plan cannot be used: {answer.error.message}")
        if subtasks is None:
            return subtask_graph.keep_whole(envelope, f"the model could not be asked: {answer.why}")
        if len(subtasks) == 1:
            return subtask_graph.keep_whole(envelope, "the model's plan has a single subtask")
        return subtask_graph.start_plan(envelope, subtasks)


def _notice_in(raw: bytes) -> ScaleMessage | None:
    try:
        return read_scale_message(raw)
    except Undecodable:
        return None
