"""A divided task on two node processes, as observed by a client of the bus."""

from pathlib import Path

import pytest
from support.kill_schedule import ProcessCluster
from support.wait import until

from loom.bus import task_client, topology
from loom.bus.bus import Bus
from loom.bus.topology import stream_state
from loom.runner.server.nats_server import NatsServer
from loom.schemas.envelope import PHASES
from loom.schemas.errors import LoomError
from loom.schemas.plan import SplitPlan
from loom.schemas.task import TaskAd

AGENTS = """
import os

from loom.schemas.run import RunRequest
from loom.types import AgentNode, CapabilityProfile

FIELDS = {"ada": "code", "ben": "data"}
name = os.environ["TEST_NODE_ID"]


async def work(job: RunRequest) -> str:
    return f"{job.description} by {name}({', '.join(f'{key}={text}' for key, text in job.inputs.items())})"


nodes = [AgentNode(id=name, capabilities=CapabilityProfile(scores={FIELDS[name]: 0.9}), agent=work)]
"""
DIAMOND = [
    {"id": "top", "description": "top"},
    {"id": "right", "description": "right", "dependencies": ["top"], "domain": "data"},
    {"id": "left", "description": "left", "dependencies": ["top"], "domain": "code"},
    {"id": "end", "description": "end", "dependencies": ["left", "right"], "domain": "data"},
]


@pytest.mark.slow
async def test_a_diamond_runs_on_two_node_processes_and_is_put_together(tmp_path: Path) -> None:
    agents = tmp_path / "agents.py"
    agents.write_text(AGENTS)
    server = NatsServer()
    server.start()
    try:
        async with Bus(server.url) as bus, ProcessCluster(server, tmp_path, {"all": PHASES}, ("ada", "ben"), agents):
            await until(lambda: _both_are_there(bus), within_s=30, what="both nodes")
            ad = TaskAd(domain="code", description="all", context={"plan": DIAMOND})
            handle = await task_client.publish(bus, ad)
            answer = await handle.content(30)
            plan = await until(lambda: _done(bus, ad.task_id), within_s=30, what="the plan is over")
            assert isinstance(plan, SplitPlan)

            top = "top by ada()"
            left, right = f"left by ada(top={top})", f"right by ben(top={top})"
            end = f"end by ben(left={left}, right={right})"
            assert answer == f"all by ada(top={top}, right={right}, left={left}, end={end})"
            assert [part.node_id for part in plan.subtasks] == ["ada", "ben", "ada", "ben"]
            await until(lambda: _nothing_left(bus), within_s=30, what="every hop is settled")
    finally:
        server.stop()


async def _both_are_there(bus: Bus) -> bool:
    """Return whether each node answers in its own field."""
    try:
        await topology.stream_state(bus, "DEAD")
        for domain, name in (("code", "ada"), ("data", "ben")):
            result = await (await task_client.publish(bus, TaskAd(description="hello", domain=domain))).result(20)
            if result.node_id != name:
                return False
    except (LoomError, TimeoutError):
        return False
    return True


async def _nothing_left(bus: Bus) -> bool:
    return bool((await stream_state(bus, "TASKS"))["messages"] == 0)


async def _done(bus: Bus, task_id: str) -> SplitPlan | None:
    entry = await bus.bucket("plans", SplitPlan).get(task_id)
    return entry.value if entry is not None and entry.value.state == "done" else None
