"""Evaluate: judge each result, and end its task or send it to another node.

Consumes   task.evaluate.*.*   results, and errors of every phase
Publishes  reward.{rules,judge}.<owner>.<node>.<domain_token>
           result.<submitter>.<task>, replies to submitters
           cancelled.<task>   the cancellation of a task, for EXECUTE to stop its run
           task.scale          the end of a subtask, or of a task that had been divided
           task.match          the envelope with the next attempt number, for another node
State      the terminal record; this is the only phase that ends a task
Gives up   never: every message ends a task, sends it to another node, or belongs to an ended task; a result that
           cannot be checked yet waits, at most until its deadline
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
from loom.bus.records import records, salvaged
from loom.bus.replies import send_result
from loom.bus.rewards import RewardBus
from loom.bus.topology import EVALUATE_LANE
from loom.phases.evaluate import llm_judge
from loom.phases.evaluate.attempt_record import AttemptRecord, write_end
from loom.phases.evaluate.retry_policy import Finish, Retry, decide, judge, may_be_divided, notice_of, unchecked
from loom.phases.evaluate.rewards import implied_rewards, reward_for
from loom.phases.evaluate.timings import EvaluateTimings
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

SPREAD = 1.25
"""A pause is up to a quarter longer, so that tasks which failed together do not return together."""


class Evaluate:
    """Judges results by rules and by a model, ends tasks in their records, and retries failed attempts.

    Whatever an ended record implies (rewards, the result message, replies, notices) is published after the write, and
    again for each message about the ended task.

    Args:
        bus: A connected bus.
        config: Retry limits, and the share of results that a model judges.
        llm: The model that judges results; None: results are judged by rules alone.
        timings: Pauses.
    """

    def __init__(
        self,
        bus: Bus,
        config: ClusterConfig,
        llm: LLMProvider | None = None,
        *,
        timings: EvaluateTimings = EvaluateTimings(),
    ) -> None:
        self._bus = bus
        self._timings = timings
        self._config = config
        self._llm = llm
        self._records = records(bus)
        self._plans = bus.bucket("plans", SplitPlan)
        self._rewards = RewardBus(bus=bus)
        self._checks = CheckPool(bus, timings.checks)
        service = Service("evaluate", [(EVALUATE_LANE, SLOTS)], Envelope, self.handle, end=self.end_dead)
        self._loop = HopLoop(bus, service)

    def health(self) -> Health:
        """Return the number of handled and open messages."""
        return self._loop.health()

    async def start(self) -> None:
        """Start to consume results and errors."""
        await self._loop.start()

    async def drain(self, timeout_s: float) -> None:
        """Consume no more messages, and finish open ones for at most `timeout_s`."""
        await self._loop.drain(timeout_s)

    async def handle(self, envelope: Envelope, _delivery: Delivery) -> Outcome:
        """End the task or retry it; announce a task that has ended already."""
        record, envelope = AttemptRecord(self._bus, envelope), replace(envelope, record_version=None)
        violation = await self._check(envelope)
        if isinstance(violation, Later):
            return violation
        if self._needs_llm_judge(envelope, violation) and await record.is_open():
            envelope = await self._llm_judged(envelope)
        match decide(envelope, self._config, self._bus.clock.now(), violation):
            case Retry() as retry:
                if await record.is_open():
                    return await self._retry(retry, envelope)
            case Finish() as finish:
                await record.finish(finish)
        if record.ended is not None:
            await self._announce(record.ended)
        return Done()

    async def _check(self, envelope: Envelope) -> Violation | Later | None:
        """Check pattern and JSON Schema of the ad; return `Later` while the check cannot be made."""
        content, accept = envelope.result.content if envelope.result else "", envelope.ad.accept
        if envelope.error is not None or accept is None or not has_check(accept):
            return None
        try:
            return await self._checks.violation(content, accept)
        except NotChecked as error:
            log.warning("result_not_checked", reason=error.message)
            if self._bus.clock.now() >= envelope.deadline:
                return unchecked(error.message)
            entry = await self._records.get(envelope.task_id)
            if entry is not None and entry.value.ended:
                return unchecked(error.message)
            return Later(self._timings.check_again_s * random.uniform(1, SPREAD), envelope)  # noqa: S311 - jitter

    def _needs_llm_judge(self, envelope: Envelope, violation: Violation | None) -> bool:
        """Return whether a model is to judge a result that keeps the rules."""
        if envelope.error is not None or not llm_judge.needs_llm_judge(
            envelope, self._config.judge_share, self._llm is not None
        ):
            return False
        return judge(envelope, violation) is None

    async def _llm_judged(self, envelope: Envelope) -> Envelope:
        if self._llm is None:
            return llm_judge.unjudged(envelope, llm_judge.NO_MODEL)
        answer = await llm_judge.ask(self._llm, envelope, envelope.deadline - self._bus.clock.now())
        return llm_judge.with_opinion(envelope, answer)

    async def end_dead(self, envelope: Envelope, _raw: bytes) -> None:
        """End a task whose message this phase itself could not handle."""
        finish = Finish("failed", replace(envelope.without_result(), record_version=None))
        try:
            entry = await write_end(self._bus, finish, envelope)
        except Undecodable as error:
            log.warning("record_replaced", reason=error.message)
            entry = await write_end(self._bus, finish, envelope, await salvaged(self._bus, envelope))
        if entry is not None and entry.value.ended:
            await self._announce(entry.value)

    async def _retry(self, retry: Retry, envelope: Envelope) -> Outcome:
        """Publish the failed attempt's reward, then pass the task to MATCH; the record stays unchanged."""
        error = retry.envelope.last_error
        log.info(
            "attempt_retried",
            code=error.code if error else "",
            attempt=retry.envelope.attempt,
            delay_s=round(retry.delay_s, 2),
        )
        reward = reward_for(envelope, error, _finished_at(envelope, self._bus.clock.now()))
        if reward is not None:
            await self._rewards.publish(reward)
        msg_id = f"{envelope.task_id}:attempt-{retry.envelope.attempt}"  # duplicates of a failure make one attempt
        if not retry.delay_s:
            return Next("match", retry.envelope, msg_id)
        delay_s = retry.delay_s * random.uniform(1, SPREAD)  # noqa: S311 - jitter
        return Later(delay_s, retry.envelope, "match", msg_id)

    async def _announce(self, record: TaskRecord) -> None:
        """Publish everything that an ended record implies; each reader accepts duplicates."""
        publishing = [self._rewards.publish(reward) for reward in implied_rewards(record)]  # sent, not yet confirmed
        try:
            if record.state == "cancelled":  # SENSE may have stopped before it could publish this
                await self._bus.connection.publish(self._bus.subjects.of("cancelled", record.task_id))
            await self._notify_scale(record)
            await self._bus.connection.publish(
                self._bus.subjects.of("result", record.envelope.submitter, record.task_id), record.to_result()
            )
            for reply in record.reply_to:
                await send_result(self._bus, reply, record)
        except BaseException:
            for confirmation in publishing:  # not awaited: the message is redelivered, and its rewards are sent again
                self._bus.tasks.spawn(confirmation, name=f"reward {record.task_id}")
            raise
        await asyncio.gather(*publishing)

    async def _notify_scale(self, record: TaskRecord) -> None:
        """Notify SCALE of the end of a subtask, and of a task that may have been divided."""
        notice = notice_of(record)
        if notice is not None:
            await self._store_for_scale(notice, record.envelope, f"{record.task_id}:done")
        # The plan is read after the record is written, because SCALE reads the record after it stores a plan.
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


def _finished_at(envelope: Envelope, now: float) -> float:
    """Return when the attempt ended: the end of its last hop, so that every redelivery returns the same time."""
    return envelope.hops[-1].finished if envelope.hops else now
