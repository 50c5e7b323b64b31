"""Execute: run a task on the node that won it, and publish the run's events.

Consumes   task.execute.*.*
Publishes  run.<owner>.<host>            a run request, whose reply subject is event.<owner>.<host>.<instance>.<key>
           stop.<owner>.<host>           a request to end the run of an attempt
           delta.<submitter>.<task>      text, steps and tool calls as they arrive
           task.sense                    each delegated task; its result is sent to the run
           task.evaluate                 the envelope with its result, or with an error
Receives   event.*.*.<instance>.*, cancelled.*
State      the claim in the task's record, which fences every attempt; and the ids of delegated tasks
Gives up   node_lost, agent_failed, node_busy, deadline_exceeded, cancelled: as errors, which EVALUATE decides on
"""

import asyncio
import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from msgspec.structs import replace

from loom.bus.bus import Bus
from loom.bus.hops.delivery import Delivery
from loom.bus.hops.health import Health
from loom.bus.hops.hop_loop import HopLoop, Service
from loom.bus.hops.outcomes import Dead, Done, Outcome
from loom.bus.host_directory import HostKey
from loom.bus.logs.logger import get_logger
from loom.bus.natsio.connection import Subscription
from loom.bus.natsio.server_errors import Conflict
from loom.bus.natsio.transport.message import Msg
from loom.bus.records import record_from, record_version, records
from loom.bus.topology import EXECUTE_LANE
from loom.phases.execute.attempt import Attempt, failure_outcome
from loom.phases.execute.claims import Claimed, Superseded, claim
from loom.phases.execute.delegation import Delegations, cancel_tasks
from loom.phases.execute.run_inbox import EventSubjects
from loom.phases.execute.run_stream import Hosts, Interrupt
from loom.phases.execute.stops import HostRun, StopReason, Stops
from loom.phases.execute.timings import ExecuteTimings
from loom.schemas.auction import Award
from loom.schemas.config import ClusterConfig
from loom.schemas.envelope import Claim, Envelope
from loom.schemas.errors import BusUnavailable
from loom.schemas.task import TaskError

log = get_logger()

SLOTS = 1024
CLAIM_TRIES = 8


class Execute:
    """Claims each attempt in the task's record, runs it on the awarded host, and passes on its outcome.

    A replica handles up to `SLOTS` runs at once. On a drain another replica reattaches to the runs that are left.

    Args:
        bus: A connected bus.
        config: Limits for delegated tasks.
        timings: Waits and intervals.
    """

    def __init__(self, bus: Bus, config: ClusterConfig, *, timings: ExecuteTimings = ExecuteTimings()) -> None:
        self._bus = bus
        self._config = config
        self._records = records(bus)
        self._hosts = Hosts(bus, EventSubjects(bus), Stops(bus, timings.repeat_stop_s), timings)
        self._interrupts: dict[str, list[Interrupt]] = {}
        """Task -> the interrupts of its handlers; a task has two handlers while a run moves."""
        self._cancels: Subscription | None = None
        self._loop = HopLoop(bus, Service("execute", [(EXECUTE_LANE, SLOTS)], Envelope, self.handle))

    def health(self) -> Health:
        """Return the number of handled and open messages."""
        return self._loop.health()

    async def start(self) -> None:
        """Subscribe to run events and cancels, then start to consume tasks."""
        await self._hosts.events.start()
        self._cancels = await self._bus.connection.subscribe_sync(
            self._bus.subjects.of("cancelled", "*"), self._on_cancelled
        )
        await self._bus.requests.flush()
        await self._loop.start()

    async def drain(self, timeout_s: float) -> None:
        """Consume no more tasks, wait up to `timeout_s` for runs to end, and give the rest to another replica."""
        await self._loop.drain(timeout_s)
        if self._cancels is not None:
            self._bus.connection.unsubscribe(self._cancels)
        await self._hosts.events.stop()

    async def handle(self, envelope: Envelope, delivery: Delivery) -> Outcome:
        """Claim the attempt, run it on its host, and return the outcome."""
        award = envelope.award
        if award is None:
            return Dead("the envelope came without an award")
        left_s = envelope.deadline - self._bus.clock.now()
        if left_s <= 0:
            return await self._fail_late(envelope)
        with self._interruptible(envelope.task_id, delivery, left_s) as interrupt:
            verdict = await self._claim(envelope, award, delivery)
            if isinstance(verdict, Superseded):
                return await self._drop(verdict, envelope)
            self._stop(envelope.task_id, verdict.superseded, "superseded")
            envelope = replace(envelope, record_version=verdict.record_version)
            return await self._attempt(verdict, envelope, award, delivery, interrupt).run()

    @contextmanager
    def _interruptible(self, task_id: str, delivery: Delivery, left_s: float) -> Iterator[Interrupt]:
        """Yield the interrupt of a handler, set by a cancel, by a recall, or after `left_s` seconds."""
        interrupt = Interrupt()
        timer = asyncio.get_running_loop().call_later(left_s, interrupt.set, "late")
        delivery.on_recall = partial(interrupt.set, "recalled")
        if delivery.recalled.is_set():
            interrupt.set("recalled")
        self._interrupts.setdefault(task_id, []).append(interrupt)
        try:
            yield interrupt
        finally:
            timer.cancel()
            self._interrupts[task_id].remove(interrupt)
            if not self._interrupts[task_id]:
                del self._interrupts[task_id]

    def _attempt(
        self, claimed: Claimed, envelope: Envelope, award: Award, delivery: Delivery, interrupt: Interrupt
    ) -> Attempt:
        delegations = Delegations(
            self._bus,
            self._config,
            envelope,
            delivery,
            self._loop.top_up,
            earlier=claimed.record.delegated if claimed.attached else (),
            poll_record_s=self._hosts.timings.poll_record_s,
        )
        return Attempt(
            self._hosts,
            envelope,
            award,
            delivery,
            interrupt,
            delegations,
            attached=claimed.attached,
            is_only_handler=lambda: len(self._interrupts[envelope.task_id]) == 1,
        )

    async def _claim(self, envelope: Envelope, award: Award, delivery: Delivery) -> Claimed | Superseded:
        """Write the claim into the task's record by compare-and-set.

        Raises:
            BusUnavailable: Every write conflicted with another one.
        """
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
        raise BusUnavailable(
            f"gave up claiming an attempt in the record of {envelope.task_id} after {CLAIM_TRIES} conflicting writes"
        )

    async def _drop(self, verdict: Superseded, envelope: Envelope) -> Outcome:
        """Stop the run of an ended task, and cancel the tasks that it has delegated."""
        log.info("run_dropped", reason=verdict.reason, attempt=envelope.attempt)
        self._stop(envelope.task_id, verdict.ended, "ended")
        await cancel_tasks(self._bus, envelope.task_id, verdict.delegated)
        return Done()

    async def _fail_late(self, envelope: Envelope) -> Outcome:
        """Pass on that the deadline passed before the claim, and stop the attempt in the record."""
        late = TaskError(code="deadline_exceeded", message="the deadline passed before the run began")
        entry = await self._records.get(envelope.task_id)
        if entry is None:
            return Done()
        self._stop(envelope.task_id, entry.value.claim, "late")
        over = entry.value.ended or entry.value.claim.attempt > envelope.attempt
        return failure_outcome("over" if over else "own", late, envelope)

    def _stop(self, task_id: str, held: Claim | None, why: StopReason) -> None:
        """Stop the run of a claim, if there is one."""
        if held is not None and held.attempt:
            self._hosts.stops.start(HostRun(HostKey(held.owner, held.host_id), task_id, held.attempt), why)

    def _on_cancelled(self, msg: Msg) -> None:
        for interrupt in self._interrupts.get(msg.subject.rsplit(".", 1)[1], ()):
            interrupt.set("cancelled")
