"""One phase or node host on a real bus, with a test in the place of all other services."""

import asyncio
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self, TypeVar

from loom.agents.host.node_host import NodeHost
from loom.agents.host.slots import Node
from loom.bus import topology
from loom.bus.bus import Bus
from loom.bus.natsio.pull_consumer import PullConsumer
from loom.bus.natsio.transport.message import Msg
from loom.bus.records import records
from loom.bus.subjects import Parsed
from loom.bus.topology import Lane
from loom.runner.services import PhaseService, build
from loom.runner.timings import ServiceTimings
from loom.schemas.auction import CallForBids, HostAnnouncement
from loom.schemas.base import decode, encode, new_id
from loom.schemas.config import ClusterConfig
from loom.schemas.envelope import Claim, Envelope, Phase
from loom.schemas.events import SubtaskEvent
from loom.schemas.identity import LOCAL, Identity
from loom.schemas.learning.lifecycle import Lifecycle
from loom.schemas.learning.reward import Reward
from loom.schemas.llm import LLMProvider
from loom.schemas.notices import ParentEnded, SubtaskEnded, read_scale_message
from loom.schemas.record import TaskRecord
from loom.schemas.run import Delta, RunRequest
from loom.schemas.task import ErrorReply, Submission, TaskError, TaskResult
from support.wait import until

T = TypeVar("T")

BODIES: dict[str, Any] = {
    "intake": Submission,
    "task": Envelope,
    "later": Envelope,
    "auction": CallForBids,
    "run": RunRequest,
    "host": HostAnnouncement,
    "delta": Delta,
    "result": TaskResult,
    "reward": Reward,
    "lifecycle": Lifecycle,
    "subtask": SubtaskEvent,
}


@dataclass(frozen=True)
class RecordedMessage:
    """One message of the namespace, parsed and decoded."""

    parsed: Parsed
    body: Any
    headers: dict[str, str]


class Stage:
    """A namespace with a client's connection as `bus`, in which `recorded` records every message.

    The tap is a subscriber on the whole namespace, so nothing here ever sees a "no responders" answer.

    Args:
        url: Address of the server.
        namespace: First token of all subjects.
        timings: Times of the services that `phase` and `host` start from then on.
    """

    def __init__(self, url: str, namespace: str, timings: ServiceTimings = ServiceTimings()) -> None:
        self.url, self.namespace = url, namespace
        self.timings = timings
        self.bus = Bus(url, namespace=namespace)
        self.recorded: list[RecordedMessage] = []
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        await self._stack.enter_async_context(self.bus)
        self._stack.push_async_callback(self._clear)
        await self._lay_out()
        await self.bus.connection.subscribe(self.bus.subjects.everything, self._record)
        await self.bus.requests.flush()  # the server may read the connections of others first
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stack.aclose()

    async def _lay_out(self) -> None:
        """Create the topology concurrently and in memory, five times faster than `topology.apply`."""
        streams = topology.streams(self.bus, ClusterConfig())
        await asyncio.gather(
            *(self.bus.jetstream.api(f"STREAM.CREATE.{one['name']}", {**one, "storage": "memory"}) for one in streams)
        )
        await asyncio.gather(*(topology.ensure_consumer(self.bus, lane) for lane in topology.LANES))
        await self.bus.sync_clock()

    async def _clear(self) -> None:
        """Delete the streams, because all tests share the server."""
        streams = topology.streams(self.bus, ClusterConfig())
        await asyncio.gather(*(self.bus.jetstream.api(f"STREAM.DELETE.{one['name']}") for one in streams))

    async def _record(self, msg: Msg) -> None:
        parsed = self.bus.subjects.parse(msg.subject)
        if parsed is not None:
            shape = BODIES.get(parsed.family)
            body: Any = msg.data
            if shape is Envelope and body[:1] == b"{":
                body = read_scale_message(body)
            elif shape and body[:1] == b"{":
                body = decode(body, shape)
            self.recorded.append(RecordedMessage(parsed, body, dict(msg.headers or {})))

    # -- services

    async def connect(self, role: str, identity: Identity = LOCAL) -> Bus:
        """Return one more connection, closed when the stage is."""
        bus = Bus(self.url, namespace=self.namespace, role=role, identity=identity)
        return await self._stack.enter_async_context(bus)

    async def phase(
        self, name: Phase, config: ClusterConfig | None = None, llm: LLMProvider | None = None
    ) -> "Replica":
        """Start a replica of one phase on a connection of its own."""
        bus = await self.connect(name)
        service = build(name, bus, config or ClusterConfig(), llm, hosts_here=True, timings=self.timings)
        await service.start()
        replica = Replica(bus, service)
        self._stack.push_async_callback(replica.close)
        return replica

    async def host(
        self, nodes: Callable[[], Sequence[Node]] | Sequence[Node], bus: Bus | None = None, **rooms: int
    ) -> NodeHost:
        """Start a node host on a connection of its own, or on `bus`."""
        bus = bus or await self.connect("node")
        host = NodeHost(bus, nodes if callable(nodes) else lambda: nodes, timings=self.timings.host, **rooms)
        await host.start()
        self._stack.push_async_callback(host.drain, 0)
        return host

    # -- publishing

    async def put(self, phase: Phase, envelope: Envelope) -> None:
        """Store an envelope on a phase's subject."""
        subject = self.bus.subjects.task(phase, envelope.priority, envelope.task_id)
        await self.bus.jetstream.publish(subject, envelope, msg_id=new_id())

    async def notify(self, notice: SubtaskEnded | ParentEnded) -> None:
        """Store a notice for SCALE."""
        await self.bus.jetstream.publish(
            self.bus.subjects.task("scale", "normal", notice.task_id), notice, msg_id=new_id()
        )

    async def record(self, envelope: Envelope, **facts: Any) -> TaskRecord:
        """Store the record of an admitted task."""
        now = self.bus.clock.now()
        wanted: dict[str, Any] = {"state": "running", "admitted_at": now, **facts}
        record = TaskRecord(task_id=envelope.task_id, envelope=envelope, **wanted)
        await records(self.bus).create(envelope.task_id, record)
        return record

    async def claimed(self, envelope: Envelope, attempt: int) -> None:
        """Store the record of a task whose attempt runs somewhere."""
        await self.record(envelope, claim=Claim(attempt=attempt, node_id="n1", host_id="h1", instance="x"))

    async def read(self, task_id: str) -> TaskRecord:
        """Return a task's record."""
        entry = await records(self.bus).get(task_id)
        assert entry is not None, f"no record of {task_id}"
        return entry.value

    async def pending(self, stream: str, subjects: str = "") -> int:
        """Return how many messages a stream holds, in all or of some subjects."""
        state = await topology.stream_state(self.bus, stream, subjects=subjects)
        return sum(state.get("subjects", {}).values()) if subjects else int(state["messages"])

    # -- recorded messages

    def all(self, family: str, **tokens: str) -> list[Any]:
        """Return the recorded bodies of a family, oldest first; `phase`, `task_id` and other tokens filter them."""
        return [one.body for one in self._of(family, tokens)]

    def _of(self, family: str, tokens: dict[str, str]) -> list[RecordedMessage]:
        return [
            one
            for one in self.recorded
            if one.parsed.family == family and all(one.parsed.tokens.get(name) == text for name, text in tokens.items())
        ]

    async def seen(self, family: str, *, count: int = 1, within_s: float = 20, **tokens: str) -> Any:
        """Wait for the `count`-th message of a family and return its body."""
        await until(
            lambda: len(self._of(family, tokens)) >= count,
            within_s=within_s,
            what=f"{count} of {family} {tokens}; messages: {self.tape()}",
        )
        return self.all(family, **tokens)[count - 1]

    async def settled(self, stream: str = "TASKS", *, phase: str = "", left: int = 0) -> None:
        """Wait until a stream, or one phase's part of it, holds so few messages: the rest has been dealt with."""
        subjects = self.bus.subjects.of("task", phase, "*", "*") if phase else ""

        async def empty() -> bool:
            return await self.pending(stream, subjects) == left

        await until(empty, what=f"{stream} {phase} holds {left}; messages: {self.tape()}")

    async def hurry(self, lane: Lane, ack_wait_s: float) -> None:
        """Set the acknowledgement wait of a lane."""
        config = {**topology.consumer(self.bus, lane), "ack_wait": int(ack_wait_s * 1e9)}
        stream = self.bus.subjects.stream(lane.stream)
        call = f"CONSUMER.CREATE.{stream}.{lane.name}.{config['filter_subject']}"
        await self.bus.jetstream.api(call, {"stream_name": stream, "config": config})

    async def reject(self, lane: Lane, times: int) -> None:
        """Fetch the next message of the lane and reject it, `times` times."""
        taken: list[Msg] = []
        pull = PullConsumer(
            self.bus.jetstream,
            self.bus.subjects.stream(lane.stream),
            lane.name,
            window=lambda: int(len(taken) < times),
            sink=taken.append,
        )
        await pull.start()
        for count in range(1, times + 1):
            await until(lambda count=count: len(taken) >= count, what=f"delivery {count}")  # type: ignore[misc]
            await self.bus.connection.publish(taken[-1].reply, b"-NAK")
            pull.top_up()
        await pull.stop()

    async def gate_measured(self) -> None:
        """Wait until a full SENSE has read the size of its stream twice more."""
        asked: list[Msg] = []

        async def count(msg: Msg) -> None:
            if msg.reply.startswith("_LOOM.sense."):
                asked.append(msg)

        info = await self.bus.connection.subscribe(f"$JS.API.STREAM.INFO.{self.bus.subjects.stream('TASKS')}", count)
        await until(lambda: len(asked) >= 3, what="the gate has measured")
        self.bus.connection.unsubscribe(info)

    def tape(self) -> list[str]:
        """Return the recorded subjects, oldest first, for the message of a failure."""
        return [".".join((one.parsed.family, *one.parsed.tokens.values())) for one in self.recorded]


class Replica:
    """A started phase and its connection."""

    def __init__(self, bus: Bus, service: PhaseService) -> None:
        self.bus, self.service = bus, service

    async def close(self) -> None:
        """Stop in order."""
        if not self.bus.tasks.lost.is_set():
            await self.service.drain(0)

    def die(self) -> None:
        """Stop as a killed process does: no message is settled or published any more."""
        self.bus.tasks.lost.set()
        self.bus.abort()


class Asker:
    """A client that sends requests and records every reply, not only the first."""

    def __init__(self, bus: Bus) -> None:
        self.bus = bus
        self.answers: list[Msg] = []
        self.inbox = bus.requests.open_inbox(self.answers.append)

    async def ask(self, subject: str, body: Any = b"") -> None:
        """Publish a request."""
        await self.bus.connection.publish(subject, body if isinstance(body, bytes) else encode(body), reply=self.inbox)

    async def answer(self, shape: type[T], *, count: int = 1) -> T:
        """Wait for the `count`-th answer and decode it."""
        await until(lambda: len(self.answers) >= count, what=f"answer {count}")
        return decode(self.answers[count - 1].data, shape)

    async def error(self, *, count: int = 1) -> ErrorReply:
        """Wait for the refusal of a request, whose headers and body must agree."""
        reply = await self.answer(ErrorReply, count=count)
        assert self._code(count) == reply.code
        return reply

    async def failure(self) -> TaskError:
        """Wait for the result of a task that has failed, whose headers must agree with its error, and return that."""
        result = await self.answer(TaskResult)
        assert result.error is not None
        assert (result.success, self._code(1)) == (False, result.error.code)
        return result.error

    def _code(self, count: int) -> str | None:
        return (self.answers[count - 1].headers or {}).get("Nats-Service-Error-Code")


async def quiet(bus: Bus, *others: Bus) -> None:
    """Wait until every published message has arrived: two round trips of each connection."""
    for one in (*others, bus) * 2:
        await one.requests.flush()
        await asyncio.sleep(0)
