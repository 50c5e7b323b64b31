"""Many processes, hosts and replicas on one server."""

import asyncio
import json
import os
import sys
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest
from support.nodes import Counting, node
from support.services import running_phases

from loom import Runtime
from loom.bus import task_client
from loom.bus.bus import Bus
from loom.runner.services import running_nodes
from loom.schemas.envelope import PHASES
from loom.schemas.task import TaskAd
from loom.types import CapabilityProfile

PROCESS = Path(__file__).parents[1] / "support" / "runtime_process.py"


@asynccontextmanager
async def runtime_process(name: str) -> AsyncIterator[asyncio.subprocess.Process]:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        str(PROCESS),
        name,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        env=dict(os.environ),
    )
    try:
        assert process.stdout is not None
        async with asyncio.timeout(15):
            assert await process.stdout.readline() == b"ready\n"
        yield process
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


@pytest.mark.slow
async def test_two_runtimes_in_two_processes_win_tasks_of_each_other(phases: Bus) -> None:
    async with runtime_process("theirs") as process:
        rt = Runtime()
        mine = Counting(0.01)
        rt.add_agent(mine, name="mine", capabilities=CapabilityProfile(scores={"code": 0.9}))
        async with rt:
            ads = [TaskAd(domain="code", description=f"task {i}") for i in range(40)]
            results = await rt.submit_many(ads, at_once=16)
        theirs_out, _ = await process.communicate(b"")  # closes its input: the process ends

    theirs = Counter(json.loads(theirs_out))
    winners = Counter(result.node_id for result in results)
    assert set(winners) == {"mine", "theirs"}
    assert sum(mine.runs.values()) + sum(theirs.values()) == 40
    assert max((mine.runs + theirs).values()) == 1


@pytest.mark.slow
async def test_two_replicas_of_every_phase_share_the_work_and_run_no_task_twice(
    on_bus: tuple[str, str], client: Bus
) -> None:
    url, namespace = on_bus
    agent = Counting()
    hosted = [node("coder", agent, code=0.9)]
    async with AsyncExitStack() as stack:
        for _ in range(2):
            for phase in PHASES:
                await stack.enter_async_context(running_phases(url, names=[phase], namespace=namespace))
        await stack.enter_async_context(running_nodes(url, lambda: hosted, namespace=namespace, slots=64))
        ads = [TaskAd(domain="code", description=f"task {i}") for i in range(300)]
        handles = [await task_client.publish(client, ad, deltas=False) for ad in ads]
        results = [await handle.result(30) for handle in handles]
        records = [await task_client.record(client, ad.task_id) for ad in ads]

    assert all(result.success for result in results)
    assert Counter(agent.runs.values()) == {1: 300}
    instances = {(hop.phase, hop.instance) for record in records if record for hop in record.envelope.hops}
    workers = Counter(phase for phase, _ in instances)
    assert workers == {"sense": 2, "match": 2, "execute": 2}


async def test_one_node_id_on_two_hosts_runs_each_task_once(on_bus: tuple[str, str], phases: Bus, client: Bus) -> None:
    url, namespace = on_bus
    here, there = Counting(), Counting()
    async with (
        running_nodes(url, lambda: [node("twin", here, code=0.9)], namespace=namespace, slots=64),
        running_nodes(url, lambda: [node("twin", there, code=0.9)], namespace=namespace, slots=64),
    ):
        handles = [await task_client.publish(client, TaskAd(domain="code", description="x")) for _ in range(50)]
        results = [await handle.result(30) for handle in handles]

    assert {result.node_id for result in results} == {"twin"}
    assert len({result.host_id for result in results}) == 2
    assert Counter((here.runs + there.runs).values()) == {1: 50}


async def test_duplicate_submits_all_get_the_one_answer(on_bus: tuple[str, str], phases: Bus) -> None:
    url, namespace = on_bus
    agent = Counting(0.2)
    async with (
        running_nodes(url, lambda: [node("coder", agent, code=0.9)], namespace=namespace),
        Bus(url, namespace=namespace) as first,
        Bus(url, namespace=namespace) as second,
    ):
        body = TaskAd(task_id="same", domain="code", description="x", timeout_s=20)

        async def submit(bus: Bus) -> bytes:
            return await task_client.request(bus, bus.subjects.submit, body, timeout_s=20)

        at_once = await asyncio.gather(*(submit(bus) for bus in (first, second, first)))
        after_the_end = await submit(second)
        handle = await task_client.publish(first, body)
        by_handle = await handle.result(3)  # well before a lost result would be asked for again

    assert len({*at_once, after_the_end}) == 1
    assert json.loads(after_the_end)["content"] == by_handle.content == "done: x"
    assert agent.runs == {"same": 1}


async def test_a_ninth_waiting_submitter_receives_accepted(on_bus: tuple[str, str], phases: Bus) -> None:
    url, namespace = on_bus
    nodes = [node("coder", Counting(0.3), code=0.9)]
    async with running_nodes(url, lambda: nodes, namespace=namespace), Bus(url, namespace=namespace) as bus:
        body = TaskAd(task_id="same", domain="code", description="x")
        answers = await asyncio.gather(
            *(task_client.request(bus, bus.subjects.submit, body, timeout_s=20) for _ in range(9))
        )

    assert Counter(json.loads(answer)["state"] for answer in answers) == {"succeeded": 8, "accepted": 1}
