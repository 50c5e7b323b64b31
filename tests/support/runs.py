"""Run requests to a node host, and the events that come back."""

from collections.abc import Callable
from typing import Any

from loom.agents.host.node_host import NodeHost
from loom.bus.bus import Bus
from loom.bus.host_directory import HostKey
from loom.bus.natsio.transport.message import Msg
from loom.phases.execute.run_inbox import EventSubjects
from loom.phases.execute.run_stream import Hosts, Interrupt, RunStream
from loom.phases.execute.stops import Stops
from loom.phases.execute.timings import ExecuteTimings
from loom.schemas.base import new_id
from loom.schemas.run import RunEvent, RunRequest, Stop, read_events
from support.phase_harness import Stage
from support.wait import until


async def event_subject(bus: Bus, host_id: str, take: Callable[[Msg], None] = lambda _: None) -> str:
    """Return a new subject for the events of a run; `take` is called with each."""
    subject = bus.subjects.of("event", "local", host_id, bus.instance, new_id())
    await bus.connection.subscribe_sync(subject, take)
    return subject


async def stop_run(bus: Bus, host: NodeHost, task_id: str = "t1", attempt: int = 1) -> None:
    """Stop a run, as EXECUTE does."""
    await bus.connection.publish(bus.subjects.of("stop", "local", host.host_id), Stop(task_id=task_id, attempt=attempt))


async def hosts_of(bus: Bus, timings: ExecuteTimings = ExecuteTimings()) -> Hosts:
    """Return what EXECUTE reaches hosts by, on this connection."""
    events = EventSubjects(bus)
    await events.start()
    return Hosts(bus, events, Stops(bus, timings.repeat_stop_s), timings)


async def watch_of(
    bus: Bus,
    request: RunRequest,
    interrupt: Interrupt | None = None,
    timings: ExecuteTimings = ExecuteTimings(),
    **facts: Any,
) -> RunStream:
    """Return a watch of a run on the host h1."""
    hosts = await hosts_of(bus, timings)
    return RunStream(hosts, HostKey("local", "h1"), request, interrupt or Interrupt(), **facts)


class Watcher:
    """A run request and the events that came back."""

    def __init__(self, bus: Bus) -> None:
        self.bus = bus
        self.events: list[RunEvent] = []
        self.bodies: list[bytes] = []
        self.subject = ""

    def _take(self, msg: Msg) -> None:
        self.bodies.append(msg.data)
        self.events.extend(read_events(msg.data))

    async def run(self, host: NodeHost, **facts: Any) -> "Watcher":
        request = RunRequest(**{"task_id": "t1", "node_id": "n1", "description": "it", **facts})
        await self.send(host, request)
        return self

    async def send(self, host: NodeHost, request: RunRequest | bytes) -> None:
        """Publish a request whose reply subject is one of this watcher's own."""
        self.subject = self.subject or await event_subject(self.bus, host.host_id, self._take)
        await self.bus.connection.publish(
            self.bus.subjects.of("run", "local", host.host_id), request, reply=self.subject
        )

    def kinds(self) -> list[str]:
        """Return the kinds of the recorded events, without heartbeats."""
        return [event.kind for event in self.events if event.kind != "heartbeat"]

    def has(self, kind: str) -> bool:
        """Whether an event of that kind came."""
        return any(event.kind == kind for event in self.events)

    async def event(self, kind: str, *, count: int = 1, within_s: float = 20) -> RunEvent:
        def found() -> list[RunEvent]:
            return [event for event in self.events if event.kind == kind]

        await until(lambda: len(found()) >= count, within_s=within_s, what=f"{kind}; recorded: {self.kinds()}")
        return found()[count - 1]

    async def code(self) -> str:
        """The code of the error it ended with."""
        error = (await self.event("error")).error
        assert error is not None
        return error.code


async def run(stage: Stage, host: NodeHost, **facts: Any) -> Watcher:
    """Request a run and return its watcher."""
    return await Watcher(stage.bus).run(host, **facts)
