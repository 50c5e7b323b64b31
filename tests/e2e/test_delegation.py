"""Agents that delegate part of their work to other agents."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
from support.nodes import node
from support.openai_server import OpenAIServer, Reply
from support.services import QUICK_START, running_phases
from support.wait import until

from loom import Agent, OpenAIProvider, delegate, tool
from loom.agents.host.node_host import NodeHost
from loom.agents.host.timings import HostTimings
from loom.bus import task_client
from loom.bus.bus import Bus
from loom.bus.records import records
from loom.bus.topology import stream_state
from loom.phases.execute.timings import ExecuteTimings
from loom.runner.services import running_nodes
from loom.schemas.config import ClusterConfig
from loom.schemas.errors import AgentFailed, SubtaskFailed
from loom.schemas.events import AgentEvent, Done, TokenUsage
from loom.schemas.record import TaskRecord
from loom.schemas.run import RunRequest
from loom.schemas.task import Limits, TaskAd, TaskResult

WITHIN_S = 30


class DelegatingCluster:
    """All phases, and hosts with one node of one slot each."""

    def __init__(self, on_bus: tuple[str, str], stack: AsyncExitStack) -> None:
        self.url, self.namespace = on_bus
        self.stack = stack
        self.hosts: list[NodeHost] = []
        self.timings = QUICK_START

    async def open(self, agents: dict[str, Any], config: ClusterConfig | None = None) -> "DelegatingCluster":
        enter = self.stack.enter_async_context
        await enter(running_phases(self.url, namespace=self.namespace, config=config, timings=self.timings))
        for name, agent in agents.items():
            await self.host(name, agent)
        self.bus = await enter(Bus(self.url, namespace=self.namespace))
        return self

    async def host(self, name: str, agent: Any) -> NodeHost:
        nodes = partial(list, [node(name, agent, code=0.9)])
        host = await self.stack.enter_async_context(
            running_nodes(self.url, nodes, namespace=self.namespace, slots=1, drain_timeout_s=0, timings=self.timings)
        )
        self.hosts.append(host)
        return host

    async def submit(self, description: str, **facts: Any) -> task_client.TaskHandle:
        ad = TaskAd(description=description, domain="code", estimated_complexity=0.1, timeout_s=60, **facts)
        return await task_client.publish(self.bus, ad, deltas=False)

    async def result(self, description: str, **facts: Any) -> TaskResult:
        return await (await self.submit(description, **facts)).result(WITHIN_S)

    async def record(self, task_id: str) -> TaskRecord:
        entry = await records(self.bus).get(task_id)
        assert entry is not None
        return entry.value

    async def children(self, task_id: str) -> list[TaskRecord]:
        return [await self.record(child) for child in (await self.record(task_id)).delegated]

    async def empty(self) -> bool:
        return not (await stream_state(self.bus, "TASKS"))["messages"]


@pytest.fixture
async def cluster(on_bus: tuple[str, str]) -> Any:
    async with AsyncExitStack() as stack:
        yield DelegatingCluster(on_bus, stack)


async def pass_on(job: RunRequest) -> str:
    """Delegate two concurrent parts with a depth lower by one, until the depth is 0."""
    left = int(job.description.rsplit(" ", 1)[1])
    if not left:
        return "leaf"
    parts = await asyncio.gather(*(delegate(f"{job.task_id} {n} level {left - 1}", domain="code") for n in range(2)))
    return f"({' '.join(parts)})"


@pytest.mark.slow
async def test_all_delegate_to_each_other_at_full_concurrency_and_all_end(cluster: DelegatingCluster) -> None:
    await cluster.open({"a": pass_on, "b": pass_on})
    results = await asyncio.gather(*(cluster.result(f"parent {n} level 2") for n in range(8)))
    assert [result.content for result in results] == ["((leaf leaf) (leaf leaf))"] * 8
    await until(cluster.empty, what="nothing is left in TASKS")


async def deeper(job: RunRequest) -> str:
    return f"{job.depth}: {await delegate('go deeper', domain='code')}"


@pytest.mark.parametrize("limits", [None, Limits(max_depth=1)])
async def test_a_chain_deeper_than_the_limit_ends_with_an_error_that_names_the_limit(
    cluster: DelegatingCluster, limits: Limits | None
) -> None:
    await cluster.open({"a": deeper, "b": deeper})
    most = limits.max_depth if limits else 2
    handle = await cluster.submit("go", limits=limits)
    result = await handle.result(WITHIN_S)
    assert result.error is not None
    assert (result.state, result.error.code, result.attempts) == ("failed", "subtask_failed", 1)
    assert f"delegating once more would be {(most or 0) + 1} deep, and max_depth is {most}" in result.error.message
    (child,) = await cluster.children(handle.task_id)
    assert (child.envelope.depth, child.state) == (1, "failed")


@tool
def two() -> int:
    """Return two."""
    return 2


class Boss:
    """A model that fails delegated work."""

    def __init__(self, model: Agent) -> None:
        self.model = model

    def stream(self, job: RunRequest) -> AsyncIterator[AgentEvent]:
        if job.depth:
            raise AgentFailed("it is not my part to do parts")
        return self.model.stream(job)


async def expert(job: RunRequest) -> str:
    if "fly" in job.description:
        raise SubtaskFailed("no agent can fly")
    return "an expert's four"


@pytest.mark.slow
async def test_a_model_delegates_by_a_tool_and_a_failure_is_a_tool_error(
    cluster: DelegatingCluster, model: OpenAIServer, provider: OpenAIProvider
) -> None:
    calls = (("delegate", '{"task": "two and two", "domain": "math"}'), ("delegate", '{"task": "fly"}'))
    model.script(Reply(tool_calls=calls, usage=(100, 20)), Reply(text="four, and we cannot fly", usage=(200, 30)))
    await cluster.open({"boss": Boss(Agent(provider, tools=[two, delegate]))})
    await cluster.host("expert", expert)
    handle = await cluster.submit("do both", node_id="boss", token_budget=5000)
    result = await handle.result(WITHIN_S)
    assert (result.content, result.prompt_tokens, result.completion_tokens) == ("four, and we cannot fly", 300, 50)
    tool_results = [message["content"] for message in model.requests[-1].body["messages"] if message["role"] == "tool"]
    assert tool_results[0] == "an expert's four"
    # The expert reports `subtask_failed` without a delegation of its own: that is the agent's failure.
    assert tool_results[1].startswith("Error: SubtaskFailed: delegated work failed: agent_failed: ")
    children = await cluster.children(handle.task_id)
    assert {(each.envelope.ad.description, each.envelope.ad.domain, each.state) for each in children} == {
        ("two and two", "math", "succeeded"),
        ("fly", "", "failed"),
    }
    grants = [each.envelope.split.grant for each in children if each.envelope.split]
    assert sorted(grants) == [1220, 2440]  # of 4880, and of what that left


class Spender:
    """Delegates one part with half of the budget, and uses tokens itself."""

    async def stream(self, job: RunRequest) -> AsyncIterator[AgentEvent]:
        content = "part"
        if not job.depth:
            content = f"with a {await delegate('part', domain='code')}"
        yield Done(content=content, usage=TokenUsage(prompt_tokens=40, completion_tokens=10))


@pytest.mark.parametrize(("budget", "code"), [(100, None), (99, "budget_exceeded"), (None, None)])
async def test_tokens_of_delegated_work_count_against_the_task(
    cluster: DelegatingCluster, budget: int | None, code: str | None
) -> None:
    await cluster.open({"a": Spender(), "b": Spender()})
    handle = await cluster.submit("all", token_budget=budget)
    result = await handle.result(WITHIN_S)
    assert (result.content, result.prompt_tokens, result.completion_tokens) == ("with a part", 80, 20)
    assert (result.error and result.error.code) == code
    record = await cluster.record(handle.task_id)
    assert record.envelope.budget == (0 if budget else None)


class Sleepers:
    """Agents of which the first delegates a part; the agent of that part sleeps until `wake`."""

    def __init__(self) -> None:
        self.wake = asyncio.Event()
        self.began: Counter[str] = Counter()

    async def __call__(self, job: RunRequest) -> str:
        self.began[f"{job.depth} {job.attempt}"] += 1
        if not job.depth:
            return f"attempt {job.attempt}: {await delegate('sleep', domain='code')}"
        await self.wake.wait()
        return "slept"


async def test_cancelling_a_waiting_parent_cancels_its_delegated_tasks(cluster: DelegatingCluster) -> None:
    agent = Sleepers()
    await cluster.open({"a": agent, "b": agent})
    handle = await cluster.submit("all")
    await until(lambda: agent.began["1 1"], within_s=WITHIN_S, what="the part")
    assert (await handle.cancel()).state == "cancelled"
    (child_id,) = (await cluster.record(handle.task_id)).delegated

    async def over() -> bool:
        return (await cluster.record(child_id)).state == "cancelled" and await cluster.empty()

    await until(over, within_s=WITHIN_S, what="the part is cancelled too")

    def idle() -> bool:
        return not any(queue.busy for host in cluster.hosts for queue in host._queues.by_node.values())

    await until(idle, within_s=WITHIN_S, what="all slots are free")
    assert (await cluster.record(handle.task_id)).delegated == (child_id,)


@pytest.mark.slow
async def test_a_host_lost_while_its_run_waits_is_replaced_and_its_part_cancelled(
    cluster: DelegatingCluster,
) -> None:
    cluster.timings = replace(QUICK_START, host=HostTimings(heartbeat_s=0.25), execute=ExecuteTimings(silence_s=2.0))
    agent = Sleepers()
    await cluster.open({"a": agent})
    handle = await cluster.submit("all")
    await until(lambda: agent.began["0 1"], within_s=WITHIN_S, what="the run")
    await until(lambda: agent.began["1 1"], within_s=WITHIN_S, what="the part, in the slot of who waits for it")
    await cluster.host("b", agent)
    first = cluster.hosts[0]
    first.bus.tasks.lost.set()
    first.bus.abort()
    await until(lambda: agent.began["0 2"], within_s=WITHIN_S, what="the second attempt")
    agent.wake.set()
    result = await handle.result(WITHIN_S)
    assert (result.content, result.node_id) == ("attempt 2: slept", "b")
    await until(cluster.empty, within_s=WITHIN_S, what="nothing is left")
    states = [child.state for child in await cluster.children(handle.task_id)]
    assert states == ["cancelled", "succeeded"]
