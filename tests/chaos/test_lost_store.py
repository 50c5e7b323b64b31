"""The server loses what it has stored under running phases: they create it again, and new work is done."""

import asyncio
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace
from support.builders import awarded
from support.nodes import echo, node
from support.phase_harness import Stage
from support.services import running_phases
from support.wait import until

from loom.bus import task_client, topology, upkeep
from loom.bus.bus import Bus
from loom.bus.natsio.server_errors import Refused
from loom.phases.scale import subtask_graph
from loom.phases.sense.timings import SenseTimings
from loom.runner.server.nats_server import NatsServer
from loom.runner.services import running_nodes
from loom.runner.timings import ServiceTimings
from loom.schemas.config import ClusterConfig
from loom.schemas.learning.profile import NodeProfile
from loom.schemas.record import TaskRecord
from loom.schemas.task import PRIORITIES, TaskAd, TaskResult

STREAMS = ("INTAKE", "TASKS", "REWARDS", "DEAD", "records", "plans", "nodes", "tuning")


@pytest.fixture
async def client(nats_url: str, namespace: str) -> AsyncIterator[Bus]:
    """A client of a whole cluster on the shared server."""
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
    return await (await task_client.publish(bus, ad, deltas=False)).result(25)


async def learned(bus: Bus, total: int, within_s: float = 20) -> NodeProfile:
    """Wait until the profile of the node holds exactly so many tasks."""

    async def known() -> NodeProfile | None:
        try:
            entry = await bus.bucket("nodes", NodeProfile).get("local.n1")
        except Refused:
            return None
        return entry.value if entry is not None and entry.value.total_tasks == total else None

    return await until(known, within_s=within_s, what=f"{total} tasks are learned")


async def complete(bus: Bus) -> None:
    """Wait until every stream, bucket and consumer exists."""

    async def so() -> bool:
        seen = await topology.inspect(bus, ClusterConfig())
        return all(part.info is not None for part in (*seen.streams.values(), *seen.consumers.values()))

    await until(so, what="everything is there again")


@pytest.mark.slow
async def test_after_a_wiped_store_new_tasks_end_and_learning_continues(tmp_path: Path) -> None:
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
            profile = await learned(bus, 5)  # what is known of the node is kept

        assert all(result.success for result in results)
        assert profile.last_seq == 2
    finally:
        server.stop()


@pytest.mark.slow
@pytest.mark.parametrize("name", STREAMS)
async def test_a_deleted_stream_or_bucket_is_created_again_and_new_tasks_end(client: Bus, name: str) -> None:
    assert (await do(client, "before")).success
    await learned(client, 1)
    stream = client.subjects.stream(name) if name.isupper() else f"KV_{client.subjects.bucket(name)}"
    await client.jetstream.api(f"STREAM.DELETE.{stream}")

    for n in range(2):
        assert (await do(client, f"after {n}")).success
    await learned(client, 3)


async def test_deleted_consumers_are_created_again_and_tasks_of_every_priority_end(client: Bus) -> None:
    for lane in topology.LANES:
        await client.jetstream.api(f"CONSUMER.DELETE.{client.subjects.stream(lane.stream)}.{lane.name}")
    for priority in PRIORITIES:
        ad = TaskAd(domain="code", description="after", priority=priority, timeout_s=20)
        assert (await (await task_client.publish(client, ad, deltas=False)).result(25)).success
    await complete(client)


async def test_an_unused_stream_is_created_again_at_the_next_check(
    nats_url: str, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upkeep, "CHECK_S", 0.1)
    async with Bus(nats_url, namespace=namespace) as client, running_phases(nats_url, namespace=namespace):
        for name in ("DEAD", "plans", "tuning"):
            stream = client.subjects.stream(name) if name.isupper() else f"KV_{client.subjects.bucket(name)}"
            await client.jetstream.api(f"STREAM.DELETE.{stream}")
        await complete(client)


async def test_a_dead_letter_is_kept_although_its_stream_was_deleted(client: Bus) -> None:
    await client.jetstream.api(f"STREAM.DELETE.{client.subjects.stream('DEAD')}")
    await client.connection.publish(client.subjects.task("match", "low", "t1"), b"?")

    async def kept() -> bool:
        try:
            return (await topology.stream_state(client, "DEAD"))["messages"] == 1
        except Refused:
            return False

    await until(kept, what="the dead letter")


# -- tasks whose messages were lost


SOON_STRANDED = SenseTimings(stranded_after_s=0.1)


@pytest.fixture
async def stage(nats_url: str, namespace: str) -> AsyncIterator[Stage]:
    async with Stage(nats_url, namespace, ServiceTimings(sense=SOON_STRANDED)) as stage:
        yield stage


async def roll_up(stage: Stage) -> None:
    """Erase all hops by one message; the server allows it to every publisher of hops."""
    await stage.bus.jetstream.publish(
        stage.bus.subjects.later("match", "x", "y"), b"{}", headers={"Nats-Rollup": "all"}
    )


async def purge(stage: Stage) -> None:
    await stage.bus.jetstream.api(f"STREAM.PURGE.{stage.bus.subjects.stream('TASKS')}")


@pytest.mark.slow
@pytest.mark.parametrize(("lose", "plan"), [(purge, []), (roll_up, [{"id": "a", "description": "a"}])])
async def test_a_status_request_ends_a_late_task_whose_messages_were_lost(
    stage: Stage, lose: Callable[[Stage], Awaitable[None]], plan: list[Any]
) -> None:
    """The task ends after its deadline, once a client asks for its status."""
    for phase in ("sense", "scale", "evaluate"):
        await stage.phase(phase)  # type: ignore[arg-type]
    handle = await task_client.publish(stage.bus, TaskAd(domain="code", description="x", timeout_s=0.5), deltas=False)
    hop = await stage.seen("task", phase="match", task_id=handle.task_id)
    if plan:
        spec = replace(hop.spec, divide=True, deepest=3)
        await stage.put("scale", awarded(replace(hop, ad=replace(hop.ad, context={"plan": plan}), spec=spec)))
        await stage.seen("task", phase="match", count=2)
    await lose(stage)

    async def ended() -> TaskRecord | None:
        found = await task_client.record(stage.bus, handle.task_id)
        return found if found is not None and found.ended else None

    record = await until(ended, what="the task has ended")
    assert record.envelope.error is not None
    assert record.envelope.error.code == "deadline_exceeded"
    assert (await handle.result(5)).state == "failed"
    if plan:
        child = subtask_graph.child_id(handle.task_id, "a")
        await until(lambda: has_ended(stage, child), what="its subtask has ended")


async def has_ended(stage: Stage, task_id: str) -> bool:
    return (await stage.read(task_id)).ended


async def test_a_status_request_does_not_end_a_late_task_that_waits_for_a_phase(stage: Stage) -> None:
    await stage.phase("sense")
    await stage.phase("evaluate")
    handle = await task_client.publish(stage.bus, TaskAd(domain="code", description="x", timeout_s=0.1), deltas=False)
    hop = await stage.seen("task", phase="match", task_id=handle.task_id)
    await until(lambda: stage.bus.clock.now() > hop.deadline + SOON_STRANDED.stranded_after_s, what="the task is late")
    for _ in range(2):
        await task_client.status(stage.bus, handle.task_id)
    assert stage.all("task", phase="evaluate") == []
