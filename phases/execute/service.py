"""Execute: run the task on the node that won it, and tell everybody how it goes.

Consumes   task.execute.*.*
Publishes  run.<host>        a run request, answered by a stream of events
           delta.<task>      text, steps and tool calls as they come
           task.sense        what the run delegates, as a task of its own; its end is told to the run
           task.evaluate     the envelope with its result, or with an error
State      the claim in the task's record: the fence of every attempt; and the ids of what has been delegated
Gives up   node_lost, agent_failed, node_busy, deadline_exceeded, cancelled: as errors, for EVALUATE to decide
"""

import asyncio
import dataclasses
from functools import partial

from msgspec.structs import replace

from loom.bus.client import Bus, Conflict, Msg, Subscription
from loom.bus.delivery import Delivery
from loom.bus.health import Health
from loom.bus.log import get_logger
from loom.bus.loop import HopLoop, Service
from loom.bus.outcome import Dead, Done, Leave, Next, Outcome
from loom.bus.records import record_version, records, remembered
from loom.bus.topology import EXECUTE_LANE
from loom.phases.execute.belief import Facts, believed
from loom.phases.execute.claim import Drop, Standing, Take, claim, may_report
from loom.phases.execute.errands import Errands, call_off
from loom.phases.execute.watch import Silent, Stop, Watch
from loom.schemas.config import ClusterConfig
from loom.schemas.envelope import Award, Envelope
from loom.schemas.errors import BusUnavailable
from loom.schemas.run import RunEvent, RunRequest
from loom.schemas.task import RunResult, TaskError
from loom.schemas.wire import MAX_CONTENT_BYTES, cut_utf8

log = get_logger()

SLOTS = 1024
CLAIM_TRIES = 8
CANCEL_S = 0.25  # SENSE ends a cancelled task itself; only a cancel it has not heard is reported from here
SETTLE_S = 5.0
"""After a reconnect: long enough for every host to be back."""
ASK_AGAIN_S = 0.25
SUBTASK_FAILED = "subtask_failed"
CANCELLED = TaskError(code="cancelled", message="the task was cancelled")


class Execute:
    """The fourth phase."""

    def __init__(self, bus: Bus, config: ClusterConfig) -> None:
        self._bus = bus
        self._config = config
        self._records = records(bus)
        self._stops: dict[str, list[Stop]] = {}
        """Task -> what ends the watching of its runs; a task may be here twice while a run moves."""
        self._cancels: Subscription | None = None
        self._loop = HopLoop(bus, Service("execute", [(EXECUTE_LANE, SLOTS)], Envelope, self.handle))

    def health(self) -> Health:
        """Return how far the work has got."""
        return self._loop.health()

    async def start(self) -> None:
        """Begin to run tasks."""
        self._cancels = await self._bus.listen(self._bus.subjects.of("cancel", "*"), self._on_cancel)
        await self._bus.echo()
        await self._loop.start()

    async def drain(self, timeout_s: float) -> None:
        """Take nothing new, wait for runs for at most `timeout_s`, hand the rest to another replica."""
        await self._loop.drain(timeout_s)
        if self._cancels is not None:
            await self._bus.unsubscribe(self._cancels)

    async def handle(self, envelope: Envelope, delivery: Delivery) -> Outcome:
        """Claim the attempt, run it, and hand on what came of it."""
        award = envelope.award
        if award is None:
            return Dead("the envelope came without an award")
        if self._bus.now() >= envelope.deadline:
            late = TaskError(code="deadline_exceeded", message="the deadline passed before the run began")
            return await self._report(late, envelope, delivery, claimed=False)
        stop = Stop()
        timer = asyncio.get_running_loop().call_later(envelope.deadline - self._bus.now(), stop.set, "late")
        delivery.on_recall = partial(stop.set, "recalled")
        if delivery.recalled.is_set():
            stop.set("recalled")
        self._stops.setdefault(envelope.task_id, []).append(stop)
        try:
            return await self._claimed(envelope, award, delivery, stop)
        finally:
            timer.cancel()
            self._stops[envelope.task_id].remove(stop)
            if not self._stops[envelope.task_id]:
                del self._stops[envelope.task_id]

    async def _claimed(self, envelope: Envelope, award: Award, delivery: Delivery, stop: Stop) -> Outcome:
        claimed = await self._claim(envelope, award, delivery)
        if isinstance(claimed, Drop):
            log.info("run_dropped", reason=claimed.reason, attempt=envelope.attempt)
            await call_off(self._bus, envelope.task_id, claimed.delegated)
            return Done()
        envelope = replace(envelope, record_version=claimed.record_version)
        if stop.cancelled():
            return await self._report(CANCELLED, envelope, delivery)
        request = request_for(envelope, award, self._bus.now())
        watch = Watch(self._bus, award.host_id, request, stop, attached=claimed.attached)
        earlier = claimed.record.delegated if claimed.attached else ()
        errands = Errands(self._bus, self._config, envelope, delivery, self._loop.top_up, earlier)
        outcome: Outcome | None = None
        try:
            outcome = await self._run(watch, errands, envelope, award, delivery, stop)
        finally:
            await errands.close(cancelling=stop.cancelled() or is_over(outcome))
        return outcome

    async def _claim(self, envelope: Envelope, award: Award, delivery: Delivery) -> Take | Drop:
        entry = remembered(envelope)
        for _ in range(CLAIM_TRIES):
            read = entry is None
            entry = entry or await self._records.get(envelope.task_id)
            if entry is None:
                return Drop("the task has no record")
            verdict = claim(entry.value, envelope, award, self._bus.instance, delivery.facts.stream_seq)
            try:
                if isinstance(verdict, Take):
                    revision = await self._records.update(envelope.task_id, verdict.record, entry.revision)
                    return dataclasses.replace(verdict, record_version=record_version(verdict.record, revision))
                if read:
                    return verdict
            except Conflict:
                pass
            entry = None
        raise BusUnavailable(f"the record of {envelope.task_id} would not hold still")

    async def _run(
        self, watch: Watch, errands: Errands, envelope: Envelope, award: Award, delivery: Delivery, stop: Stop
    ) -> Outcome:
        """Watch the run until it ends, the task is cancelled or too late, or this process stops."""
        try:
            last = await self._follow(watch, errands, envelope, delivery)
        except Silent as error:
            lost = TaskError(code="node_lost", message=str(error), node_id=award.node_id)
            return await self._report(lost, spent(envelope, errands.result), delivery)
        if last is not None:
            return await self._settle(last, errands, envelope, award, delivery, stop)
        if stop.cancelled():
            await asyncio.sleep(CANCEL_S)
            return await self._report(CANCELLED, spent(envelope, errands.result), delivery)
        if stop.reason == "late":
            late = TaskError(
                code="deadline_exceeded", message="the deadline passed during the run", node_id=award.node_id
            )
            return await self._report(late, spent(envelope, errands.result), delivery)
        return Next("execute", envelope)  # recalled, another replica re-attaches; harmless, a suspect starts afresh

    async def _settle(
        self, last: RunEvent, errands: Errands, envelope: Envelope, award: Award, delivery: Delivery, stop: Stop
    ) -> Outcome:
        if last.kind == "result" and last.result is not None:
            return Next("evaluate", replace(spent(envelope, last.result), error=None))
        if last.kind == "moved":
            return await self._give_way(envelope, delivery)
        error = error_in(last, award)
        if last.error is not None:
            error = believed(error, await self._facts(last, errands, envelope, stop))
        return await self._report(error, spent(envelope, last.result), delivery)

    async def _facts(self, last: RunEvent, errands: Errands, envelope: Envelope, stop: Stop) -> Facts:
        """Collect what the code of a run's error is checked against."""
        code = last.error.code if last.error else ""
        if code == CANCELLED.code and not stop.cancelled():
            await asyncio.sleep(CANCEL_S)  # the host's word may be here before the cancel itself
        return Facts(
            budget=envelope.budget,
            tokens=last.result.tokens if last.result else 0,
            left_s=envelope.deadline - self._bus.now(),
            delegation_failed=code == SUBTASK_FAILED and await errands.failed(),
            cancelled=stop.cancelled(),
        )

    async def _follow(self, watch: Watch, errands: Errands, envelope: Envelope, delivery: Delivery) -> RunEvent | None:
        """Relay the run and return its last event; one that falls silent is asked for once more.

        After an outage of the bus hosts come back one by one, and none of them is to blame for that: until
        they have had time to, a silent one is asked again and again.
        """
        asked_again = False
        while True:
            try:
                return await self._relay(watch, errands, envelope, delivery)
            except Silent:
                settling = self._bus.settled_s < SETTLE_S
                if not settling and (asked_again or not watch.heard):
                    raise
                if await self._standing(envelope, delivery) != "report":
                    raise
            if settling:
                await asyncio.sleep(ASK_AGAIN_S)
            watch, asked_again = watch.again(), not settling

    async def _relay(self, watch: Watch, errands: Errands, envelope: Envelope, delivery: Delivery) -> RunEvent | None:
        """Relay the run's events and return the last one.

        None when the watching is stopped, or a suspect message has proved harmless.
        """
        deltas = self._bus.subjects.of("delta", envelope.submitter, envelope.task_id)
        async with watch:
            while (event := await watch.next()) is not None and not event.final:
                if delivery.alone:
                    return None
                delivery.release()
                if event.event is None:
                    await errands.hear(event, watch)
                else:
                    await self._bus.publish(deltas, watch.delta(event.seq, event.event))
            return event

    async def _report(
        self, error: TaskError, envelope: Envelope, delivery: Delivery, *, claimed: bool = True
    ) -> Outcome:
        """Hand an error on, unless this message may not speak for the task any more."""
        standing = await self._standing(envelope, delivery, claimed=claimed)
        if standing == "report":
            log.info("run_failed", code=error.code, node_id=error.node_id, attempt=envelope.attempt)
            return Next("evaluate", replace(envelope, error=error))
        return Done() if standing == "settle" else Leave()

    async def _give_way(self, envelope: Envelope, delivery: Delivery) -> Outcome:
        """Another handler follows the run now: settle a mere copy of its message, leave it the message itself."""
        return Done() if await self._standing(envelope, delivery) == "settle" else Leave()

    async def _standing(self, envelope: Envelope, delivery: Delivery, *, claimed: bool = True) -> Standing:
        """What the record, read again, lets this message do."""
        entry = await self._records.get(envelope.task_id)
        if entry is None:
            return "settle"
        if claimed:
            return may_report(entry.value, envelope.attempt, self._bus.instance, delivery.facts.stream_seq)
        return "settle" if entry.value.ended or entry.value.claim.attempt > envelope.attempt else "report"

    def _on_cancel(self, msg: Msg) -> None:
        for stop in self._stops.get(msg.subject.rsplit(".", 1)[1], ()):
            stop.set("cancelled")


def request_for(envelope: Envelope, award: Award, now: float) -> RunRequest:
    """Return what the node host is asked."""
    ad = envelope.ad
    return RunRequest(
        task_id=ad.task_id,
        attempt=envelope.attempt,
        node_id=award.node_id,
        domain=envelope.domain,
        description=ad.description,
        complexity=envelope.spec.complexity if envelope.spec else 0.5,
        context=ad.context,
        inputs={**(envelope.split.inputs if envelope.split else {}), **envelope.inputs},
        accept=ad.accept,
        tools=ad.required_tools,
        tools_allowed=ad.tools_allowed,
        token_budget=envelope.budget,
        remaining_s=max(0.0, envelope.deadline - now),
        deadline=envelope.deadline,
        priority=ad.priority,
        depth=envelope.depth,
        trace=envelope.trace,
    )


def is_over(outcome: Outcome | None) -> bool:
    """Return whether the run has come to its end here, and is not to go on under another watcher."""
    return isinstance(outcome, Next) and outcome.phase == "evaluate"


def error_in(last: RunEvent, award: Award) -> TaskError:
    """Return the error a run ended with."""
    if last.error is not None:
        return replace(last.error, node_id=award.node_id, best_rejected=None)  # of its own answers, EVALUATE decides
    if last.kind == "rejected" and last.code == "busy":
        return TaskError(code="node_busy", message="the node's slots and backlog are full", node_id=award.node_id)
    if last.kind == "rejected":
        return TaskError(code="node_lost", message="the host does not have this node any more", node_id=award.node_id)
    return TaskError(code="agent_failed", message="the run ended without a result", node_id=award.node_id)


def bounded(result: RunResult) -> RunResult:
    """Return the result with its content cut to what a message may carry; a host may send more."""
    content, cut = cut_utf8(result.content, MAX_CONTENT_BYTES)
    return replace(result, content=content, truncated=True) if cut else result


def spent(envelope: Envelope, result: RunResult | None) -> Envelope:
    """Return the envelope with what a run produced, its tokens taken off the budget."""
    if result is None:
        return replace(envelope, result=None)
    result = bounded(result)
    return replace(envelope, result=result, budget=left(envelope, result))


def left(envelope: Envelope, result: RunResult) -> int | None:
    """Return the tokens left after a run; None when there is no limit."""
    return None if envelope.budget is None else max(0, envelope.budget - result.tokens)
