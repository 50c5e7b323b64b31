"""Run requests to a node host, and the events that come back."""

from typing import Any

from loom.agents.host import NodeHost
from loom.bus.client import Bus, Msg
from loom.schemas.run import RunEvent, RunRequest, read_events
from support.phases import Stage
from support.wait import until


class Watcher:
    """A run request and the events that came back."""

    def __init__(self, bus: Bus) -> None:
        self.bus = bus
        self.events: list[RunEvent] = []
        self.bodies: list[bytes] = []
        self.inbox = bus.open_inbox(self._take)

    def _take(self, msg: Msg) -> None:
        self.bodies.append(msg.data)
        self.events.extend(read_events(msg.data))

    async def run(self, host: NodeHost, **facts: Any) -> "Watcher":
        request = RunRequest(**{"task_id": "t1", "node_id": "n1", "description": "it", **facts})
        await self.bus.publish(self.bus.subjects.of("run", "local", host.host_id), request, reply=self.inbox)
        return self

    def kinds(self) -> list[str]:
        """The kinds heard, heartbeats left out."""
        return [event.kind for event in self.events if event.kind != "heartbeat"]

    def has(self, kind: str) -> bool:
        """Whether an event of that kind came."""
        return any(event.kind == kind for event in self.events)

    async def heard(self, kind: str, *, count: int = 1, within_s: float = 20) -> RunEvent:
        def found() -> list[RunEvent]:
            return [event for event in self.events if event.kind == kind]

        await until(lambda: len(found()) >= count, within_s=within_s, what=f"{kind}; heard {self.kinds()}")
        return found()[count - 1]

    async def code(self) -> str:
        """The code of the error it ended with."""
        error = (await self.heard("error")).error
        assert error is not None
        return error.code


async def run(stage: Stage, host: NodeHost, **facts: Any) -> Watcher:
    """Request a run and return its watcher."""
    return await Watcher(stage.bus).run(host, **facts)
