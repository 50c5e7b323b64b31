"""Execute: run the task on the node that won it, and publish how it goes.

Consumes   task.execute.*.*
Publishes  run.<owner>.<host>            a run request, whose reply subject is event.<owner>.<host>.<instance>.<key>
           stop.<owner>.<host>           that the run of an attempt is to end
           delta.<submitter>.<task>      text, steps and tool calls as they come
           task.sense                    what the run delegates, as a task of its own; the run is sent its end
           task.evaluate                 the envelope with its result, or with an error
Receives   event.*.*.<instance>.*, cancelled.*
State      the claim in the task's record: the fence of every attempt; and the ids of what has been delegated
Gives up   node_lost, agent_failed, node_busy, deadline_exceeded, cancelled: as errors, for EVALUATE to decide
"""

import asyncio
import dataclasses
from functools import partial

from msgspec.structs import replace

from loom.bus.bus import Bus
from loom.bus.hops.delivery import Delivery
from loom.bus.hops.health import Health
from loom.bus.hops.hop_loop import HopLoop, Service
from loom.bus.hops.outcomes import Dead, Done, Leave, Next, Outcome
from loom.bus.host_directory import HostKey
from loom.bus.logs.logger import get_logger
from loom.bus.natsio.connection import Subscription
from loom.bus.natsio.server_errors import Conflict
from loom.bus.natsio.transport.message import Msg
from loom.bus.records import record_from, record_version, records
from loom.bus.topology import EXECUTE_LANE
from loom.phases.execute.delegation import Delegations, call_off
from loom.phases.execute.fencing import Claimed, Standing, Superseded, claim, may_report
from loom.phases.execute.host_errors import Facts, believed
from loom.phases.execute.plain_runs import RUN_S, PlainRun
from loom.phases.execute.run_inbox import EventSubjects, count_discarded
from loom.phases.execute.run_stream import TOO_MANY, Hosts, HostSilent, Interrupt, RunStream
from loom.phases.execute.stops import HostRun, Stops, Why
from loom.schemas.auction import Award
from loom.schemas.base import MAX_CONTENT_BYTES, cut_utf8
from loom.schemas.config import ClusterConfig
from loom.schemas.envelope import Claim, Envelope
from loom.schemas.errors import BusUnavailable
from loom.schemas.run import RunEvent, RunRequest
from loom.schemas.task import RunResult, TaskError

log = get_logger()

SLOTS = 1024
CLAIM_TRIES = 8
SETTLE_S = 5.0
"""After a reconnect: long enough for every host to be back."""
ASK_AGAIN_S = 0.25
SUBTASK_FAILED = "subtask_failed"
MOVES = 3
"""How often a run is asked for again that has moved although no other handler has asked for it."""
NOT_MOVED = "the host states that the run has moved, and no other EXECUTE has asked for it"
CANCELLED = TaskError(code="cancelled", message="the task was cancelled")


class Execute:
    """The fourth phase."""

    def __init__(self, bus: Bus, config: ClusterConfig) -> None:
        self._bus = bus
        self._config = config
        self._records = records(bus)
        self._hosts = Hosts(bus, EventSubjects(bus), Stops(bus))
        self._interrupts: dict[str, list[Interrupt]] = {}
        """Task -> what ends the watching of its runs; a task may be here twice while a run moves."""
        self._cancels: Subscription | None = None
        self._loop = HopLoop(bus, Service("execute", [(EXECUTE_LANE, SLOTS)], Envelope, self.handle))

    def health(self) -> Health:
        """Return how far the work has got."""
        return self._loop.health()

    async def start(self) -> None:
        """Begin to run tasks."""
        await self._hosts.events.start()
        self._cancels = await self._bus.connection.subscribe_sync(
            self._bus.subjects.of("cancelled", "*"), self._on_cancelled
        )
        await self._bus.requests.flush()
        await self._loop.start()

    async def drain(self, timeout_s: float) -> None:
        """Take nothing new, wait for runs for at most `timeout_s`, hand the rest to another replica."""
        await self._loop.drain(timeout_s)
        if self._cancels is not None:
            self._bus.connection.unsubscribe(self._cancels)
        await self._hosts.events.stop()

    async def handle(self, envelope: Envelope, delivery: Delivery) -> Outcome:
        """Claim the attempt, run it, and hand on what came of it."""
        award = envelope.award
        if award is None:
            return Dead("the envelope came without an award")
        if self._bus.clock.now() >= envelope.deadline:
            late = TaskError(code="deadline_exceeded", message="the deadline passed before the run began")
            return await self._report_unclaimed(late, envelope)
        interrupt = Interrupt()
        timer = asyncio.get_running_loop().call_later(envelope.deadline - self._bus.clock.now(), interrupt.set, "late")
        delivery.on_recall = partial(interrupt.set, "recalled")
        if delivery.recalled.is_set():
            interrupt.set("recalled")
        self._interrupts.setdefault(envelope.task_id, []).append(interrupt)
        try:
            return await self._claimed(envelope, award, delivery, interrupt)
        finally:
            timer.cancel()
            self._interrupts[envelope.task_id].remove(interrupt)
            if not self._interrupts[envelope.task_id]:
                del self._interrupts[envelope.task_id]

    async def _claimed(self, envelope: Envelope, award: Award, delivery: Delivery, interrupt: Interrupt) -> Outcome:
        claimed = await self._claim(envelope, award, delivery)
        if isinstance(claimed, Superseded):
            log.info("run_dropped", reason=claimed.reason, attempt=envelope.attempt)
            self._stop(envelope.task_id, claimed.ended, "ended")
            await call_off(self._bus, envelope.task_id, claimed.delegated)
            return Done()
        self._stop(envelope.task_id, claimed.superseded, "superseded")
        envelope = replace(envelope, record_version=claimed.record_version)
        if interrupt.cancelled():
            return await self._give_up(CANCELLED, "cancelled", envelope, award, delivery)
        request = request_for(envelope, award, self._bus.clock.now())
        if award.plain:
            return await self._run_plain(request, envelope, award, delivery, interrupt)
        watch = RunStream(self._hosts, host_of(award), request, interrupt, attached=claimed.attached)
        earlier = claimed.record.delegated if claimed.attached else ()
        errands = Delegations(self._bus, self._config, envelope, delivery, self._loop.top_up, earlier)
        outcome: Outcome | None = None
        try:
            outcome = await self._run(watch, errands, envelope, award, delivery, interrupt)
        finally:
            await errands.close(cancelling=interrupt.cancelled() or is_over(outcome))
        return outcome

    async def _claim(self, envelope: Envelope, award: Award, delivery: Delivery) -> Claimed | Superseded:
        entry = record_from(envelope)
        for _ in range(CLAIM_TRIES):
            read = entry is None
            entry = entry or await self._records.get(envelope.task_id)
            if entry is None:
                return Superseded("the task has no record")
            verdict = claim(entry.value, envelope, award, self._bus.instance, delivery.facts.stream_seq)
            try:
                if isinstance(verdict, Claimed):
                    revision = await self._records.update(envelope.task_id, verdict.record, entry.revision)
                    return dataclasses.replace(verdict, record_version=record_version(verdict.record, revision))
                if read:
                    return verdict
            except Conflict:
                pass
            entry = None
        raise BusUnavailable(f"the record of {envelope.task_id} would not hold still")

    async def _run(
        self,
        watch: RunStream,
        errands: Delegations,
        envelope: Envelope,
        award: Award,
        delivery: Delivery,
        interrupt: Interrupt,
    ) -> Outcome:
        """Watch the run until it ends, the task is cancelled or too late, or this process stops."""
        try:
            last = await self._follow(watch, errands, envelope, delivery)
        except HostSilent as error:
            lost = TaskError(code="node_lost", message=str(error), node_id=award.node_id)
            return await self._give_up(lost, "silent", spent(envelope, errands.result), award, delivery)
        if last is not None:
            return await self._settle(last, errands, envelope, award, delivery, interrupt)
        return await self._interrupted(spent(envelope, errands.result), award, delivery, interrupt)

    async def _run_plain(
        self, request: RunRequest, envelope: Envelope, award: Award, delivery: Delivery, interrupt: Interrupt
    ) -> Outcome:
        """Ask a plain node once, and take its first reply for the end of the run."""
        max_run_s = RUN_S if award.max_run_s is None else award.max_run_s
        delivery.release()  # the wait is for the node: it does not keep others of this process waiting
        try:
            last = await PlainRun(self._hosts, host_of(award), request, interrupt, max_run_s=max_run_s).last_event()
        except HostSilent as error:
            lost = TaskError(code="node_lost", message=str(error), node_id=award.node_id)
            return await self._give_up(lost, "silent", envelope, award, delivery)
        if last is None:
            return await self._interrupted(envelope, award, delivery, interrupt)
        return await self._end(last, envelope, award, delivery, interrupt)

    async def _interrupted(self, envelope: Envelope, award: Award, delivery: Delivery, interrupt: Interrupt) -> Outcome:
        """Give a cancelled or late run up; hand any other one on."""
        if interrupt.cancelled():
            return await self._give_up(CANCELLED, "cancelled", envelope, award, delivery)
        if interrupt.reason == "late":
            late = TaskError(
                code="deadline_exceeded", message="the deadline passed during the run", node_id=award.node_id
            )
            return await self._give_up(late, "late", envelope, award, delivery)
        return Next("execute", envelope)  # recalled, another replica re-attaches; harmless, a suspect starts afresh

    async def _settle(
        self,
        last: RunEvent,
        errands: Delegations,
        envelope: Envelope,
        award: Award,
        delivery: Delivery,
        interrupt: Interrupt,
    ) -> Outcome:
        if last.kind == "moved":
            return await self._give_way(envelope, award, delivery)
        if last.error is TOO_MANY:
            return await self._give_up(error_in(last, award), "flooded", spent(envelope, None), award, delivery)
        failed = last.error is not None and last.error.code == SUBTASK_FAILED and await errands.failed()
        return await self._end(last, envelope, award, delivery, interrupt, delegation_failed=failed)

    async def _end(
        self,
        last: RunEvent,
        envelope: Envelope,
        award: Award,
        delivery: Delivery,
        interrupt: Interrupt,
        *,
        delegation_failed: bool = False,
    ) -> Outcome:
        """Hand on what a run has ended with; its error code counts as far as the facts here confirm it."""
        if last.kind == "result" and last.result is not None:
            return Next("evaluate", replace(spent(envelope, last.result), error=None))
        error = error_in(last, award)
        if last.error is not None:
            facts = Facts(
                budget=envelope.budget,
                tokens=last.result.tokens if last.result else 0,
                left_s=envelope.deadline - self._bus.clock.now(),
                delegation_failed=delegation_failed,
                cancelled=interrupt.cancelled(),
            )
            error = believed(error, facts)
        return await self._report(error, spent(envelope, last.result), delivery)

    async def _follow(
        self, watch: RunStream, errands: Delegations, envelope: Envelope, delivery: Delivery
    ) -> RunEvent | None:
        """Relay the run and return its last event; one that falls silent is asked for once more.

        After an outage of the bus hosts come back one by one, and none of them is to blame for that: until
        they have had time to, a silent one is asked again and again.
        """
        asked_again, moves = False, 0
        while True:
            try:
                last = await self._relay(watch, errands, envelope, delivery)
                if (
                    last is None
                    or last.kind != "moved"
                    or moves == MOVES
                    or not await self._is_alone(envelope, delivery)
                ):
                    return last
                moves += 1  # an earlier request of this handler may reach the host late, as after an outage
                watch = watch.again()
            except HostSilent:
                settling = self._bus.connection.settled_s < SETTLE_S
                if not settling and (asked_again or not watch.heard):
                    raise
                if await self._standing(envelope, delivery) != "report":
                    raise
                if settling:
                    await asyncio.sleep(ASK_AGAIN_S)
                watch, asked_again = watch.again(), not settling

    async def _relay(
        self, watch: RunStream, errands: Delegations, envelope: Envelope, delivery: Delivery
    ) -> RunEvent | None:
        """Relay the run's events and return the last one.

        None when the watching is stopped, or a suspect message has proved harmless.
        """
        deltas = self._bus.subjects.of("delta", envelope.submitter, envelope.task_id)
        async with watch:
            while (event := await watch.next()) is not None and not event.final:
                if delivery.is_suspect:
                    return None
                delivery.release()
                if event.event is None:
                    await errands.hear(event, watch)
                else:
                    await self._bus.connection.publish(deltas, watch.delta(event.seq, event.event))
            return event

    async def _report(self, error: TaskError, envelope: Envelope, delivery: Delivery) -> Outcome:
        """Hand an error on, unless this message may not speak for the task any more."""
        return self._outcome(await self._standing(envelope, delivery), error, envelope)

    def _outcome(self, standing: Standing, error: TaskError, envelope: Envelope) -> Outcome:
        if standing == "report":
            log.info("run_failed", code=error.code, node_id=error.node_id, attempt=envelope.attempt)
            return Next("evaluate", replace(envelope, error=error))
        return Leave() if standing == "leave" else Done()

    async def _give_up(
        self, error: TaskError, why: Why, envelope: Envelope, award: Award, delivery: Delivery
    ) -> Outcome:
        """Hand an error on, and stop the run on its host, unless another handler follows it."""
        standing = await self._standing(envelope, delivery)
        if standing in ("report", "over"):
            self._hosts.stops.begin(HostRun(host_of(award), envelope.task_id, envelope.attempt), why)
        return self._outcome(standing, error, envelope)

    async def _report_unclaimed(self, error: TaskError, envelope: Envelope) -> Outcome:
        """Hand on that the deadline has passed before the claim, and stop the attempt that the record names."""
        entry = await self._records.get(envelope.task_id)
        if entry is None:
            return Done()
        self._stop(envelope.task_id, entry.value.claim, "late")
        over = entry.value.ended or entry.value.claim.attempt > envelope.attempt
        return self._outcome("over" if over else "report", error, envelope)

    def _stop(self, task_id: str, held: Claim | None, why: Why) -> None:
        """Stop the run of a claim, if there is one."""
        if held is not None and held.attempt:
            self._hosts.stops.begin(HostRun(HostKey(held.owner, held.host_id), task_id, held.attempt), why)

    async def _give_way(self, envelope: Envelope, award: Award, delivery: Delivery) -> Outcome:
        """Another handler follows the run now: settle a mere copy of its message, leave it the message itself.

        A host that claims so while no other handler does has failed the attempt.
        """
        if await self._is_alone(envelope, delivery):
            count_discarded(self._bus, host_of(award), "run_not_moved", NOT_MOVED, task_id=envelope.task_id)
            forged = TaskError(code="agent_failed", message=NOT_MOVED, node_id=award.node_id)
            return await self._give_up(forged, "forged", spent(envelope, None), award, delivery)
        standing = await self._standing(envelope, delivery)
        return Done() if standing in ("over", "settle") else Leave()

    async def _is_alone(self, envelope: Envelope, delivery: Delivery) -> bool:
        """Whether no other handler follows the run, by the record and in this process."""
        alone = len(self._interrupts[envelope.task_id]) == 1
        return alone and await self._standing(envelope, delivery) == "report"

    async def _standing(self, envelope: Envelope, delivery: Delivery) -> Standing:
        """What the record, read again, lets this message do."""
        entry = await self._records.get(envelope.task_id)
        if entry is None:
            return "settle"
        return may_report(entry.value, envelope.attempt, self._bus.instance, delivery.facts.stream_seq)

    def _on_cancelled(self, msg: Msg) -> None:
        for interrupt in self._interrupts.get(msg.subject.rsplit(".", 1)[1], ()):
            interrupt.set("cancelled")


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


def host_of(award: Award) -> HostKey:
    """Return the host that won."""
    return HostKey(award.owner, award.host_id)


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
