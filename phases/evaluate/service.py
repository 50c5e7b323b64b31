"""Evaluate: judge what came back, and end the task or send it to another node.

Consumes   task.evaluate.*.*   results, and errors of every phase
Publishes  reward.{rules,judge}.<owner>.<node>.<domain_token>
           result.<submitter>.<task>, replies to submitters
           cancelled.<task>   that a task is cancelled, for EXECUTE to stop its run
           task.scale          that a subtask has ended, or a task that had been divided
           task.match          the envelope with its attempt raised, when another node is to try
State      the terminal record; this is the only phase that ends a task
Gives up   never: every message ends a task, sends it back, or belongs to a task that has ended; a result that cannot
           be checked now waits, at most until its deadline
"""

import asyncio
import random

from msgspec.structs import replace

from loom.bus.bus import Bus
from loom.bus.hops.delivery import Delivery
from loom.bus.hops.duplicates import store_once
from loom.bus.hops.health import Health
from loom.bus.hops.hop_loop import SLOTS, HopLoop, Service
from loom.bus.hops.outcomes import Done, Later, Next, Outcome
from loom.bus.logs.logger import get_logger
from loom.bus.natsio.kv import Entry
from loom.bus.natsio.server_errors import Conflict
from loom.bus.records import record_from, records, salvaged, update_record
from loom.bus.replies import answer_task
from loom.bus.rewards import RewardBus
from loom.bus.topology import EVALUATE_LANE
from loom.phases.evaluate import llm_judge
from loom.phases.evaluate.decisions import (
    Finish,
    Retry,
    decide,
    implied_rewards,
    is_late,
    judge,
    may_be_divided,
    notice_of,
    reward_for,
    unchecked,
)
from loom.phases.shared.acceptance import has_check
from loom.phases.shared.check_pool import CheckPool, NotChecked, Violation
from loom.schemas.base import Undecodable
from loom.schemas.config import ClusterConfig
from loom.schemas.envelope import Envelope
from loom.schemas.llm import LLMProvider
from loom.schemas.notices import ParentEnded, SubtaskEnded
from loom.schemas.plan import SplitPlan
from loom.schemas.record import TaskRecord

log = get_logger()

CHECK_AGAIN_S = 1.0
"""Pause before a result is taken up again that could not be checked now."""
SPREAD = 1.25
"""A pause is up to a quarter longer, so that tasks which failed together do not come again together."""


class Evaluate:
    """The fifth phase."""

    def __init__(self, bus: Bus, config: ClusterConfig, llm: LLMProvider | None = None) -> None:
        self._bus = bus
        self._config = config
        self._llm = llm
        self._records = records(bus)
        self._plans = bus.bucket("plans", SplitPlan)
        self._rewards = RewardBus(bus=bus)
        self._checks = CheckPool(bus)
        service = Service("evaluate", [(EVALUATE_LANE, SLOTS)], Envelope, self.handle, end=self.end_dead)
        self._loop = HopLoop(bus, service)

    def health(self) -> Health:
        """Return how far the work has got."""
        return self._loop.health()

    async def start(self) -> None:
        """Begin to judge."""
        await self._loop.start()

    async def drain(self, timeout_s: float) -> None:
        """Take nothing new, finish for at most `timeout_s`."""
        await self._loop.drain(timeout_s)

    async def handle(self, envelope: Envelope, _delivery: Delivery) -> Outcome:
        """End the task or send it back; what has ended is announced again."""
        entry, envelope = record_from(envelope), replace(envelope, record_version=None)
        violation = None
        if envelope.error is None and has_check(envelope.ad.accept):
            checked = await self._check(envelope)
            if isinstance(checked, Later):
                return checked
            violation = checked
        wanted = self._wants_opinion(envelope, violation)
        decision = None if wanted else decide(envelope, self._config, self._bus.clock.now(), violation)
        if not isinstance(decision, Finish):
            entry = None  # what is remembered is good for a write alone, which fails if it is wrong
        entry = entry or await self._records.get(envelope.task_id) or await self._create_missing(envelope)
        if entry is None:
            log.warning("record_missing", attempt=envelope.attempt)
            return Done()
        if not entry.value.ended and is_late(envelope, entry.value):
            log.info("late_twin_dropped", attempt=envelope.attempt, claimed=entry.value.claim.attempt)
            return Done()
        if wanted and not entry.value.ended:
            envelope = await self._with_opinion(envelope)
        decision = decision or decide(envelope, self._config, self._bus.clock.now())
        if isinstance(decision, Retry) and not entry.value.ended:
            return await self._send_back(decision, envelope)
        if isinstance(decision, Finish) and not entry.value.ended:
            entry = await self._write_end(decision, envelope, entry) or entry
        if entry.value.ended:
            await self._announce(entry.value)
        return Done()

    async def _check(self, envelope: Envelope) -> Violation | Later | None:
        """Return the outcome of pattern and JSON Schema; `Later` while they cannot be checked."""
        content, accept = envelope.result.content if envelope.result else "", envelope.ad.accept
        try:
            return await self._checks.violation(content, accept) if accept is not None else None
        except NotChecked as error:
            log.warning("result_not_checked", reason=error.message)
            if self._bus.clock.now() >= envelope.deadline:
                return unchecked(error.message)
            entry = await self._records.get(envelope.task_id)
            if entry is not None and entry.value.ended:
                return unchecked(error.message)
            return Later(CHECK_AGAIN_S * random.uniform(1, SPREAD), envelope)  # noqa: S311 - jitter

    def _wants_opinion(self, envelope: Envelope, violation: Violation | None) -> bool:
        """Return whether a model is to be asked what it thinks of a result that keeps the rules."""
        if envelope.error is not None or not llm_judge.needs_llm_judge(
            envelope, self._config.judge_share, self._llm is not None
        ):
            return False
        return judge(envelope, violation) is None

    async def _with_opinion(self, envelope: Envelope) -> Envelope:
        if self._llm is None:
            return llm_judge.unjudged(envelope, llm_judge.NO_MODEL)
        answer = await llm_judge.ask(self._llm, envelope, envelope.deadline - self._bus.clock.now())
        return llm_judge.with_opinion(envelope, answer)

    async def end_dead(self, envelope: Envelope, _raw: bytes) -> None:
        """End a task of which even this phase could not handle the message."""
        end = Finish("failed", replace(envelope.without_result(), record_version=None))
        try:
            entry = await self._write_end(end, envelope)
        except Undecodable as error:
            log.warning("record_replaced", reason=error.message)
            entry = await self._write_end(end, envelope, await salvaged(self._bus, envelope))
        if entry is not None and entry.value.ended:
            await self._announce(entry.value)

    async def _create_missing(self, envelope: Envelope) -> Entry[TaskRecord] | None:
        """Only a message that never reached admission may lack a record."""
        if any(hop.phase != "sense" for hop in envelope.hops):
            return None
        record = TaskRecord(
            task_id=envelope.task_id, state="running", envelope=envelope, admitted_at=self._bus.clock.now()
        )
        try:
            revision = await self._records.create(envelope.task_id, record)
        except Conflict:
            return await self._records.get(envelope.task_id)
        return Entry(envelope.task_id, record, revision)

    async def _send_back(self, decision: Retry, envelope: Envelope) -> Outcome:
        """Pass the task to MATCH again, after the failed attempt's reward; the record stays as it is."""
        error = decision.envelope.last_error
        log.info(
            "sent_back",
            code=error.code if error else "",
            attempt=decision.envelope.attempt,
            delay_s=round(decision.delay_s, 2),
        )
        reward = reward_for(envelope, error, _finished(envelope, self._bus.clock.now()))
        if reward is not None:
            await self._rewards.publish(reward)
        msg_id = f"{envelope.task_id}:attempt-{decision.envelope.attempt}"  # twins of the failure make one attempt
        if not decision.delay_s:
            return Next("match", decision.envelope, msg_id)
        delay_s = decision.delay_s * random.uniform(1, SPREAD)  # noqa: S311 - jitter
        return Later(delay_s, decision.envelope, "match", msg_id)

    async def _write_end(
        self, decision: Finish, envelope: Envelope, entry: Entry[TaskRecord] | None = None
    ) -> Entry[TaskRecord] | None:
        now = self._bus.clock.now()

        def end(record: TaskRecord) -> TaskRecord | None:
            if record.ended or is_late(envelope, record):
                return None
            return replace(
                record,
                state=decision.state,
                envelope=decision.envelope,
                ended_at=now,
                score=decision.score,
                below_threshold=decision.below_threshold,
                rejected=decision.rejected,
            )

        entry = await update_record(self._records, envelope.task_id, end, entry)
        if entry is not None and entry.value.ended:
            ended = entry.value.to_result()
            log.info("task_ended", state=ended.state, code=ended.error.code if ended.error else "")
        return entry

    async def _announce(self, record: TaskRecord) -> None:
        """Publish everything an ended record implies; every reader bears hearing it twice."""
        stored = [self._rewards.publish(reward) for reward in implied_rewards(record)]  # sent, and not waited for yet
        try:
            if record.state == "cancelled":  # SENSE may have ended before it could publish this
                await self._bus.connection.publish(self._bus.subjects.of("cancelled", record.task_id))
            await self._tell_scale(record)
            await self._bus.connection.publish(
                self._bus.subjects.of("result", record.envelope.submitter, record.task_id), record.to_result()
            )
            for reply in record.reply_to:
                await answer_task(self._bus, reply, record)
        except BaseException:
            for one in stored:  # not waited for: the message comes again, and so do its rewards
                self._bus.tasks.spawn(one, name=f"reward {record.task_id}")
            raise
        await asyncio.gather(*stored)

    async def _tell_scale(self, record: TaskRecord) -> None:
        """Tell SCALE that a subtask has ended, or that a task has which may have been divided."""
        notice = notice_of(record)
        if notice is not None:
            await self._store_for_scale(notice, record.envelope, f"{record.task_id}:done")
        # The plan is looked for after the record is written: whoever stores one reads the record after that.
        try:
            plan = await self._plans.get(record.task_id) if may_be_divided(record) else None
        except Undecodable as error:  # SCALE cannot read it either: there is nothing to stop
            log.warning("plan_undecodable", reason=error.message)
            plan = None
        if plan is not None and plan.value.subtasks:
            ended = ParentEnded(task_id=record.task_id)
            await self._store_for_scale(ended, record.envelope, f"{record.task_id}:unpark")

    async def _store_for_scale(self, notice: SubtaskEnded | ParentEnded, envelope: Envelope, msg_id: str) -> None:
        subject = self._bus.subjects.task("scale", envelope.priority, notice.task_id)
        await store_once(self._bus, subject, notice, msg_id=msg_id)


def _finished(envelope: Envelope, now: float) -> float:
    """When the attempt ended: the end of its last hop, the same however often it is asked."""
    return envelope.hops[-1].finished if envelope.hops else now
