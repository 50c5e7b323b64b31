"""The server stops and comes back: no node is blamed, and nothing is lost."""

import asyncio
from contextlib import AsyncExitStack

import pytest
from support.nodes import Counting, node
from support.services import running_phases
from support.wait import until

from loom.bus import task_client
from loom.bus.bus import Bus
from loom.runner.server.nats_server import NatsServer
from loom.runner.services import running_nodes
from loom.schemas.record import TaskRecord
from loom.schemas.task import TaskAd

SLOW_RETURN_S = 2.0


@pytest.mark.slow
async def test_a_host_that_reconnects_late_after_an_outage_is_not_lost(server: NatsServer) -> None:
    agent = Counting()
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(running_phases(server.url))
        host = await stack.enter_async_context(running_nodes(server.url, lambda: [node("slow", agent, code=0.9)]))
        client = await stack.enter_async_context(Bus(server.url))
        host.bus.connection._nc.options["reconnect_time_wait"] = SLOW_RETURN_S

        first = await (await task_client.publish(client, TaskAd(domain="code", description="before"))).result(10)
        server.kill()
        await until(lambda: not host.bus.connection._nc.is_connected, what="the host notices")
        await asyncio.to_thread(server.restart)
        await until(lambda: client.connection._nc.is_connected, what="the client is back")
        pinned = TaskAd(domain="code", description="after", node_id="slow")
        handle = await task_client.publish(client, pinned)
        after = await handle.result(30)
        record = await handle.record()

    assert first.success
    assert after.success
    assert agent.runs[pinned.task_id] == 1
    assert isinstance(record, TaskRecord)
    assert (record.envelope.attempt, record.envelope.failures, record.envelope.failed_attempts) == (1, 0, ())
