"""One claimed attempt: runs it on its host, relays its events and returns the outcome."""

import asyncio
from collections.abc import Callable

from msgspec.structs import replace

from loom.bus.hops.delivery import Delivery
from loom.bus.hops.outcomes import Done, Leave, Next, Outcome
from loom.bus.logs.logger import get_logger
from loom.bus.records import records
from loom.phases.execute.claims import Ownership, ownership
from loom.phases.execute.delegation import Delegations
from loom.phases.execute.host_errors import RunFacts, confirmed_error
from loom.phases.execute.plain_runs import RUN_S, PlainRun
from loom.phases.execute.run_inbox import count_discarded
from loom.phases.execute.run_messages import error_of, host_of, request_for, with_result
from loom.phases.execute.run_stream import TOO_MANY, Hosts, HostSilent, Interrupt, RunStream
from loom.phases.execute.stops import HostRun, StopReason
from loom.schemas.auction import Award
from loom.schemas.envelope import Envelope
from loom.schemas.run import RunEvent
from loom.schemas.task import RunResult, TaskError

log = get_logger()

SETTLE_S = 5.0
"""Seconds after a reconnect within which every host is expected to be back."""
REATTACH_S = 0.25
"""Pause before a request is repeated after a reconnect."""
SUBTASK_FAILED = "subtask_failed"
MOVES = 3
"""How often a run that has moved is requested again although no other handler has requested it."""
NOT_MOVED = "the host states that the run has moved, and no other EXECUTE has requested it"


class Attempt:
    """Runs a claimed attempt on its host, relays its events to the submitter and returns the outcome.

    Args:
        hosts: The connections to node hosts.
        envelope: The task's, with its award.
        award: Names the host and the node.
        delivery: The message that holds the claim.
        interrupt: Ends the run early.
        delegations: The tasks that the run delegates.
        attached: Whether the run may already be in progress.
        is_only_handler: Returns whether no other handler of this process runs the task.
    """

    def __init__(
        self,
        hosts: Hosts,
        envelope: Envelope,
        award: Award,
        delivery: Delivery,
        interrupt: Interrupt,
        delegations: Delegations,
        *,
        attached: bool,
        is_only_handler: Callable[[], bool],
    ) -> None:
        self._hosts = hosts
        self._bus = hosts.bus
        self._records = records(hosts.bus)
        self._envelope = envelope
        self._award = award
        self._delivery = delivery
        self._interrupt = interrupt
        self._delegations = delegations
        self._attached = attached
        self._is_only_handler = is_only_handler

    async def run(self) -> Outcome:
        """Run the attempt until its last event, an interrupt, or the loss of its host; return the outcome."""
        if self._interrupt.cancelled():
            return await self._on_interrupt(self._envelope)
        outcome: Outcome | None = None
        try:
            outcome = await self._run()
        finally:
            await self._delegations.close(cancelling=self._interrupt.cancelled() or is_over(outcome))
        return outcome

    async def _run(self) -> Outcome:
        try:
            last = await (self._run_plain() if self._award.plain else self._relay_run())
        except HostSilent as error:
            return await self._give_up(self._error("node_lost", str(error)), "silent", self._with_delegated_usage())
        match last:
            case None:
                return await self._on_interrupt(self._with_delegated_usage())
            case RunEvent(kind="moved"):
                return await self._yield_to_newer()
            case RunEvent(kind="result", result=RunResult() as result):
                return Next("evaluate", replace(with_result(self._envelope, result), error=None))
            case _:
                return await self._on_error(last)

    async def _run_plain(self) -> RunEvent | None:
        """Send a plain node one request and return its first reply as the last event; None on an interrupt."""
        max_run_s = RUN_S if self._award.max_run_s is None else self._award.max_run_s
        request = request_for(self._envelope, self._award, self._bus.clock.now())
        self._delivery.release()  # the wait is for the node alone: other messages of this process may be handled
        plain = PlainRun(self._hosts, host_of(self._award), request, self._interrupt, max_run_s=max_run_s)
        return await plain.last_event()

    async def _relay_run(self) -> RunEvent | None:
        """Relay the run and return its last event; the request to a silent host is repeated once.

        After an outage of the bus hosts reconnect one by one. For `SETTLE_S` the request to a silent host is repeated
        without a limit.
        """
        request = request_for(self._envelope, self._award, self._bus.clock.now())
        stream = RunStream(self._hosts, host_of(self._award), request, self._interrupt, attached=self._attached)
        repeated, moves = False, 0
        while True:
            try:
                last = await self._relay(stream)
                if last is None or last.kind != "moved" or moves == MOVES or not await self._is_only_owner():
                    return last
                moves += 1  # an earlier request of this handler may reach the host late, for example after an outage
                stream = stream.reattach()
            except HostSilent:
                settling = self._bus.connection.settled_s < SETTLE_S
                if not settling and (repeated or not stream.has_events):
                    raise
                if await self._ownership() != "own":
                    raise
                if settling:
                    await asyncio.sleep(REATTACH_S)
                stream, repeated = stream.reattach(), not settling

    async def _relay(self, stream: RunStream) -> RunEvent | None:
        """Publish the run's events as deltas and return the last event.

        Returns:
            None on an interrupt, or once a suspect message has proved harmless.
        """
        subject = self._bus.subjects.of("delta", self._envelope.submitter, self._envelope.task_id)
        async with stream:
            while (event := await stream.next()) is not None and not event.final:
                if self._delivery.is_suspect:
                    return None
                self._delivery.release()
                if event.event is None:
                    await self._delegations.on_event(event, stream)
                else:
                    await self._bus.connection.publish(subject, stream.delta(event.seq, event.event))
            return event

    async def _on_interrupt(self, envelope: Envelope) -> Outcome:
        """Give up a cancelled or late run; pass any other run to another replica."""
        if self._interrupt.cancelled():
            return await self._give_up(
                TaskError(code="cancelled", message="the task was cancelled"), "cancelled", envelope
            )
        if self._interrupt.reason == "late":
            late = self._error("deadline_exceeded", "the deadline passed during the run")
            return await self._give_up(late, "late", envelope)
        # After a recall another replica reattaches to the run. A harmless suspect is handled again from the start.
        return Next("execute", envelope)

    async def _yield_to_newer(self) -> Outcome:
        """Leave the run to another handler: settle a copy of its message, leave its own message unsettled.

        A host that reports a move although no other handler has requested the run has failed the attempt.
        """
        if await self._is_only_owner():
            task_id = self._envelope.task_id
            count_discarded(self._bus, host_of(self._award), "run_not_moved", NOT_MOVED, task_id=task_id)
            return await self._give_up(
                self._error("agent_failed", NOT_MOVED), "forged", with_result(self._envelope, None)
            )
        return Done() if await self._ownership() in ("over", "other_message") else Leave()

    async def _on_error(self, last: RunEvent) -> Outcome:
        """Pass on the error of a run; its code is kept only as far as the facts of this phase confirm it."""
        error = error_of(last, self._award)
        if last.error is TOO_MANY:
            return await self._give_up(error, "flooded", with_result(self._envelope, None))
        if last.error is not None:
            failed = last.error.code == SUBTASK_FAILED and await self._delegations.failed()
            facts = RunFacts(
                budget=self._envelope.budget,
                tokens=last.result.tokens if last.result else 0,
                left_s=self._envelope.deadline - self._bus.clock.now(),
                delegation_failed=failed,
                cancelled=self._interrupt.cancelled(),
            )
            error = confirmed_error(error, facts)
        return failure_outcome(await self._ownership(), error, with_result(self._envelope, last.result))

    async def _give_up(self, error: TaskError, why: StopReason, envelope: Envelope) -> Outcome:
        """Pass on an error, and stop the run on its host unless another handler runs it."""
        owner = await self._ownership()
        if owner in ("own", "over"):
            self._hosts.stops.start(HostRun(host_of(self._award), envelope.task_id, envelope.attempt), why)
        return failure_outcome(owner, error, envelope)

    async def _is_only_owner(self) -> bool:
        """Return whether no other handler runs the attempt, by the record and in this process."""
        return self._is_only_handler() and await self._ownership() == "own"

    async def _ownership(self) -> Ownership:
        """Read the record again and return who owns the attempt."""
        entry = await self._records.get(self._envelope.task_id)
        if entry is None:
            return "other_message"
        return ownership(entry.value, self._envelope.attempt, self._bus.instance, self._delivery.facts.stream_seq)

    def _with_delegated_usage(self) -> Envelope:
        """Return the envelope with what delegated tasks have used, for a run that cannot report it any more."""
        return with_result(self._envelope, self._delegations.usage)

    def _error(self, code: str, message: str) -> TaskError:
        return TaskError(code=code, message=message, node_id=self._award.node_id)


def failure_outcome(owner: Ownership, error: TaskError, envelope: Envelope) -> Outcome:
    """Return the outcome of a failed attempt: only the owner of the claim passes the error on."""
    if owner == "own":
        log.info("run_failed", code=error.code, node_id=error.node_id, attempt=envelope.attempt)
        return Next("evaluate", replace(envelope, error=error))
    return Leave() if owner == "other_replica" else Done()


def is_over(outcome: Outcome | None) -> bool:
    """Return whether the run has ended, and does not continue under another handler."""
    return isinstance(outcome, Next) and outcome.phase == "evaluate"
