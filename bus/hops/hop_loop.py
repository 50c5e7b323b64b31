"""The hop loop: pull, decode, decide, settle. Handlers decide; only this file settles."""

import asyncio
import contextlib
import random
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import structlog

from loom.bus.bus import Bus
from loom.bus.dead_letters.write import End, dead_letter
from loom.bus.hops.delivery import DEAD_AFTER, Delivery, Slots
from loom.bus.hops.duplicates import resolve, store_once
from loom.bus.hops.health import Health
from loom.bus.hops.outcomes import Dead, Done, Fail, Later, Leave, Next, Outcome
from loom.bus.hops.schedules import SCHEDULE, TARGET, forbidden_scheduler
from loom.bus.logs.log_fields import error_fields
from loom.bus.logs.logger import get_logger
from loom.bus.natsio.ack_metadata import rfc3339
from loom.bus.natsio.pull_consumer import PullConsumer
from loom.bus.natsio.transport.message import Msg
from loom.bus.topology import Lane, ensure_consumer
from loom.schemas.base import Undecodable, decode, total_s
from loom.schemas.envelope import Envelope, Hop, Phase
from loom.schemas.errors import LoomError, Overloaded
from loom.schemas.notices import PlanTimeout

log = get_logger()
T = TypeVar("T")

IN_PROGRESS_S = 10.0  # a third of ack_wait
SLOTS = 256
FULL_S = 2.0  # between two tries while the server is full
RECALL_S = 2.0  # for handlers to give work back when the drain time is over

SHARES = {"low": 0.2, "normal": 0.6, "high": 0.1, "critical": 0.1}
"""A lane's part of a phase's slots: a fifth is kept for what is urgent."""


def lane_slots(lane: Lane, total: int = SLOTS) -> int:
    """Return the slots of a lane named `<phase>_<priority>`."""
    return int(total * SHARES[lane.name.rsplit("_", 1)[1]])


def retry_s(delivered: int) -> float:
    """Return the longest wait before a message that failed comes again: 0.5 s, doubled each time, at most 30."""
    return min(30.0, 0.25 * 2.0 ** min(delivered, DEAD_AFTER))


@dataclass(frozen=True)
class Service(Generic[T]):
    """One phase's consumers and what is done with their messages.

    Args:
        lanes: Consumer and slots of each lane.
        shape: What the messages are.
        handle: Decides; may publish what stored state implies before it returns.
        read: Reads a message where it is not always of one shape.
        window: How many more messages a lane may take, where its slots alone don't say.
        end: Ends a task whose message is dead, where that is this phase's own business.
    """

    phase: Phase
    lanes: Sequence[tuple[Lane, int]]
    shape: type[T]
    handle: Callable[[T, Delivery], Awaitable[Outcome]]
    read: Callable[[bytes], T] | None = None
    window: Callable[[Lane, Slots], int] = field(default=lambda _lane, slots: slots.free)
    end: End | None = None


class HopLoop(Generic[T]):
    """Runs a service against the bus: bounded, redelivery-safe, drained on stop."""

    def __init__(self, bus: Bus, service: Service[T]) -> None:
        self._bus = bus
        self._service = service
        self._pulls: list[PullConsumer] = []
        self._in_hand: dict[asyncio.Task[None], Delivery] = {}
        self._slots: dict[str, Slots] = {}
        self._handled = 0

    def health(self) -> Health:
        """Return what has been handled and what is in hand."""
        since = min((delivery.received for delivery in self._in_hand.values()), default=None)
        oldest_s = 0.0 if since is None else max(0.0, self._bus.clock.now() - since)
        return Health(handled=self._handled, in_hand=len(self._in_hand), oldest_s=total_s(oldest_s))

    async def start(self) -> None:
        """Begin to take messages; returns once the server has been asked."""
        self._ticking = self._bus.tasks.spawn(self._tick(), name=f"in-progress {self._service.phase}", essential=True)
        for lane, total in self._service.lanes:
            slots = self._slots[lane.name] = Slots(total)
            pull = PullConsumer(
                self._bus.jetstream,
                self._bus.subjects.stream(lane.stream),
                lane.name,
                window=lambda lane=lane, slots=slots: self._service.window(lane, slots),  # type: ignore[misc]
                sink=lambda msg, slots=slots: self._accept(msg, slots),  # type: ignore[misc]
                broken=lambda lane=lane: ensure_consumer(self._bus, lane),  # type: ignore[misc]
            )
            self._pulls.append(pull)
            await pull.start()

    def top_up(self) -> None:
        """Ask for more where a lane's window has grown."""
        for pull in self._pulls:
            pull.top_up()

    async def drain(self, timeout_s: float) -> None:
        """Take nothing new, finish for at most `timeout_s`, give the rest back. Safe to call twice or unstarted."""
        pulls, self._pulls = self._pulls, []
        if not pulls:
            return
        await asyncio.gather(*(pull.stop() for pull in pulls))
        for limit_s in (timeout_s, RECALL_S):
            if self._in_hand:
                await asyncio.wait(list(self._in_hand), timeout=limit_s)
            for delivery in self._in_hand.values():
                delivery.recall()
        rest = dict(self._in_hand)
        for task in rest:
            task.cancel()
        await asyncio.gather(*rest, return_exceptions=True)
        for delivery in rest.values():
            await self._answer(delivery, b"-NAK")
        self._ticking.cancel()

    def _accept(self, msg: Msg, slots: Slots) -> None:
        delivery = Delivery(msg, slots, self._bus.isolation)
        delivery.received = self._bus.clock.now()
        slots.taken += 1
        task = self._bus.tasks.spawn(self._serve(delivery), name=f"hop {delivery.subject}")
        self._in_hand[task] = delivery
        task.add_done_callback(self._finished)

    def _finished(self, task: asyncio.Task[None]) -> None:
        delivery = self._in_hand.pop(task)
        delivery.release()
        delivery.slots.taken -= 1
        self.top_up()
        if not task.cancelled() and task.exception():
            log.error("loop_failed", subject=delivery.subject, **error_fields(task.exception()))

    async def _serve(self, delivery: Delivery) -> None:
        task_id = delivery.subject.rpartition(".")[2]  # the last token of every lane's subjects
        structlog.contextvars.bind_contextvars(task_id=task_id, phase=self._service.phase)  # of this asyncio task alone
        try:
            await delivery.enter()
            await self._work(delivery, task_id)
            self._handled += 1
        except Exception as error:  # noqa: BLE001 - whatever a handler raises, its message must come back
            wait_s = retry_s(delivery.facts.delivered) * random.uniform(0.5, 1)  # noqa: S311 - jitter
            log.warning("hop_failed", retry_in_s=round(wait_s, 2), **error_fields(error))
            await self._answer(delivery, b'-NAK {"delay": %d}' % int(wait_s * 1e9))

    async def _work(self, delivery: Delivery, task_id: str) -> None:
        """Decide and settle; while the server stores nothing, try again in hand.

        It is not the message's fault, and handed back its count would grow until it passed for dead.
        """
        while True:
            try:
                await self._settle(delivery, task_id, await self._decide(delivery))
            except Overloaded as error:
                if delivery.recalled.is_set():
                    raise
                log.warning("hop_waits", **error_fields(error))
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(FULL_S):
                        await delivery.recalled.wait()
            else:
                return

    async def _decide(self, delivery: Delivery) -> Outcome:
        if delivery.dead:
            return Dead(f"delivered {delivery.facts.delivered - 1} times without being settled")
        if (scheduler := forbidden_scheduler(delivery.msg)) is not None:
            return Dead(f"scheduled by {scheduler}")
        try:
            message = self._read(delivery.msg.data)
        except Undecodable as error:
            return Dead(f"undecodable: {error.message}")
        try:
            return await self._service.handle(message, delivery)
        except Undecodable as error:  # a stored value: the next delivery would find the same
            return Dead(f"a stored value is undecodable: {error.message}")

    def _read(self, raw: bytes) -> T:
        service = self._service
        return decode(raw, service.shape) if service.read is None else service.read(raw)

    async def _settle(self, delivery: Delivery, task_id: str, outcome: Outcome) -> None:
        match outcome:
            case Next(phase, envelope, msg_id):
                await self._pass_on(delivery, phase, envelope, msg_id)
            case Fail(error, envelope):
                await self._pass_on(delivery, "evaluate", envelope.failed(error), None)
            case Later():
                await self._postpone(delivery, outcome)
            case Dead(reason):
                await dead_letter(self._bus, self._service.phase, task_id, delivery, reason, self._service.end)
            case Done():
                pass
            case Leave():
                return
        await self._answer(delivery, b"+ACK")

    def _hopped(self, delivery: Delivery, envelope: Envelope) -> Envelope:
        hop = Hop(
            phase=self._service.phase,
            instance=self._bus.instance,
            started=delivery.received,
            finished=max(self._bus.clock.now(), delivery.received),
            step=envelope.step,
        )
        return envelope.with_hop(hop)

    async def _pass_on(self, delivery: Delivery, phase: Phase, envelope: Envelope, msg_id: str | None) -> None:
        hopped = self._hopped(delivery, envelope)
        subject = self._bus.subjects.task(phase, hopped.priority, hopped.task_id)
        msg_id = msg_id or f"{hopped.task_id}:{delivery.origin}"
        ack = await self._bus.jetstream.publish(subject, hopped, msg_id=msg_id)
        if ack.duplicate:
            await resolve(self._bus, ack, subject, hopped, msg_id=msg_id, after=delivery.seq_in(ack.stream))

    async def _postpone(self, delivery: Delivery, later: Later) -> None:
        hopped = self._hopped(delivery, later.envelope)
        await schedule(
            self._bus,
            self._bus.subjects.later(self._service.phase, hopped.task_id, delivery.origin),
            target=self._bus.subjects.task(later.phase or self._service.phase, hopped.priority, hopped.task_id),
            at=self._bus.clock.now() + later.delay_s,
            message=hopped,
            msg_id=later.msg_id or f"{hopped.task_id}:{delivery.origin}",
        )

    async def _answer(self, delivery: Delivery, verb: bytes) -> None:
        try:
            await self._bus.connection.publish(delivery.msg.reply, verb)
        except LoomError as error:
            log.warning("settle_failed", verb=verb.decode()[:4], error=error.message)

    async def _tick(self) -> None:
        """Tell the server every 10 s that what is in hand is still being worked on."""
        while True:
            await asyncio.sleep(IN_PROGRESS_S)
            for delivery in list(self._in_hand.values()):
                await self._answer(delivery, b"+WPI")


async def schedule(
    bus: Bus, subject: str, *, target: str, at: float, message: Envelope | PlanTimeout, msg_id: str
) -> None:
    """Store `message` under `subject`, to be moved to `target` at server time `at`.

    A second schedule on the same subject replaces the first.
    """
    headers = {SCHEDULE: f"@at {rfc3339(at)}", TARGET: target}
    await store_once(bus, subject, message, msg_id=msg_id, headers=headers)
