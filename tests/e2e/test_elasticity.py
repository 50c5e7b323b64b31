"""A cluster that grows with its load and shrinks after it."""

import asyncio
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.command import LOOM, command, loom
from support.nodes import Counting, node
from support.services import QUICK_START, running_phases
from support.wait import until

from loom.agents.host.slots import Node
from loom.agents.host.timings import HostTimings
from loom.bus import task_client
from loom.bus.bus import Bus
from loom.bus.host_directory import host_in
from loom.bus.natsio.requests import NoResponders
from loom.bus.natsio.transport.message import Msg
from loom.phases.adapt.timings import AdaptTimings
from loom.runner.services import running_nodes
from loom.schemas.auction import HostAnnouncement, SpawnReply, SpawnRequest
from loom.schemas.base import decode
from loom.schemas.config import ClusterConfig
from loom.schemas.learning.lifecycle import Lifecycle
from loom.schemas.task import TaskAd, TaskResult

WITHIN_S = 60
AT_ONCE = 24
RUN_S = 0.1
CONFIG = ClusterConfig(idle_timeout_s=1.0)


class Census:
    """Counts the nodes of each host from its announcements: the current number and the peak."""

    def __init__(self) -> None:
        self.now: dict[str, int] = {}
        self.peak: Counter[str] = Counter()
        self.events: Counter[str] = Counter()
        """Lifecycle events by kind."""

    async def start(self, bus: Bus) -> None:
        await bus.connection.subscribe(bus.subjects.of("host", "*", "*"), self._on_announcement)
        await bus.connection.subscribe(bus.subjects.of("lifecycle", "*", "*", "*", "*"), self._on_lifecycle)

    async def _on_announcement(self, msg: Msg) -> None:
        host_id, nodes = host_in(msg.subject).host_id, decode(msg.data, HostAnnouncement).nodes
        self.now[host_id] = len(nodes)
        self.peak[host_id] = max(self.peak[host_id], len(nodes))

    async def _on_lifecycle(self, msg: Msg) -> None:
        self.events[decode(msg.data, Lifecycle).kind] += 1


class Burst:
    """Keeps a number of tasks in the loop until `over` is set."""

    def __init__(self, bus: Bus) -> None:
        self.results: list[TaskResult] = []
        self.over = asyncio.Event()
        self._bus = bus

    async def last(self) -> None:
        async with asyncio.TaskGroup() as group:
            for _ in range(AT_ONCE):
                group.create_task(self._go_on())

    async def _go_on(self) -> None:
        while not self.over.is_set():
            handle = await task_client.publish(
                self._bus, TaskAd(description="add two numbers", domain="code"), deltas=False
            )
            self.results.append(await handle.result(WITHIN_S))


def nodes(agent: Counting) -> Sequence[Node]:
    return [node("a", agent, code=0.8)]


@pytest.mark.slow
@pytest.mark.timeout(180)
async def test_a_burst_grows_two_hosts_to_their_limits_and_quiet_shrinks_them_again(
    nats_url: str, namespace: str
) -> None:
    """Two SCALE and two ADAPT replicas: nothing in flight is lost, no run happens twice."""
    timings = replace(QUICK_START, host=HostTimings(announce_s=0.2), adapt=AdaptTimings(sweep_s=0.2))
    agent, census = Counting(RUN_S), Census()
    here, there = nodes(agent), nodes(agent)
    async with (
        Bus(nats_url, namespace=namespace) as bus,
        running_phases(nats_url, namespace=namespace, config=CONFIG, timings=timings),
        running_phases(nats_url, namespace=namespace, config=CONFIG, names=("scale", "adapt"), timings=timings),
        running_nodes(
            nats_url, lambda: here, namespace=namespace, slots=1, backlog=4, max_nodes=3, timings=timings
        ) as one,
        running_nodes(
            nats_url, lambda: there, namespace=namespace, slots=1, backlog=4, max_nodes=2, timings=timings
        ) as two,
    ):
        await census.start(bus)
        limits = {one.host_id: 3, two.host_id: 2}
        burst = Burst(bus)
        lasting = asyncio.create_task(burst.last())
        await until(lambda: census.now == limits, within_s=WITHIN_S, what=f"both are full grown: {census.now}")
        before = len(burst.results)
        await until(lambda: len(burst.results) > before + AT_ONCE, within_s=WITHIN_S, what="it goes on at full size")
        burst.over.set()
        await lasting
        alone = {one.host_id: 1, two.host_id: 1}
        await until(lambda: census.now == alone, within_s=WITHIN_S, what=f"both have shrunk: {census.now}")
        after = await (await task_client.publish(bus, TaskAd(description="one more", domain="code"))).result(WITHIN_S)
    assert after.success
    assert census.peak == limits
    assert (census.events["spawned"], census.events["retired"]) == (3, 3)
    assert [result.error for result in burst.results if not result.success] == []
    assert {result.node_id for result in burst.results} == {"a", "a-c1", "a-c2"}
    assert set(agent.runs.values()) == {1}


PAIR = """
from loom.types import AgentNode

async def work(description: str) -> str:
    return description

nodes = [AgentNode(id="a", agent=work), AgentNode(id="b", agent=work)]
"""


@pytest.mark.slow
async def test_the_command_line_limits_the_growth_of_a_host(nats_url: str, namespace: str, tmp_path: Path) -> None:
    file = tmp_path / "pair.py"
    file.write_text(PAIR)
    env = {"NATS_URL": nats_url, "LOOM_NAMESPACE": namespace}
    words = ("host", "run", str(file), "--max-nodes")
    async with command(tmp_path, *LOOM, *words, "3", **env) as host, Bus(nats_url, namespace=namespace) as bus:
        refused = await loom(tmp_path, *words, "1", **env)
        assert refused.code == 2
        assert "has 2 nodes already" in " ".join(refused.err.split())
        await host.wait_for_output("a, b on")

        async def asked() -> SpawnReply | None:
            try:
                answer = await bus.requests.request(bus.subjects.spawn, SpawnRequest(domain_token="code"), timeout_s=5)
            except (TimeoutError, NoResponders):
                return None
            return decode(answer.data, SpawnReply)

        reply: Any = await until(asked, within_s=WITHIN_S, what="the host answers")
        assert reply.decline == "idle"
