"""A host with a nursery on a stage, and agents that work until they are let go."""

import asyncio
from collections.abc import Sequence
from typing import Any

from loom.agents.host.autoscaler import NodeAutoscaler, Skills
from loom.agents.host.node_host import NodeHost
from loom.schemas.auction import (
    HostAnnouncement,
    Offer,
    RetireReply,
    RetireRequest,
    SpawnReply,
    SpawnRequest,
)
from loom.schemas.base import decode, new_id
from loom.schemas.run import RunEvent, RunRequest, read_events
from loom.types import AgentNode
from support.phase_harness import Stage, call_for_bids
from support.runs import event_subject
from support.wait import until

WITHIN_S = 20


class Held:
    """An agent that works until it is let go."""

    def __init__(self) -> None:
        self.working: list[str] = []
        self.go = asyncio.Event()

    async def __call__(self, job: RunRequest) -> str:
        self.working.append(job.node_id)
        await self.go.wait()
        return f"done by {job.node_id}"


class Place:
    """A host with a nursery, and what is asked of it."""

    def __init__(self, stage: Stage, host: NodeHost, nursery: NodeAutoscaler) -> None:
        self.stage, self.host, self.nursery = stage, host, nursery

    async def spawn(self, domain_token: str = "code", tools: tuple[str, ...] = (), text: str = "") -> SpawnReply:
        wanted = SpawnRequest(domain_token=domain_token, required_tools=tools, description=text, reason="saturated")
        answer = await self.stage.bus.requests.request(self.stage.bus.subjects.spawn, wanted, timeout_s=WITHIN_S)
        return decode(answer.data, SpawnReply)

    async def retire(self, node_id: str, **facts: Any) -> RetireReply:
        order = RetireRequest(node_id=node_id, reason="a test", **facts)
        subject = self.stage.bus.subjects.of("retire", "local", self.host.host_id)
        return decode((await self.stage.bus.requests.request(subject, order, timeout_s=WITHIN_S)).data, RetireReply)

    async def run(self, node_id: str) -> list[RunEvent]:
        """Have the node work; return its events, which go on coming."""
        events: list[RunEvent] = []
        reply = await event_subject(self.stage.bus, self.host.host_id, lambda msg: events.extend(read_events(msg.data)))
        request = RunRequest(task_id=new_id(), attempt=1, node_id=node_id, description="do it", remaining_s=60)
        await self.stage.bus.connection.publish(
            self.stage.bus.subjects.of("run", "local", self.host.host_id), request, reply=reply
        )
        await until(lambda: events, within_s=WITHIN_S, what="the host answers")
        return events

    async def fill(self, node_id: str, agent: Held) -> list[RunEvent]:
        before = agent.working.count(node_id)
        events = await self.run(node_id)
        await until(lambda: agent.working.count(node_id) > before, within_s=WITHIN_S, what=f"{node_id} works")
        return events

    def bids(self, **facts: Any) -> Offer:
        return self.host.offer(call_for_bids(**facts))

    def names(self) -> list[str]:
        return [one.id for one in self.nursery.nodes()]

    async def says(self, *names: str) -> HostAnnouncement:
        """Wait until the host has announced just these nodes."""

        def said() -> HostAnnouncement | None:
            news = self.stage.all("host", host_id=self.host.host_id)
            return news[-1] if news and news[-1].node_ids == tuple(sorted(names)) else None

        last = await until(said, within_s=WITHIN_S, what=f"{names} are announced; heard: {self.stage.tape()}")
        assert last is not None
        return last


async def place(
    stage: Stage, nodes: Sequence[AgentNode], max_nodes: int, skills: Skills | None = None, **rooms: int
) -> Place:
    bus = await stage.connect("node")
    nursery = NodeAutoscaler(bus, lambda: nodes, max_nodes=max_nodes, skills=skills)
    host = NodeHost(bus, nursery.nodes, spawner=nursery, **rooms)
    await host.start()
    stage._stack.push_async_callback(host.drain, 0)
    return Place(stage, host, nursery)
