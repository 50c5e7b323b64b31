"""The server loses what it has stored under running phases: they create it again, and new work is done."""

import asyncio
import shutil
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
from support.nodes import echo, node
from support.wait import until

from loom.bus import tasks, topology
from loom.bus.client import Bus, Refused
from loom.bus.kv import Bucket
from loom.runner.cluster import running_nodes, running_phases
from loom.runner.embedded import NatsServer
from loom.schemas.config import ClusterConfig
from loom.schemas.learning import NodeProfile
from loom.schemas.task import TaskAd, TaskResult

STREAMS = ("INTAKE", "TASKS", "REWARDS", "DEAD", "records", "plans", "nodes", "tuning")


@pytest.fixture
async def client(nats_url: str, namespace: str) -> AsyncIterator[Bus]:
    """A client of a whole cluster on the shared server, with a tap that hides missing responders."""
    async with AsyncExitStack() as stack:
        where = {"namespace": namespace}
        bus = await stack.enter_async_context(Bus(nats_url, namespace=namespace))
        await stack.enter_async_context(running_phases(nats_url, **where))  # type: ignore[arg-type]
        await stack.enter_async_context(
            running_nodes(nats_url, lambda: [node("n1", echo, code=0.9)], namespace=namespace)
        )
        yield bus


async def do(bus: Bus, description: str = "add two numbers") -> TaskResult:
    """Submit a task and return its result."""
    ad = TaskAd(domain="code", description=description, timeout_s=20)
    return await (await tasks.publish(bus, ad, deltas=False)).result(25)


async def learned(bus: Bus, total: int, within_s: float = 20) -> NodeProfile:
    """Wait until the profile of the node holds exactly so many tasks."""

    async def known() -> NodeProfile | None:
        try:
            entry = await Bucket(bus, "nodes", NodeProfile).get("n1")
        except Refused:
            return None
        return entry.value if entry is not None and entry.value.total_tasks == total else None

    return await until(known, within_s=within_s, what=f"{total} tasks are learned")


async def complete(bus: Bus) -> None:
    """Wait until every stream, bucket and consumer is there."""

    async def so() -> bool:
        seen = await topology.inspect(bus, ClusterConfig())
        return all(part.info is not None for part in (*seen.streams.values(), *seen.consumers.values()))

    await until(so, what="everything is there again")


@pytest.mark.slow
async def test_after_the_store_was_wiped_new_tasks_end_and_learning_goes_on(tmp_path: Path) -> None:
    server = NatsServer(tmp_path / "store")
    server.start()
    try:
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(running_phases(server.url))
            await stack.enter_async_context(running_nodes(server.url, lambda: [node("n1", echo, code=0.9)]))
            bus = await stack.enter_async_context(Bus(server.url))
            for n in range(3):
                assert (await do(bus, f"before {n}")).success
            await learned(bus, 3)

            server.kill()
            shutil.rmtree(tmp_path / "store" / "jetstream")
            await asyncio.to_thread(server.restart)
            await complete(bus)
            results = [await do(bus, f"after {n}") for n in range(2)]
            profile = await learned(bus, 2)

        assert all(result.success for result in results)
        assert profile.last_seq <= 2
    finally:
        server.stop()


@pytest.mark.parametrize("name", STREAMS)
async def test_a_deleted_stream_or_bucket_is_created_again_and_new_tasks_end(client: Bus, name: str) -> None:
    assert (await do(client, "before")).success
    await learned(client, 1)
    stream = client.subjects.stream(name) if name.isupper() else f"KV_{client.subjects.bucket(name)}"
    await client.api(f"STREAM.DELETE.{stream}")

    for n in range(2):
        assert (await do(client, f"after {n}")).success
    await learned(client, 2 if name == "REWARDS" else 3)
