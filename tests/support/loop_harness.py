"""A phase whose handler a test provides, and readers of what it leaves in the streams."""

import asyncio
import base64
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Any, NamedTuple

from loom.bus import topology
from loom.bus.bus import Bus
from loom.bus.hops.delivery import Delivery
from loom.bus.hops.hop_loop import HopLoop, Service
from loom.bus.hops.outcomes import Done, Outcome
from loom.bus.natsio.ack_metadata import ack_metadata
from loom.bus.natsio.server_errors import Refused
from loom.bus.topology import SCALE_LANE, Lane
from loom.schemas.base import decode
from loom.schemas.envelope import Envelope
from support.bus_helpers import MessageRecorder
from support.wait import until

Handle = Callable[[Any, Delivery], Awaitable[Outcome]]


class Phase:
    """A hop loop with a replaceable handler, which returns Done by default."""

    def __init__(self, bus: Bus, handle: Handle | None = None, **service: Any) -> None:
        self.bus = bus
        self.handle = handle or _done
        self.handled: list[tuple[Any, Delivery]] = []
        """Messages and deliveries, as the handler got them."""
        self.running: list[str] = []
        self.most = 0
        fields = {"phase": "scale", "lanes": [(SCALE_LANE, 4)], "shape": Envelope, **service}
        self.loop: HopLoop[Any] = HopLoop(bus, Service(handle=self._handle, **fields))

    async def _handle(self, message: Any, delivery: Delivery) -> Outcome:
        name = delivery.subject.rsplit(".", 1)[1]
        self.handled.append((message, delivery))
        self.running.append(name)
        self.most = max(self.most, len(self.running))
        try:
            return await self.handle(message, delivery)
        finally:
            self.running.remove(name)

    @property
    def tasks(self) -> list[str]:
        """The ids of what was handled, in order."""
        return [delivery.subject.rsplit(".", 1)[1] for _, delivery in self.handled]

    async def count(self, wanted: int, within_s: float = 20) -> None:
        await until(lambda: len(self.handled) >= wanted, within_s=within_s, what=f"{wanted} messages handled")


async def _done(_message: Any, _delivery: Delivery) -> Outcome:
    return Done()


class Phases:
    """Starts phases, and stops all of them in `stop`."""

    def __init__(self) -> None:
        self._stack = AsyncExitStack()

    async def start(self, bus: Bus, handle: Handle | None = None, **service: Any) -> Phase:
        phase = Phase(bus, handle, **service)
        self._stack.push_async_callback(phase.loop.drain, 0)
        await phase.loop.start()
        return phase

    async def stop(self) -> None:
        await self._stack.aclose()


async def put(bus: Bus, envelope: Envelope, phase: str = "scale") -> int:
    """Store a hop and return its sequence."""
    subject = bus.subjects.task(phase, envelope.priority, envelope.task_id)
    return (await bus.jetstream.publish(subject, envelope, msg_id=f"{envelope.task_id}:{envelope.step}")).seq


class Kept(NamedTuple):
    """A message as its stream holds it."""

    subject: str
    data: bytes
    headers: dict[str, str]
    seq: int

    @property
    def envelope(self) -> Envelope:
        return decode(self.data, Envelope)


async def last(bus: Bus, stream: str, subject: str) -> Kept | None:
    """Return the last message of a subject, which may hold wildcards."""
    try:
        answer = await bus.jetstream.api(f"STREAM.MSG.GET.{bus.subjects.stream(stream)}", {"last_by_subj": subject})
    except Refused:
        return None
    message = answer["message"]
    lines = base64.b64decode(message.get("hdrs", "")).decode().split("\r\n")[1:]
    headers = dict(line.split(": ", 1) for line in lines if line)
    return Kept(message["subject"], base64.b64decode(message.get("data", "")), headers, message["seq"])


async def arrived(bus: Bus, stream: str, subject: str, within_s: float = 20) -> Kept:
    """Wait for a message of a subject and return it."""
    return await until(lambda: last(bus, stream, subject), within_s=within_s, what=f"a message on {subject}")  # type: ignore[return-value]


async def hop(bus: Bus, phase: str, task_id: str = "t1") -> Kept:
    """Wait for the hop to `phase` and return it."""
    return await arrived(bus, "TASKS", bus.subjects.task(phase, "*", task_id))


async def messages(bus: Bus, stream: str = "TASKS") -> int:
    """Return the number of messages of a stream."""
    return int((await topology.stream_state(bus, stream))["messages"])


async def settled(bus: Bus, left: int = 0, stream: str = "TASKS") -> None:
    """Wait until a stream holds `left` messages."""

    async def so() -> bool:
        return await messages(bus, stream) == left

    await until(so, what=f"{left} messages left in {stream}")


async def lane(bus: Bus, lane: Lane = SCALE_LANE) -> dict[str, Any]:
    """Return the consumer info of a lane."""
    return await bus.jetstream.api(f"CONSUMER.INFO.{bus.subjects.stream(lane.stream)}.{lane.name}")


async def deliver_in_vain(bus: Bus, times: int, lane: Lane = SCALE_LANE) -> None:
    """Have the next message of the lane delivered `times` times, and reject each delivery."""
    inbox, received = bus.requests.new_inbox(), MessageRecorder()
    subscription = await bus.connection.subscribe(inbox, received)
    subject = f"$JS.API.CONSUMER.MSG.NEXT.{bus.subjects.stream(lane.stream)}.{lane.name}"
    for n in range(times):
        await bus.connection.publish(subject, {"batch": 1, "expires": 5 * 10**9}, reply=inbox)
        msg = (await received.count(n + 1))[n]
        assert ack_metadata(msg.reply).delivered == n + 1
        await bus.connection.publish(msg.reply, b"-NAK")
    bus.connection.unsubscribe(subscription)


def record_answers(bus: Bus, lose: Callable[[bytes], bool] = lambda _: False) -> list[bytes]:
    """Record the acknowledgements of this connection; those for which `lose` returns True are not sent."""
    answers: list[bytes] = []
    publish = bus.connection.publish

    async def recorded(subject: str, message: Any = b"", **options: Any) -> None:
        if subject.startswith("$JS.ACK"):
            answers.append(message)
            if lose(message):
                return
        await publish(subject, message, **options)

    bus.connection.publish = recorded  # type: ignore[method-assign]
    return answers


async def turns(count: int = 20) -> None:
    """Let every ready task of the event loop run."""
    for _ in range(count):
        await asyncio.sleep(0)
