"""EXECUTE receives an undivided copy of a divided task: the task still ends once."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import pytest
from msgspec.structs import replace
from support.nodes import node
from support.services import running_phases
from support.wait import until

from loom.bus import task_client
from loom.bus.bus import Bus
from loom.bus.records import records
from loom.bus.topology import stream_state
from loom.runner.services import running_nodes
from loom.schemas.envelope import Envelope
from loom.schemas.errors import AgentFailed
from loom.schemas.plan import SplitPlan, Subtask
from loom.schemas.run import RunRequest
from loom.schemas.task import TaskAd

PLAN = [{"id": "a", "description": "part"}, {"id": "b", "description": "part", "dependencies": ["a"]}]


class DividedTask:
    """A divided task on two nodes whose subtasks run until `released` is set."""

    def __init__(self, bus: Bus) -> None:
        self.bus = bus
        self.released = asyncio.Event()
        self.answers_alone = False
        self.ad = TaskAd(domain="code", description="all", context={"plan": PLAN}, timeout_s=30)

    async def agent(self, job: RunRequest) -> str:
        if job.description == "part":
            await self.released.wait()
            return "out"
        if self.answers_alone:
            return "alone"
        if not job.inputs:
            raise AgentFailed("nothing to put together")
        return ", ".join(job.inputs)

    async def plan(self) -> SplitPlan | None:
        entry = await self.bus.bucket("plans", SplitPlan).get(self.ad.task_id)
        return entry.value if entry is not None else None

    async def put(self, envelope: Envelope) -> None:
        """Store a copy of the task for EXECUTE."""
        subject = self.bus.subjects.task("execute", envelope.priority, envelope.task_id)
        await self.bus.jetstream.publish(subject, envelope, msg_id=f"{envelope.task_id}:copy")


@pytest.fixture
async def divided(nats_url: str, namespace: str) -> AsyncIterator[DividedTask]:
    async with AsyncExitStack() as stack:
        divided = DividedTask(await stack.enter_async_context(Bus(nats_url, namespace=namespace)))
        await stack.enter_async_context(running_phases(nats_url, namespace=namespace))
        nodes = [node(name, divided.agent, code=0.9) for name in ("ann", "bob")]
        await stack.enter_async_context(running_nodes(nats_url, lambda: nodes, namespace=namespace))
        yield divided


@pytest.mark.parametrize("until_running", [True, False], ids=["while subtasks run", "while they join"])
async def test_an_undivided_copy_that_fails_leads_to_one_end_with_all_outputs(
    divided: DividedTask, *, until_running: bool
) -> None:
    handle = await task_client.publish(divided.bus, divided.ad, deltas=False)
    plan = await until(divided.plan, what="the task is divided")
    await divided.put(replace(plan.envelope, inputs={}))

    async def second_attempt_parked() -> bool:
        plan = await divided.plan()
        return plan is not None and plan.envelope.attempt == 2

    if until_running:
        await until(second_attempt_parked, what="the second attempt has taken the place of the parked one")
    divided.released.set()
    result = await handle.result(20)
    assert (result.error, result.content, result.state) == (None, "a, b", "succeeded")

    async def plan_done() -> bool:
        plan = await divided.plan()
        return plan is not None and plan.state == "done" and not (await stream_state(divided.bus, "TASKS"))["messages"]

    await until(plan_done, what="the plan is done and the stream is empty")
    parts: list[Subtask] = list((await until(divided.plan, what="the plan")).subtasks)
    assert {part.state for part in parts} == {"succeeded"}
    record = await records(divided.bus).get(divided.ad.task_id)
    assert record is not None
    assert record.value.envelope.attempt == result.attempts
    assert (await stream_state(divided.bus, "DEAD"))["messages"] == 0


async def test_a_copy_that_succeeds_undivided_ends_the_task_and_cancels_its_subtasks(divided: DividedTask) -> None:
    divided.answers_alone = True
    handle = await task_client.publish(divided.bus, divided.ad, deltas=False)
    plan = await until(divided.plan, what="the task is divided")
    await divided.put(plan.envelope)
    assert (await handle.result(20)).content == "alone"

    async def cancelled() -> bool:
        plan = await divided.plan()
        return plan is not None and plan.state == "done" and plan.subtasks[0].state == "cancelled"

    await until(cancelled, what="the subtask that ran is cancelled")
