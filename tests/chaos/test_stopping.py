"""Processes that stop, wait, and give up: their running tasks continue elsewhere."""

import asyncio
import signal
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest
from support.bus_helpers import alive
from support.command import LOOM, Command, command
from support.nodes import node
from support.services import running_phases
from support.streams import create_streams
from support.wait import until

from loom.bus import task_client
from loom.bus.bus import Bus
from loom.bus.task_client import TaskHandle
from loom.runner.server.nats_server import NatsServer, find_server
from loom.runner.services import running_nodes
from loom.schemas.envelope import PHASES
from loom.schemas.run import RunRequest
from loom.schemas.task import TaskAd

WITHIN_S = 30
NODES = """
import asyncio
from loom.types import AgentNode, CapabilityProfile

async def sleeper(job):
    await asyncio.sleep(60)
    return "never"

nodes = [AgentNode(id="sleeper", capabilities=CapabilityProfile(scores={"any": 0.9}), agent=sleeper)]
"""


@pytest.fixture
def server() -> Iterator[NatsServer]:
    """A server of one test, to stop and restart."""
    server = NatsServer()
    server.start()
    yield server
    server.stop()


class Agent:
    """An agent that waits for permission to end."""

    def __init__(self) -> None:
        self.begun: list[str] = []
        self.go_on = asyncio.Event()

    async def __call__(self, job: RunRequest) -> str:
        self.begun.append(job.task_id)
        await self.go_on.wait()
        return "done"


async def publish(bus: Bus, node_id: str | None = None) -> TaskHandle:
    return await task_client.publish(bus, TaskAd(domain="any", description="x", node_id=node_id), deltas=False)


@pytest.mark.slow
async def test_another_process_finishes_the_work_of_a_stopped_process(
    nats_url: str, namespace: str, tmp_path: Path
) -> None:
    agent = Agent()
    (tmp_path / "sleepers.py").write_text(NODES)
    env = {"NATS_URL": nats_url, "LOOM_NAMESPACE": namespace, "LOOM_DRAIN_TIMEOUT_S": "0.5"}

    def start(*words: str) -> AbstractAsyncContextManager[Command]:
        return command(tmp_path, *LOOM, *words, **env)

    async with (
        running_phases(nats_url, names=[name for name in PHASES if name != "execute"], namespace=namespace),
        start("phase", "run", "execute") as first,
        start("host", "run", str(tmp_path / "sleepers.py")) as host,
        running_nodes(nats_url, lambda: [node("other", agent)], namespace=namespace),
        Bus(nats_url, namespace=namespace) as bus,
    ):
        await asyncio.gather(first.wait_for_output("execute on nats"), host.wait_for_output("sleeper on nats"))
        moved, kept = await publish(bus), await publish(bus, node_id="other")  # the sleeper claims more

        async def runs() -> bool:
            record = await moved.record()
            return record is not None and record.claim.node_id == "sleeper" and bool(agent.begun)

        await until(runs, within_s=WITHIN_S, what="one runs on each host")
        async with start("phase", "run", "execute") as second:
            await second.wait_for_output("execute on nats")
            ended = await asyncio.gather(first.end(signal.SIGTERM), host.end(signal.SIGTERM))
            await until(lambda: len(agent.begun) == 2, within_s=WITHIN_S, what="the moved task runs on the other host")
            agent.go_on.set()
            assert [await handle.content(WITHIN_S) for handle in (moved, kept)] == ["done", "done"]
            assert (await second.end(signal.SIGTERM)).code == 0

    assert [one.code for one in ended] == [0, 0]
    assert "phases_drained" in ended[0].err
    assert not any("Traceback" in one.err for one in ended)
    assert sorted(agent.begun) == sorted((moved.task_id, kept.task_id))  # the kept one ran on, and only once


@asynccontextmanager
async def cluster_of(server: NatsServer, agent: Agent) -> AsyncIterator[Bus]:
    async with (
        running_phases(server.url),
        running_nodes(server.url, lambda: [node("n", agent)]),
        Bus(server.url) as bus,
    ):
        yield bus


@pytest.mark.slow
@pytest.mark.parametrize("away_s", [1, pytest.param(15, marks=[pytest.mark.slow, pytest.mark.timeout(120)])])
async def test_work_continues_after_an_outage_of_the_server(server: NatsServer, away_s: float) -> None:
    agent = Agent()
    async with cluster_of(server, agent) as bus:
        before = await publish(bus)
        await until(lambda: agent.begun, within_s=WITHIN_S, what="a task runs")

        server.kill()
        await asyncio.sleep(away_s)
        await asyncio.to_thread(server.restart)
        agent.go_on.set()

        assert await before.content(60) == "done"
        await until(lambda: alive(bus), within_s=WITHIN_S, what="the client is back")
        assert await (await publish(bus)).content(WITHIN_S) == "done"

    assert len(agent.begun) == 2


@pytest.fixture
async def guarded(tmp_path: Path) -> AsyncIterator[tuple[str, asyncio.subprocess.Process, Path]]:
    """A server with a password: its address, process and configuration."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    conf = tmp_path / "server.conf"
    conf.write_text(config_of(port, "secret", tmp_path))
    server = await asyncio.create_subprocess_exec(
        find_server()[0], "-c", str(conf), stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.DEVNULL
    )
    yield f"nats://loom:secret@127.0.0.1:{port}", server, conf
    server.kill()
    await server.wait()


def config_of(port: int, password: str, folder: Path) -> str:
    return (
        f'listen: "127.0.0.1:{port}"\njetstream {{ store_dir: "{folder / "store"}" }}\n'
        f"authorization {{ user: loom, password: {password} }}\n"
    )


@pytest.mark.slow
async def test_every_service_that_the_server_rejects_exits_for_a_restart(
    guarded: tuple[str, asyncio.subprocess.Process, Path], tmp_path: Path
) -> None:
    url, server, conf = guarded
    (tmp_path / "sleepers.py").write_text(NODES)
    async with AsyncExitStack() as stack:

        async def start(*words: str) -> Command:
            return await stack.enter_async_context(command(tmp_path, *LOOM, *words, NATS_URL=url))

        await create_streams(url)
        services = [
            await start("phase", "run", "match", "sense"),
            await start("up"),
            await start("host", "run", str(tmp_path / "sleepers.py")),
            await start("tap"),
        ]
        ready_lines = ("match on nats", "loom is up on", "sleeper on nats", "listening on nats")
        await asyncio.gather(*(each.wait_for_output(text) for each, text in zip(services, ready_lines, strict=True)))

        conf.write_text(conf.read_text().replace("secret", "changed"))
        server.send_signal(signal.SIGHUP)  # reads its configuration again, and hangs up on who may not be here

        ended = await asyncio.gather(*(each.end() for each in services))

    assert [one.code for one in ended] == [3] * len(services), [one.err[-300:] for one in ended]
    assert all("bus_unavailable: " in one.err for one in ended)
    assert not any("secret" in one.err + one.out for one in ended)
