"""Three servers and three replicas of each stream: one server is killed, and no accepted task is lost."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import pytest
from support.invariants import check, learned_state
from support.nats_cluster import NatsCluster, leader, nats_cluster
from support.nodes import echo, node
from support.services import running_phases
from support.wait import until
from support.workload import Workload

from loom.bus import task_client, topology
from loom.bus.bus import Bus
from loom.bus.hops import hop_loop
from loom.runner.doctor.diagnosis import examine
from loom.runner.doctor.findings import Finding
from loom.runner.services import running_nodes
from loom.schemas.config import ClusterConfig
from loom.schemas.run import RunRequest
from loom.schemas.task import TaskAd

THREE = ClusterConfig(replicas=3)


@pytest.fixture
async def cluster() -> AsyncIterator[NatsCluster]:
    async with nats_cluster() as cluster:
        yield cluster


@pytest.fixture
async def client(cluster: NatsCluster) -> AsyncIterator[Bus]:
    async with Bus(cluster.url, patience_s=20) as bus:
        yield bus


async def _copies(bus: Bus) -> dict[str, int]:
    """Return the servers of each stream and bucket, with the leader."""
    infos = [(await bus.jetstream.api(f"STREAM.INFO.{one['name']}")) for one in topology.streams(bus, THREE)]
    return {info["config"]["name"]: 1 + len(info["cluster"].get("replicas") or []) for info in infos}


@pytest.mark.slow
async def test_every_stream_is_on_three_servers_and_tasks_end_on_them(cluster: NatsCluster, client: Bus) -> None:
    assert await topology.apply(client, THREE) == []
    assert await topology.apply(client, THREE) == []
    assert set((await _copies(client)).values()) == {3}
    async with running_phases(cluster.url, config=THREE), running_nodes(cluster.url, lambda: [node("n", echo)]):
        handles = [await task_client.publish(client, TaskAd(description=f"job {n}", domain="code")) for n in range(5)]
        results = await asyncio.gather(*(handle.result(30) for handle in handles))

    assert [result.content for result in results] == [f"done: job {n}" for n in range(5)]


@pytest.mark.slow
async def test_existing_streams_get_no_more_replicas_without_an_operator(cluster: NatsCluster, client: Bus) -> None:
    assert await topology.apply(client, ClusterConfig()) == []

    warnings = await topology.apply(client, THREE)

    assert len(warnings) == len(await _copies(client))
    assert all(sentence.endswith(": num_replicas is 1, designed 3") for sentence in warnings)
    assert set((await _copies(client)).values()) == {1}
    advice = [each.todo for each in await examine(client, THREE) if each.about == "streams"]
    assert all("nats stream edit" in todo for todo in advice)


@pytest.mark.slow
async def test_a_message_published_again_while_it_is_replicated_is_stored_once(client: Bus) -> None:
    """Replicas refuse a message id that is being stored; the publisher retries until the first one is stored."""
    await topology.apply(client, THREE)
    subject = client.subjects.intake("public", "low", "t1")

    acks = await asyncio.gather(*(client.jetstream.publish(subject, b"x", msg_id="m1", within_s=30) for _ in range(20)))

    assert {ack.seq for ack in acks} == {1}
    assert (await topology.stream_state(client, "INTAKE"))["messages"] == 1


@pytest.mark.slow
@pytest.mark.timeout(180)
@pytest.mark.parametrize("stream", ["LOOM_INTAKE", "LOOM_TASKS", "KV_loom_records"])
async def test_the_leader_dies_while_tasks_are_submitted_and_none_is_lost(
    cluster: NatsCluster, client: Bus, stream: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(topology, "ACK_WAIT_S", 3)  # what was in hand need not come back after 30 s
    monkeypatch.setattr(hop_loop, "IN_PROGRESS_S", 1.0)
    runs: list[str] = []

    async def agent(job: RunRequest) -> str:
        runs.append(f"{job.task_id}:{job.attempt}")
        return "done"

    async with AsyncExitStack() as stack:
        for names in (("sense", "execute"), ("match", "scale"), ("evaluate", "adapt")):
            await stack.enter_async_context(running_phases(cluster.url, names=names, config=THREE, patience_s=20))
        await stack.enter_async_context(running_nodes(cluster.url, lambda: [node("n", agent, code=0.9)], patience_s=20))
        workload = Workload(client)
        watching = asyncio.ensure_future(workload.watch())
        submitting = asyncio.ensure_future(workload.submit(120, per_s=30))
        await until(lambda: len(workload.accepted) >= 20, within_s=30, what="tasks are accepted")
        dead = await leader(client, stream)
        cluster.kill(dead)
        await submitting
        await leader(client, stream, other_than=dead)
        await workload.settled(within_s=60)
        await cluster.restart(dead)
        await cluster.ready()
        state = await learned_state(client)
        watching.cancel()
        check(workload, state, runs)
        await until(lambda: _level(client), within_s=30, what="the server that came back has caught up")

    assert len(workload.accepted) >= 20


async def _found(bus: Bus) -> list[Finding]:
    return [each for each in await examine(bus, THREE) if each.about in {"replicas", "jetstream"}]


async def _level(bus: Bus) -> bool:
    return any(each.about == "replicas" and each.mark == "ok" for each in await _found(bus))


@pytest.mark.slow
@pytest.mark.timeout(120)
async def test_doctor_names_the_server_that_is_down_and_a_lost_quorum(cluster: NatsCluster, client: Bus) -> None:
    await topology.apply(client, THREE)
    await until(lambda: _level(client), within_s=30, what="all copies are level")
    first, second, _ = sorted(
        cluster.members, key=lambda name: f"127.0.0.1:{cluster.members[name].port}" in _at(client)
    )

    async def warned() -> bool:
        return any(each.mark == "warn" and each.message.startswith(f"{first} is down") for each in await _found(client))

    cluster.kill(first)
    await until(warned, within_s=40, what="the server that is down is named")

    async def stopped() -> bool:
        return any(each.mark == "fail" and each.todo for each in await _found(client))

    cluster.kill(second)
    await until(stopped, within_s=40, what="no leader is left")
    await asyncio.gather(cluster.restart(first), cluster.restart(second))
    await until(lambda: _level(client), within_s=60, what="all copies are level again")


def _at(bus: Bus) -> str:
    url = bus.connection._nc.connected_url
    return url.netloc if url is not None else ""
