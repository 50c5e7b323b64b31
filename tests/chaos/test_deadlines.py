"""No phase and no agent works past a deadline, in any state of a task, and the client is answered in time."""

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest
from support.hanging_agents import HangingAgents
from support.nodes import node
from support.services import running_phases
from support.wait import until

from loom.agents.llm.agent import Agent
from loom.agents.llm.config import AgentConfig
from loom.bus import task_client
from loom.bus.bus import Bus
from loom.bus.task_client import TaskHandle
from loom.runner.services import running_nodes
from loom.schemas.errors import DeadlineExceeded
from loom.schemas.llm import CompletionParams, CompletionResult, StreamChunk
from loom.schemas.task import TaskAd

WITHIN_S = 20
TIMEOUT_S = 1.0
LATE_S = 4.0
"""Longest wait for the answer after the deadline."""


@pytest.fixture
async def bus(nats_url: str, namespace: str) -> AsyncIterator[Bus]:
    async with Bus(nats_url, namespace=namespace) as bus:
        yield bus


class Silent:
    """A model that accepts the request and never answers."""

    def __init__(self) -> None:
        self.asked: list[CompletionParams] = []

    async def complete(self, params: CompletionParams) -> CompletionResult:
        self.asked.append(params)
        await asyncio.Event().wait()
        return CompletionResult(content="never")

    async def stream(self, params: CompletionParams) -> AsyncIterator[StreamChunk]:
        yield StreamChunk(text=(await self.complete(params)).content)


async def publish(bus: Bus, node_id: str = "", timeout_s: float = TIMEOUT_S, **facts: Any) -> TaskHandle:
    ad = TaskAd(domain="any", description="x", node_id=node_id or None, timeout_s=timeout_s, **facts)
    return await task_client.publish(bus, ad, deltas=False)


async def ends_in_time(bus: Bus, node_id: str = "", **facts: Any) -> str:
    """Submit a task, check that it ends at its deadline, and return its id."""
    begun = time.monotonic()
    handle = await publish(bus, node_id, **facts)
    with pytest.raises(DeadlineExceeded):
        await handle.content(WITHIN_S)
    assert TIMEOUT_S * 0.9 < time.monotonic() - begun < TIMEOUT_S + LATE_S
    return handle.task_id


@pytest.mark.slow
async def test_a_deadline_is_kept_in_an_auction_in_a_backlog_and_in_every_kind_of_run(bus: Bus) -> None:
    work, model = HangingAgents(), Silent()
    nodes = [
        *(node(kind, getattr(work, kind)) for kind in ("endless", "ignores_cancel", "threaded")),
        node("model", Agent(model, AgentConfig())),
        node("full", work.endless),
    ]
    namespace = bus.subjects.namespace
    async with (
        running_phases(bus.connection.url, namespace=namespace),
        running_nodes(bus.connection.url, lambda: nodes, namespace=namespace, slots=1, backlog=1, drain_timeout_s=0),
    ):
        holding = await publish(bus, "full", timeout_s=60)
        await until(lambda: holding.task_id in work.started, within_s=WITHIN_S, what="the slot is taken")
        begun = time.monotonic()
        queued, bounced, toolless, *run = await asyncio.gather(
            ends_in_time(bus, "full"),
            ends_in_time(bus, "full"),
            ends_in_time(bus, required_tools=("missing-tool",)),
            *(ends_in_time(bus, kind) for kind in ("endless", "ignores_cancel", "threaded", "model")),
        )
        stopped = work.stopped[run[0]]
        await holding.cancel()
        await until(lambda: holding.task_id in work.stopped, within_s=WITHIN_S, what="the slot is free")
        after = await publish(bus, "full", timeout_s=60)
        await until(lambda: after.task_id in work.started, within_s=WITHIN_S, what="the next one runs")
        await after.cancel()
        work.released.set()

    assert stopped - begun < TIMEOUT_S + LATE_S
    assert len(model.asked) == 1
    assert not {queued, bounced, toolless} & set(work.started)


@pytest.mark.slow
async def test_a_deadline_is_kept_while_all_nodes_are_busy_and_without_nodes(bus: Bus) -> None:
    work = HangingAgents()
    namespace = bus.subjects.namespace
    async with running_phases(bus.connection.url, namespace=namespace):
        await ends_in_time(bus)
        async with running_nodes(
            bus.connection.url,
            lambda: [node("n", work.endless)],
            namespace=namespace,
            slots=1,
            backlog=0,
            drain_timeout_s=0,
        ):
            holding = await publish(bus, timeout_s=60)
            await until(lambda: work.started, within_s=WITHIN_S, what="the slot is taken")
            await asyncio.gather(*(ends_in_time(bus) for _ in range(5)))
            await holding.cancel()

    assert work.started == [holding.task_id]


@pytest.mark.slow
async def test_a_task_whose_deadline_passed_before_any_phase_ran_is_not_started(bus: Bus) -> None:
    work = HangingAgents()
    namespace = bus.subjects.namespace
    async with running_phases(bus.connection.url, namespace=namespace):
        pass  # leaves the streams
    late = await publish(bus, timeout_s=0.05)
    deadline = time.monotonic() + 0.1
    await until(lambda: time.monotonic() > deadline, what="it is too late")
    async with (
        running_nodes(bus.connection.url, lambda: [node("n", work.endless)], namespace=namespace, drain_timeout_s=0),
        running_phases(bus.connection.url, namespace=namespace),
    ):
        with pytest.raises(DeadlineExceeded, match="before the task began"):
            await late.content(WITHIN_S)

    assert not work.started
