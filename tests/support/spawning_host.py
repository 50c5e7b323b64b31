"""A host with a node autoscaler on a stage, and an agent that works until it is released."""

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
from support.builders import call_for_bids
from support.phase_harness import Stage
from support.runs import event_subject
from support.wait import until

WITHIN_S = 20


class HeldAgent:
    """An agent that works until `released` is set."""

    def __init__(self) -> None:
        self.node_ids: list[str] = []
        self.released = asyncio.Event()

    async def __call__(self, job: RunRequest) -> str:
        self.node_ids.append(job.node_id)
        await self.released.wait()
        return f"done by {job.node_id}"


class SpawningHost:
    """A host with a node autoscaler, and the requests that a test sends to it."""

    def __init__(self, stage: Stage, host: NodeHost, autoscaler: NodeAutoscaler) -> None:
        self.stage, self.host, self.autoscaler = stage, host, autoscaler

    async def spawn(self, domain_token: str = "code", tools: tuple[str, ...] = (), text: str = "") -> SpawnReply:
        request = SpawnRequest(domain_token=domain_token, required_tools=tools, description=text, reason="saturated")
        answer = await self.stage.bus.requests.request(self.stage.bus.subjects.spawn, request, timeout_s=WITHIN_S)
        return decode(answer.data, SpawnReply)

    async def retire(self, node_id: str, **facts: Any) -> RetireReply:
        request = RetireRequest(node_id=node_id, reason="a test", **facts)
        subject = self.stage.bus.subjects.of("retire", "local", self.host.host_id)
        return decode((await self.stage.bus.requests.request(subject, request, timeout_s=WITHIN_S)).data, RetireReply)

    async def run(self, node_id: str) -> list[RunEvent]:
        """Start a run on a node, and return the list to which its events are appended."""
        events: list[RunEvent] = []
        reply = await event_subject(self.stage.bus, self.host.host_id, lambda msg: events.extend(read_events(msg.data)))
        request = RunRequest(task_id=new_id(), attempt=1, node_id=node_id, description="do it", remaining_s=60)
        await self.stage.bus.connection.publish(
            self.stage.bus.subjects.of("run", "local", self.host.host_id), request, reply=reply
        )
        await until(lambda: events, within_s=WITHIN_S, what="the host answers")
        return events

    async def occupy(self, node_id: str, agent: HeldAgent) -> list[RunEvent]:
        before = agent.node_ids.count(node_id)
        events = await self.run(node_id)
        await until(lambda: agent.node_ids.count(node_id) > before, within_s=WITHIN_S, what=f"{node_id} works")
        return events

    def bids(self, **facts: Any) -> Offer:
        return self.host.offer(call_for_bids(**facts))

    def names(self) -> list[str]:
        return [node.id for node in self.autoscaler.nodes()]

    async def announces(self, *names: str) -> HostAnnouncement:
        """Wait until the host has announced just these nodes."""

        def announced() -> HostAnnouncement | None:
            announcements = self.stage.all("host", host_id=self.host.host_id)
            return announcements[-1] if announcements and announcements[-1].node_ids == tuple(sorted(names)) else None

        last = await until(announced, within_s=WITHIN_S, what=f"{names} are announced; messages: {self.stage.tape()}")
        assert last is not None
        return last


async def start_spawning_host(
    stage: Stage, nodes: Sequence[AgentNode], max_nodes: int, skills: Skills | None = None, **rooms: int
) -> SpawningHost:
    bus = await stage.connect("node")
    autoscaler = NodeAutoscaler(bus, lambda: nodes, max_nodes=max_nodes, skills=skills)
    host = NodeHost(bus, autoscaler.nodes, spawner=autoscaler, timings=stage.timings.host, **rooms)
    await host.start()
    stage._stack.push_async_callback(host.drain, 0)
    return SpawningHost(stage, host, autoscaler)
