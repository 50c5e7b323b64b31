"""Processes that host user code: its exceptions, its blocking calls, and the end of the process."""

import asyncio
import json
import os
import signal
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from support.command import LOOM, Command, command, loom
from support.nodes import Counting, node
from support.openai_server import OpenAIServer, Reply
from support.services import running_phases
from support.wait import until

from loom.bus import task_client
from loom.bus.bus import Bus
from loom.bus.natsio.transport.message import Msg
from loom.bus.task_client import TaskHandle
from loom.runner.server.nats_server import NatsServer
from loom.runner.services import running_nodes
from loom.schemas.task import TaskAd

WITHIN_S = 30
KEY = "sk-canary-0123456789abcdef"

AGENTS = """
import asyncio, os, signal, sys, threading, time
from loom.types import AgentNode, CapabilityProfile

async def deaf(description: str) -> str:
    while True:
        try:
            await asyncio.sleep(0.2)
        except BaseException:
            pass

async def cleans_up_without_end(description: str) -> str:
    try:
        await asyncio.sleep(1000)
    finally:
        await asyncio.sleep(1000)

async def generates(description: str):
    try:
        while True:
            yield "x"
            await asyncio.sleep(0.1)
    finally:
        await asyncio.sleep(1000)

async def waits_for_a_deaf_child(description: str) -> str:
    return await asyncio.gather(deaf(description))

async def waits_for_a_thread(description: str) -> str:
    return str(await asyncio.to_thread(time.sleep, 1000))

async def blocks(description: str) -> str:
    time.sleep(1000)

def blocks_in_a_thread(description: str) -> str:
    time.sleep(1000)

async def blocks_for_a_while(description: str) -> str:
    time.sleep(float(os.environ["BLOCK_S"]))
    return "done in the end"

async def raises_beside(description: str) -> str:
    def interrupt():
        raise KeyboardInterrupt("in a callback")

    async def leave():
        raise SystemExit("in a task")

    async def fail():
        raise ValueError("in a task, with sk-canary-0123456789abcdef")

    loop = asyncio.get_running_loop()
    loop.call_soon(interrupt)
    left = [loop.create_task(leave()), loop.create_task(fail())]
    await asyncio.sleep(0.05)
    del left
    return "done all the same"

def interrupts(description: str) -> str:
    raise KeyboardInterrupt

def raises_a_secret(description: str) -> str:
    raise RuntimeError("GET https://x/?key=canary-in-a-url failed, Bearer " + os.environ["OPENAI_API_KEY"])

async def quick(description: str) -> str:
    return "quick " + description

agents = [each for each in list(globals().values()) if callable(each) and each.__module__ == __name__]
nodes = [AgentNode(id=f.__name__, agent=f, capabilities=CapabilityProfile(scores={f.__name__: 0.9})) for f in agents
         if os.environ.get("ONLY", f.__name__) == f.__name__]
"""


@asynccontextmanager
async def hosting(folder: Path, url: str, namespace: str, **env: str) -> AsyncIterator[Command]:
    """Run `loom host run` with these agents in a process."""
    (folder / "agents.py").write_text(AGENTS)
    own = {"NATS_URL": url, "LOOM_NAMESPACE": namespace, **env}
    async with command(folder, *LOOM, "host", "run", str(folder / "agents.py"), **own) as host:
        yield await host.wait_for_output("on nats://")


async def begun_on(bus: Bus, node_id: str, domain: str = "") -> TaskHandle:
    """Submit a task, and return once it runs on that node."""
    ad = TaskAd(domain=domain or node_id, description="x", timeout_s=60)
    handle = await task_client.publish(bus, ad, deltas=False)

    async def runs() -> bool:
        record = await handle.record()
        return record is not None and record.claim.node_id == node_id

    await until(runs, within_s=WITHIN_S, what=f"a task runs on {node_id}")
    return handle


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind",
    [
        "waits_for_a_thread",
        *(
            pytest.param(kind, marks=pytest.mark.slow)
            for kind in (
                "deaf",
                "cleans_up_without_end",
                "generates",
                "waits_for_a_deaf_child",
                "blocks",
                "blocks_in_a_thread",
            )
        ),
    ],
)
async def test_a_host_ends_after_its_drain_whatever_still_runs(
    nats_url: str, namespace: str, tmp_path: Path, kind: str
) -> None:
    other = Counting()
    async with (
        running_phases(nats_url, namespace=namespace),
        Bus(nats_url, namespace=namespace) as bus,
        hosting(tmp_path, nats_url, namespace, LOOM_DRAIN_TIMEOUT_S="0.5", ONLY=kind) as host,
    ):
        handle = await begun_on(bus, kind)
        async with running_nodes(nats_url, lambda: [node("other", other, **{kind: 0.5})], namespace=namespace):
            begun = time.monotonic()
            ended = await host.end(signal.SIGTERM)
            took_s = time.monotonic() - begun
            result = await handle.result(WITHIN_S)
    assert took_s < 6  # half a second to drain, two to leave, and the machine may be busy
    assert ended.code == (1 if kind in ("blocks", "waits_for_a_deaf_child") else 0), ended.err
    assert "Traceback" not in ended.err
    assert (result.content, result.node_id) == ("done: x", "other")
    assert sum(other.runs.values()) == 1


async def outlives(running: Command, number: signal.Signals) -> None:
    """A process gets a signal and does not end at once; two that come together would count as one."""
    running.process.send_signal(number)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.3):
            await running.process.wait()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["blocks", pytest.param("deaf", marks=pytest.mark.slow)])
async def test_a_second_signal_ends_a_host_at_once(nats_url: str, namespace: str, tmp_path: Path, kind: str) -> None:
    async with (
        running_phases(nats_url, namespace=namespace),
        Bus(nats_url, namespace=namespace) as bus,
        hosting(tmp_path, nats_url, namespace, LOOM_DRAIN_TIMEOUT_S="60", ONLY=kind) as host,
    ):
        await begun_on(bus, kind)
        await outlives(host, signal.SIGTERM)
        begun = time.monotonic()
        ended = await host.end(signal.SIGINT)
        assert time.monotonic() - begun < 4
    assert ended.code in (0, 1)


@pytest.mark.slow
async def test_exceptions_in_user_tasks_and_callbacks_do_not_end_the_host(
    nats_url: str, namespace: str, tmp_path: Path
) -> None:
    async with (
        running_phases(nats_url, namespace=namespace),
        Bus(nats_url, namespace=namespace) as bus,
        hosting(tmp_path, nats_url, namespace) as host,
    ):

        async def done_by(node_id: str) -> str:
            ad = TaskAd(node_id=node_id, domain="x", description="x", timeout_s=20)
            result = await (await task_client.publish(bus, ad, deltas=False)).result(WITHIN_S)
            return result.content or (result.error.message if result.error else "")

        assert await done_by("raises_beside") == "done all the same"
        assert await done_by("interrupts") == "the agent raised KeyboardInterrupt"
        assert await done_by("quick") == "quick x"
        ended = await host.end(signal.SIGTERM)
    assert ended.code == 0, ended.err
    assert "exception_escaped" in ended.err
    assert "canary" not in ended.err
    assert "Traceback" not in ended.err


@pytest.mark.slow
async def test_a_secret_in_an_exception_is_found_nowhere(namespace: str, tmp_path: Path) -> None:
    def refuse(_request: object) -> Reply:
        return Reply(status=400, body=json.dumps({"error": {"message": f"bad header Authorization: Bearer {KEY}"}}))

    server = NatsServer()
    server.start()
    try:
        messages: list[Msg] = []
        with OpenAIServer(refuse) as model:
            async with (
                running_phases(server.url, namespace=namespace),
                Bus(server.url, namespace=namespace) as bus,
                hosting(tmp_path, server.url, namespace, OPENAI_API_KEY=KEY, OPENAI_BASE_URL=model.base_url) as host,
            ):
                await bus.connection.subscribe_sync(">", messages.append)
                ad = TaskAd(node_id="raises_a_secret", domain="x", description="x", timeout_s=20)
                result = await (await task_client.publish(bus, ad, deltas=True)).result(WITHIN_S)
                listed = await loom(tmp_path, "task", "ls", "--json", NATS_URL=server.url, LOOM_NAMESPACE=namespace)
                one = await loom(
                    tmp_path, "task", "show", result.task_id, "--json", NATS_URL=server.url, LOOM_NAMESPACE=namespace
                )
                await bus.requests.flush()
                ended = await host.end(signal.SIGTERM)
    finally:
        server.stop()
    assert result.error is not None
    assert result.error.message == "the agent raised RuntimeError"
    assert any(b"the agent raised RuntimeError" in msg.data for msg in messages)
    everything = [
        *(msg.data for msg in messages),
        *(text.encode() for text in (listed.out, listed.err, one.out, ended.err)),
    ]
    assert not [body for body in everything if b"canary" in body]
    assert "RuntimeError: GET https://x/?key=*** failed, Bearer ***" in ended.err


@pytest.mark.slow
async def test_an_agent_that_blocks_its_host_is_not_tried_elsewhere_nor_blamed(
    nats_url: str, namespace: str, tmp_path: Path
) -> None:
    other = Counting()
    kind = "blocks_for_a_while"
    async with (
        running_phases(nats_url, namespace=namespace),
        Bus(nats_url, namespace=namespace) as bus,
        hosting(tmp_path, nats_url, namespace, ONLY=kind, BLOCK_S="10") as host,
    ):
        handle = await begun_on(bus, kind)
        async with running_nodes(nats_url, lambda: [node("other", other, **{kind: 0.5})], namespace=namespace):
            result = await handle.result(WITHIN_S)
        log = host.err
    assert (result.content, result.node_id, result.attempts) == ("done in the end", kind, 1)
    assert not other.runs
    assert "event_loop_blocked" in log
    assert '"blocks_for_a_while"' in log


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["deaf", "blocks", "waits_for_a_thread"])
async def test_a_second_interrupt_ends_a_run_of_tasks_whatever_its_agents_do(tmp_path: Path, kind: str) -> None:
    (tmp_path / "agents.py").write_text(AGENTS)
    (tmp_path / "tasks.jsonl").write_text(
        '{"task_id": "a", "node_id": "quick", "description": "x"}\n'
        f'{{"task_id": "b", "node_id": "{kind}", "description": "x"}}\n'
    )
    words = ("run", "tasks.jsonl", "--agents", "agents.py", "--out", "results.jsonl", "--at-once", "1")
    before = Path.cwd()
    os.chdir(tmp_path)
    try:
        async with command(tmp_path, *LOOM, *words) as run:
            await run.wait_for_output("b  execute")
            await outlives(run, signal.SIGINT)
            begun = time.monotonic()
            ended = await run.end(signal.SIGINT)
    finally:
        os.chdir(before)
    assert time.monotonic() - begun < 6
    assert ended.code in (1, 130)


PROGRAM = """
import asyncio, time
from loom import Runtime, TaskAd
from loom.schemas.config import ClusterConfig

async def deaf(description: str) -> str:
    while True:
        try:
            await asyncio.sleep(0.2)
        except BaseException:
            pass

async def main():
    rt = Runtime(cluster_config=ClusterConfig(drain_timeout_s=0.3))
    rt.add_agent(deaf, name="deaf")
    async with rt:
        await rt.publish(TaskAd(description="x", timeout_s=60))
        while not rt.cluster.nodes[0].load:
            await asyncio.sleep(0.01)
        begun = time.monotonic()
        {leave}
    print("closed in", time.monotonic() - begun, flush=True)

asyncio.run(main())
print("the program continues")
"""


@pytest.mark.slow
@pytest.mark.parametrize("leave", ["pass", pytest.param("rt.dispose()", marks=pytest.mark.slow)])
async def test_a_program_continues_after_a_runtime_whose_agent_ignores_its_cancel(tmp_path: Path, leave: str) -> None:
    (tmp_path / "program.py").write_text(PROGRAM.replace("{leave}", leave))
    async with command(tmp_path, sys.executable, str(tmp_path / "program.py")) as program:
        ended = await program.end()
    assert ended.code == 0, ended.err
    closed, continued = ended.out.splitlines()
    assert float(closed.split()[-1]) < 6
    assert continued == "the program continues"
