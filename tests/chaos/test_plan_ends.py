"""Plans of ended tasks: no subtask is shown as running whose own task has ended."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import pytest
from support.nodes import node
from support.services import running_phases
from support.wait import until

from loom.bus import task_client
from loom.bus.bus import Bus
from loom.bus.records import records
from loom.phases.scale import subtask_graph
from loom.runner.services import running_nodes
from loom.schemas.config import ClusterConfig
from loom.schemas.errors import AgentFailed
from loom.schemas.plan import SplitPlan
from loom.schemas.run import RunRequest
from loom.schemas.task import TaskAd

PLAN = [
    {"id": "slow", "description": "slow", "domain": "code"},
    {"id": "first", "description": "first", "domain": "code"},
    {"id": "after", "description": "slow", "domain": "code", "dependencies": ["slow"]},
]


@pytest.fixture
async def bus(nats_url: str, namespace: str) -> AsyncIterator[Bus]:
    async with AsyncExitStack() as stack:
        bus = await stack.enter_async_context(Bus(nats_url, namespace=namespace))
        config = ClusterConfig(max_attempts=1)
        await stack.enter_async_context(running_phases(nats_url, namespace=namespace, config=config))
        await stack.enter_async_context(
            running_nodes(nats_url, lambda: [node("n1", work, code=0.9)], namespace=namespace, drain_timeout_s=0)
        )
        yield bus


async def work(job: RunRequest) -> str:
    if job.description == "slow":
        await asyncio.Event().wait()
    if job.description == "fails":
        raise AgentFailed("it cannot be done")
    return "done"


async def settled_plan(bus: Bus, task_id: str) -> SplitPlan:
    """Wait until the plan is done and shows each begun subtask in the state of its record."""

    async def settled() -> SplitPlan | None:
        entry = await bus.bucket("plans", SplitPlan).get(task_id)
        if entry is None or entry.value.state != "done" or subtask_graph.running_subtasks(entry.value):
            return None
        for part in entry.value.subtasks:
            record = await records(bus).get(part.child_id or "")
            if record is not None and (not record.value.ended or record.value.state != part.state):
                return None
        return entry.value

    return await until(settled, what="the plan shows how its subtasks ended")


@pytest.mark.slow
@pytest.mark.parametrize("how", ["cancelled", "deadline", "failed"])
async def test_the_plan_of_an_ended_task_shows_how_its_subtasks_ended(bus: Bus, how: str) -> None:
    plan = [{**part, "description": "fails"} if how == "failed" and part["id"] == "first" else part for part in PLAN]
    ad = TaskAd(domain="code", description="all", context={"plan": plan}, timeout_s=1.5 if how == "deadline" else 30)
    handle = await task_client.publish(bus, ad, deltas=False)

    async def slow_runs() -> bool:
        record = await records(bus).get(subtask_graph.child_id(ad.task_id, "slow"))
        return record is not None and record.value.claim.attempt > 0

    await until(slow_runs, what="the slow subtask runs")
    if how == "cancelled":
        await handle.cancel()
    result = await handle.result(20)
    done = await settled_plan(bus, ad.task_id)

    code = {"cancelled": "cancelled", "deadline": "deadline_exceeded", "failed": "subtask_failed"}[how]
    assert result.error is not None
    assert result.error.code == code
    states = {part.id: part.state for part in done.subtasks}
    assert states["slow"] in {"cancelled", "failed"}
    assert states["after"] == "waiting"
    assert states["first"] == ("failed" if how == "failed" else "succeeded")
    assert done.error is None or done.error.code == code
