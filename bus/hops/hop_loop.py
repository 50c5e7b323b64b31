"""The hop loop: pull, decode, decide, settle. Handlers decide what follows; only this module settles messages."""

import asyncio
import contextlib
import random
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
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

IN_PROGRESS_S = 10.0
"""Seconds between two acknowledgements of progress: a third of ACK_WAIT_S."""
SLOTS = 256
FULL_S = 2.0
"""Seconds between two tries while the server is full."""
RECALL_S = 2.0
"""Seconds that handlers have to give deliveries back after the drain time."""

SHARES = {"low": 0.2, "normal": 0.6, "high": 0.1, "critical": 0.1}
"""Priority -> share of the phase's slots: a fifth is kept for urgent tasks."""


def lane_slots(lane: Lane, total: int = SLOTS) -> int:
    """Return the slots of a lane named `<phase>_<priority>`."""
    return int(total * SHARES[lane.name.rsplit("_", 1)[1]])


def retry_s(delivered: int) -> float:
    """Return the longest wait before a failed message is delivered again: 0.5 s, doubled each time, at most 30 s."""
    return min(30.0, 0.25 * 2.0 ** min(delivered, DEAD_AFTER))


@dataclass(frozen=True)
class Service(Generic[T]):
    """The consumers of a phase and the handler of their messages.

    Args:
        lanes: Consumer and slots of each lane.
        shape: Type of the messages.
        handle: Returns what follows; may publish what stored state implies before it returns.
        read: Decodes a message, for a phase whose messages have several types.
        window: Returns how many more messages a lane may receive; default: its free slots.
        end: Ends the task of a dead message, for a phase that does so itself.
    """

    phase: Phase
    lanes: Sequence[tuple[Lane, int]]
    shape: type[T]
    handle: Callable[[T, Delivery], Awaitable[Outcome]]
    read: Callable[[bytes], T] | None = None
    window: Callable[[Lane, Slots], int] = field(default=lambda _lane, slots: slots.free)
    end: End | None = None


class HopLoop(Generic[T]):
    """Runs the handler of a phase over its messages: with bounded concurrency, safe to redeliver, drained on stop."""

    def __init__(self, bus: Bus, service: Service[T]) -> None:
        self._bus = bus
        self._service = service
        self._consumers: list[PullConsumer] = []
        self._deliveries: dict[asyncio.Task[None], Delivery] = {}
        self._in_progress: asyncio.Task[None] | None = None
        self._slots: dict[str, Slots] = {}
        self._handled = 0

    def health(self) -> Health:
        """Return how many messages were handled and are being handled, and the age of the oldest of the latter."""
        since = min((delivery.received for delivery in self._deliveries.values()), default=None)
        oldest_s = 0.0 if since is None else max(0.0, self._bus.clock.now() - since)
        return Health(handled=self._handled, in_hand=len(self._deliveries), oldest_s=total_s(oldest_s))

    async def start(self) -> None:
        """Start pulling; returns once the first requests are sent."""
        self._in_progress = self._bus.tasks.spawn(
            self._send_in_progress(), name=f"in-progress {self._service.phase}", essential=True
        )
        for lane, total in self._service.lanes:
            slots = self._slots[lane.name] = Slots(total)
            consumer = PullConsumer(
                self._bus.jetstream,
                self._bus.subjects.stream(lane.stream),
                lane.name,
                window=partial(self._service.window, lane, slots),
                sink=partial(self._accept, slots),
                restore=partial(ensure_consumer, self._bus, lane),
            )
            self._consumers.append(consumer)
            await consumer.start()

    def top_up(self) -> None:
        """Request more messages for the lanes whose window has grown."""
        for consumer in self._consumers:
            consumer.top_up()

    async def drain(self, timeout_s: float) -> None:
        """Stop pulling, finish deliveries for at most `timeout_s`, and give the others back.

        Safe to call twice or before `start`.
        """
        consumers, self._consumers = self._consumers, []
        if not consumers:
            return
        await asyncio.gather(*(consumer.stop() for consumer in consumers))
        for limit_s in (timeout_s, RECALL_S):
            if self._deliveries:
                await asyncio.wait(list(self._deliveries), timeout=limit_s)
            for delivery in self._deliveries.values():
                delivery.recall()
        unfinished = dict(self._deliveries)
        for task in unfinished:
            task.cancel()
        await asyncio.gather(*unfinished, return_exceptions=True)
        for delivery in unfinished.values():
            await self._settle_message(delivery, b"-NAK")
        if self._in_progress is not None:
            self._in_progress.cancel()

    async def _checkpoint(self, name: str) -> None:
        """Do nothing. Crash tests replace this method to end the process at a named point.

        Args:
            name: `fetched`, `handled`, `before ack` or `acked`.
        """

    # -- one delivery

    def _accept(self, slots: Slots, msg: Msg) -> None:
        delivery = Delivery(msg, slots, self._bus.isolation)
        delivery.received = self._bus.clock.now()
        slots.taken += 1
        task = self._bus.tasks.spawn(self._process(delivery), name=f"hop {delivery.subject}")
        self._deliveries[task] = delivery
        task.add_done_callback(self._on_done)

    def _on_done(self, task: asyncio.Task[None]) -> None:
        delivery = self._deliveries.pop(task)
        delivery.release()
        delivery.slots.taken -= 1
        self.top_up()
        if not task.cancelled() and task.exception():
            log.error("loop_failed", subject=delivery.subject, **error_fields(task.exception()))

    async def _process(self, delivery: Delivery) -> None:
        task_id = delivery.subject.rpartition(".")[2]  # the last token of every lane's subjects
        structlog.contextvars.bind_contextvars(task_id=task_id, phase=self._service.phase)  # of this asyncio task alone
        try:
            await delivery.acquire()
            await self._handle_until_stored(delivery, task_id)
            self._handled += 1
        except Exception as error:  # noqa: BLE001 - whatever a handler raises, its message must be delivered again
            wait_s = retry_s(delivery.facts.delivered) * random.uniform(0.5, 1)  # noqa: S311 - jitter
            log.warning("hop_failed", retry_in_s=round(wait_s, 2), **error_fields(error))
            await self._settle_message(delivery, b'-NAK {"delay": %d}' % int(wait_s * 1e9))

    async def _handle_until_stored(self, delivery: Delivery, task_id: str) -> None:
        """Handle and settle a delivery; retry here while the server stores nothing.

        The message is not the cause. If it were given back, its delivery count would grow until it was dead-lettered.
        """
        while True:
            try:
                await self._apply(delivery, task_id, await self._decide(delivery))
            except Overloaded as error:
                if delivery.recalled.is_set():
                    raise
                log.warning("hop_stalled_stream_full", **error_fields(error))
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(FULL_S):
                        await delivery.recalled.wait()
            else:
                return

    async def _decide(self, delivery: Delivery) -> Outcome:
        await self._checkpoint("fetched")
        if delivery.exceeded_max_deliveries:
            return Dead(f"delivered {delivery.facts.delivered - 1} times without being settled")
        if (scheduler := forbidden_scheduler(delivery.msg)) is not None:
            return Dead(f"scheduled by {scheduler}")
        try:
            message = self._read(delivery.msg.data)
        except Undecodable as error:
            return Dead(f"undecodable: {error.message}")
        try:
            return await self._service.handle(message, delivery)
        except Undecodable as error:  # of a stored value: the next delivery would read the same bytes
            return Dead(f"a stored value is undecodable: {error.message}")

    def _read(self, raw: bytes) -> T:
        service = self._service
        return decode(raw, service.shape) if service.read is None else service.read(raw)

    # -- outcomes

    async def _apply(self, delivery: Delivery, task_id: str, outcome: Outcome) -> None:
        await self._checkpoint("handled")
        match outcome:
            case Next(phase, envelope, msg_id):
                await self._publish_hop(delivery, phase, envelope, msg_id)
            case Fail(error, envelope):
                await self._publish_hop(delivery, "evaluate", envelope.failed(error), None)
            case Later():
                await self._schedule_hop(delivery, outcome)
            case Dead(reason):
                await dead_letter(self._bus, self._service.phase, task_id, delivery, reason, self._service.end)
            case Done():
                pass
            case Leave():
                return
        await self._checkpoint("before ack")
        await self._settle_message(delivery, b"+ACK")
        await self._checkpoint("acked")

    def _with_hop(self, delivery: Delivery, envelope: Envelope) -> Envelope:
        hop = Hop(
            phase=self._service.phase,
            instance=self._bus.instance,
            started=delivery.received,
            finished=max(self._bus.clock.now(), delivery.received),
            step=envelope.step,
        )
        return envelope.with_hop(hop)

    async def _publish_hop(self, delivery: Delivery, phase: Phase, envelope: Envelope, msg_id: str | None) -> None:
        envelope = self._with_hop(delivery, envelope)
        subject = self._bus.subjects.task(phase, envelope.priority, envelope.task_id)
        msg_id = msg_id or f"{envelope.task_id}:{delivery.origin}"
        ack = await self._bus.jetstream.publish(subject, envelope, msg_id=msg_id)
        if ack.duplicate:
            await resolve(self._bus, ack, subject, envelope, msg_id=msg_id, after=delivery.seq_in(ack.stream))

    async def _schedule_hop(self, delivery: Delivery, later: Later) -> None:
        envelope = self._with_hop(delivery, later.envelope)
        await schedule(
            self._bus,
            self._bus.subjects.later(self._service.phase, envelope.task_id, delivery.origin),
            target=self._bus.subjects.task(later.phase or self._service.phase, envelope.priority, envelope.task_id),
            at=self._bus.clock.now() + later.delay_s,
            message=envelope,
            msg_id=later.msg_id or f"{envelope.task_id}:{delivery.origin}",
        )

    async def _settle_message(self, delivery: Delivery, verb: bytes) -> None:
        try:
            await self._bus.connection.publish(delivery.msg.reply, verb)
        except LoomError as error:
            log.warning("settle_failed", verb=verb.decode()[:4], error=error.message)

    async def _send_in_progress(self) -> None:
        """Acknowledge every 10 s that each delivery is in progress, so that the server does not deliver it again."""
        while True:
            await asyncio.sleep(IN_PROGRESS_S)
            for delivery in list(self._deliveries.values()):
                await self._settle_message(delivery, b"+WPI")


async def schedule(
    bus: Bus, subject: str, *, target: str, at: float, message: Envelope | PlanTimeout, msg_id: str
) -> None:
    """Store `message` under `subject`; the server moves it to `target` at server time `at`.

    A second schedule on the same subject replaces the first.
    """
    headers = {SCHEDULE: f"@at {rfc3339(at)}", TARGET: target}
    await store_once(bus, subject, message, msg_id=msg_id, headers=headers)
