"""Phases and node hosts that start before the server is ready wait in their process."""

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import pytest
from support.logs import capture_logs
from support.nodes import echo, node
from support.stopping import stop
from support.wait import until

from loom.bus import task_client, topology
from loom.bus.bus import Bus
from loom.runner import retried_start
from loom.runner.server.nats_server import NatsServer
from loom.runner.services import running_nodes, running_phases
from loom.schemas.config import ClusterConfig
from loom.schemas.envelope import PHASES
from loom.schemas.errors import BusUnavailable
from loom.schemas.task import TaskAd


@pytest.fixture(autouse=True)
def tried_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retried_start, "RETRY_S", 0.02)


@asynccontextmanager
async def blocked(bus: Bus) -> AsyncIterator[None]:
    """The body runs while the stream of hops cannot be created."""
    ns = bus.subjects.namespace
    await bus.jetstream.api(f"STREAM.CREATE.{ns}-foreign", {"name": f"{ns}-foreign", "subjects": [f"{ns}.task.>"]})
    yield
    await bus.jetstream.api(f"STREAM.DELETE.{ns}-foreign")


def waits(logs: list[Any]) -> list[Any]:
    return [entry for entry in logs if entry["event"] == "start_waits"]


async def entered(stack: AsyncExitStack, service: Any) -> None:
    await stack.enter_async_context(service)


@pytest.mark.slow
@pytest.mark.parametrize("names", [PHASES, ("execute",), ("sense",), ("adapt",)])
async def test_phases_wait_until_their_streams_can_be_created(plain: Bus, names: Any) -> None:
    async with AsyncExitStack() as stack:
        service = running_phases(plain.connection.url, names=names, namespace=plain.subjects.namespace, patience_s=60)
        with capture_logs() as logs:
            async with blocked(plain):
                start = asyncio.create_task(entered(stack, service))
                await until(lambda: waits(logs), what="the start waits")
                assert "TASKS" in waits(logs)[0]["reason"]
                assert not start.done()
            await asyncio.wait_for(start, 20)
    assert (await topology.init(plain, ClusterConfig())) == []


@pytest.mark.slow
async def test_the_cause_a_start_waits_for_is_logged_at_once_and_then_periodically(
    plain: Bus, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retried_start, "RETRY_S", 0.01)
    monkeypatch.setattr(retried_start, "REPORT_S", 0.2)
    tries = 0

    async def fail() -> None:
        nonlocal tries
        tries += 1
        raise BusUnavailable("not yet")

    with capture_logs() as logs, pytest.raises(BusUnavailable, match="not yet"):
        await retried_start.until_started(fail, patience_s=0.5)
    assert 2 <= len(waits(logs)) <= 4
    assert tries > len(waits(logs))


async def test_a_start_fails_when_its_patience_is_over(plain: Bus) -> None:
    async with blocked(plain):
        with pytest.raises(BusUnavailable, match="TASKS"):
            async with running_phases(plain.connection.url, namespace=plain.subjects.namespace, patience_s=0.1):
                pass


@pytest.mark.slow
async def test_phases_and_hosts_started_at_a_frozen_server_begin_when_it_answers(
    server: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    freeze_after_connecting(server, monkeypatch, connections=2)
    async with AsyncExitStack() as stack:
        with capture_logs() as logs:
            services = [
                running_phases(server.url, patience_s=60),
                running_nodes(server.url, lambda: [node("n1", echo, code=0.9)], patience_s=60, max_nodes=2),
            ]
            starts = [asyncio.create_task(entered(stack, service)) for service in services]
            await until(lambda: len(waits(logs)) >= 2, what="both wait")
            os.kill(server.pid, signal.SIGCONT)
            await asyncio.wait_for(asyncio.gather(*starts), 30)
        client = await stack.enter_async_context(Bus(server.url))
        ad = TaskAd(domain="code", description="after", timeout_s=20)
        assert (await (await task_client.publish(client, ad, deltas=False)).result(25)).success


@pytest.mark.slow
@pytest.mark.parametrize("what", ["phases", "nodes"])
async def test_a_start_that_waits_for_a_frozen_server_is_cancelled_at_once(
    server: NatsServer, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    freeze_after_connecting(server, monkeypatch, connections=1)
    service: Any = running_phases(server.url, patience_s=60)
    if what == "nodes":
        service = running_nodes(server.url, lambda: [node("n1", echo, code=0.9)], patience_s=60)

    async def serve() -> None:
        async with service:
            await asyncio.Event().wait()

    with capture_logs() as logs:
        serving = asyncio.create_task(serve())
        await until(lambda: waits(logs), what="the start waits")
        began = time.monotonic()
        serving.cancel()
        await asyncio.wait([serving])
    assert time.monotonic() - began < 2
    os.kill(server.pid, signal.SIGCONT)


def freeze_after_connecting(server: NatsServer, monkeypatch: pytest.MonkeyPatch, *, connections: int) -> None:
    """Freeze the server once so many connections are made, before anything is asked on them."""
    made, connect, all_made = 0, Bus.connect, asyncio.Event()

    async def connected(self: Bus) -> Bus:
        nonlocal made
        bus = await connect(self)
        made += 1
        if made == connections:
            stop(server.pid)
            all_made.set()
        await all_made.wait()
        return bus

    monkeypatch.setattr(Bus, "connect", connected)
