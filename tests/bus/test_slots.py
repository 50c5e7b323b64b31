"""Every end of a run, at any moment, frees its slot."""

import asyncio
import random
import time
from typing import Any

import pytest
from support.hanging_agents import HangingAgents
from support.logs import capture_logs
from support.nodes import node
from support.phase_harness import Stage
from support.runs import Watcher, run, stop_run
from support.wait import until

from loom.agents.host.node_host import NodeHost
from loom.agents.host.timings import HostTimings
from loom.agents.run_context import current_run
from loom.bus import task_client
from loom.bus.bus import Bus
from loom.bus.natsio.transport.message import Msg
from loom.runner.services import running_nodes, running_phases
from loom.runner.timings import ServiceTimings
from loom.schemas.base import encode
from loom.schemas.run import RunRequest, Stop
from loom.schemas.task import TaskAd


@pytest.fixture
def timings() -> ServiceTimings:
    return ServiceTimings(host=HostTimings(announce_s=0.1, heartbeat_s=0.1))


async def quick(job: RunRequest) -> str:
    await asyncio.sleep(0)
    return "done"


def requested(host: NodeHost, **facts: Any) -> None:
    """Give the host a run request in the same turn of the event loop as the messages that follow."""
    request = RunRequest(**{"task_id": "t1", "node_id": "n1", "description": "x", **facts})
    host._on_run(Msg("", host.bus.subjects.of("event", "local", host.host_id, "none", "none"), encode(request)))


def cancelled(host: NodeHost, task_id: str) -> None:
    host._on_stop(
        Msg(host.bus.subjects.of("stop", "local", host.host_id), "", encode(Stop(task_id=task_id, attempt=1)))
    )


async def is_free(host: NodeHost) -> None:
    """Every place of the node is free, and it works."""
    room = host._queues.get_or_create("n1")
    await until(lambda: not room.has_work and not host._runs.active(), what="every place is free")
    watcher = Watcher(host.bus)
    await watcher.run(host, task_id="afterwards")
    await watcher.event("result")


async def test_a_run_cancelled_in_the_turn_it_was_requested_keeps_no_slot(stage: Stage) -> None:
    host = await stage.host([node("n1", quick)], slots=2)
    for n in range(5):
        requested(host, task_id=f"t{n}")
        cancelled(host, f"t{n}")
    await is_free(host)


async def test_a_queued_run_cancelled_in_the_turn_it_was_requested_keeps_no_place(stage: Stage) -> None:
    worker = node("n1", quick)
    host = await stage.host([worker], slots=1, backlog=8)
    for n in range(6):
        requested(host, task_id=f"t{n}")
    for n in range(6):
        cancelled(host, f"t{n}")
    await is_free(host)
    await until(lambda: worker.load == 0, what="the node shows no load")


async def test_an_attempt_stopped_by_a_later_one_in_the_same_turn_keeps_no_slot(stage: Stage) -> None:
    host = await stage.host([node("n1", quick)], slots=1)
    for attempt in range(1, 6):
        requested(host, attempt=attempt)
    await is_free(host)


async def test_a_run_that_is_late_before_it_begins_keeps_no_slot(stage: Stage) -> None:
    host = await stage.host([node("n1", quick)], slots=1)
    for n in range(4):
        requested(host, task_id=f"t{n}", remaining_s=0.0)
    await host._executor.heartbeat()
    await is_free(host)


async def test_a_node_that_leaves_in_the_turn_of_its_run_leaves_no_slot_taken(stage: Stage) -> None:
    nodes = [node("n1", quick)]
    host = await stage.host(lambda: nodes, slots=1)
    gone = nodes.pop()
    requested(host)
    nodes.append(gone)
    requested(host, task_id="t2")
    nodes.clear()
    await host.announce()
    cancelled(host, "t2")
    await until(lambda: not host._queues.by_node, what="nothing is left of the node")
    nodes.append(gone)
    await is_free(host)


async def test_a_drain_in_the_turn_of_a_request_gives_every_run_back(stage: Stage) -> None:
    host = await stage.host([node("n1", quick)], slots=1, backlog=4)
    for n in range(4):
        requested(host, task_id=f"t{n}")
    await host.drain(0)
    await until(
        lambda: not host._queues.get_or_create("n1").has_work and not host._runs.active(), what="nothing is in hand"
    )


async def test_400_runs_cancelled_at_any_moment_leave_every_slot_free(stage: Stage) -> None:
    host = await stage.host([node("n1", quick)], slots=2, backlog=16)
    dice = random.Random(7)
    for n in range(400):
        await stage.bus.connection.publish(
            stage.bus.subjects.of("run", "local", host.host_id),
            RunRequest(task_id=f"t{n}", node_id="n1", description="x"),
            reply=stage.bus.subjects.of("event", "local", host.host_id, "none", "none"),
        )
        for _ in range(dice.randrange(4)):
            await asyncio.sleep(0)
        await stop_run(stage.bus, host, f"t{n}")
    await stage.bus.requests.flush()
    await is_free(host)


@pytest.mark.slow
async def test_400_tasks_cancelled_right_after_their_submission_leave_every_slot_free(
    nats_url: str, namespace: str
) -> None:
    dice = random.Random(7)

    async def short(job: RunRequest) -> str:
        await asyncio.sleep(0.01)
        return "done"

    async with (
        running_phases(nats_url, namespace=namespace),
        running_nodes(nats_url, lambda: [node("n1", short)], namespace=namespace, slots=2) as host,
        Bus(nats_url, namespace=namespace) as bus,
    ):

        async def submitted_and_cancelled() -> None:
            handle = await task_client.publish(bus, TaskAd(domain="any", description="x", timeout_s=30), deltas=False)
            await asyncio.sleep(dice.uniform(0, 0.02))
            await handle.cancel()
            await handle.close()

        for _ in range(50):
            await asyncio.gather(*(submitted_and_cancelled() for _ in range(8)))
        room = host._queues.get_or_create("n1")
        await until(lambda: not room.has_work, what="every slot is free")
        assert await (await task_client.publish(bus, TaskAd(domain="any", description="x"), deltas=False)).content(20)


# -- runs that ignore their cancel


@pytest.mark.slow
async def test_a_run_that_ignores_its_cancel_is_given_up_and_shown(
    stage: Stage,
) -> None:
    stage.timings = ServiceTimings(host=HostTimings(announce_s=0.1, heartbeat_s=0.1, cancel_grace_s=0.3))
    hanging = HangingAgents()

    async def deaf_child(job: RunRequest) -> str:
        return await asyncio.create_task(hanging.ignores_cancel(job))  # the awaited code ignores the cancel

    nodes = [node("n1", hanging.ignores_cancel), node("n2", deaf_child)]
    host = await stage.host(nodes, slots=1)
    try:
        with capture_logs() as logs:
            for name in ("n1", "n2"):
                watcher = await run(stage, host, task_id=f"deaf-{name}", node_id=name)
                await watcher.event("started")
                await stop_run(stage.bus, host, f"deaf-{name}")
                assert await watcher.code() == "cancelled"
            for each in nodes:
                each.agent = quick
            for name in ("n1", "n2"):
                await (await run(stage, host, task_id=f"next-{name}", node_id=name)).event("result")
            given_up = [line for line in logs if line["event"] == "run_ignores_cancel"]
        assert {line["task_id"] for line in given_up} == {"deaf-n1", "deaf-n2"}
        await until(lambda: stage.all("host")[-1].stuck == 1, what="the one that still runs is announced")
    finally:
        hanging.released.set()
    await until(lambda: stage.all("host")[-1].stuck == 0, what="it has ended")


@pytest.mark.slow
async def test_a_drain_does_not_wait_for_runs_that_ignore_their_cancel(stage: Stage) -> None:
    hanging = HangingAgents()
    host = await stage.host([node("n1", hanging.ignores_cancel)], slots=2)
    late = await run(stage, host, remaining_s=0.2)
    assert await late.code() == "deadline_exceeded"
    begun = time.monotonic()
    await host.drain(30)  # no run is in hand: the one run has ended, though its code goes on
    watcher = hanging.started
    assert watcher == ["t1"]
    assert time.monotonic() - begun < 5
    await until(lambda: not host._runs.cancelled, what="it is abandoned")
    hanging.released.set()


async def test_a_run_that_has_ended_gets_no_slot_back_for_its_delegations(stage: Stage) -> None:
    left: list[asyncio.Task[Any]] = []

    async def leaves_a_task_behind(job: RunRequest) -> str:
        async def delegates() -> None:
            run_context = current_run()
            assert run_context is not None
            async with asyncio.timeout(0.2):
                await run_context.delegate("x", "any", None, {})

        left.append(asyncio.create_task(delegates()))
        await asyncio.sleep(0)
        return "done"

    nodes = [node("n1", leaves_a_task_behind)]
    host = await stage.host(nodes, slots=1)
    await (await run(stage, host)).event("result")
    await asyncio.wait(left, timeout=5)
    assert isinstance(left[0].exception(), TimeoutError)
    nodes[0].agent = quick
    await is_free(host)
