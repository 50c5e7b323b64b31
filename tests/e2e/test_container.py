"""The loop against a nats-server in a container, where a Docker engine answers."""

import asyncio
import shutil
import socket
from collections.abc import Iterator

import pytest

from loom.bus import tasks
from loom.bus.client import Bus
from loom.runner.cluster import running_nodes, running_phases
from loom.runner.embedded import find_server
from loom.schemas.errors import BusUnavailable
from loom.schemas.run import RunRequest
from loom.schemas.task import TaskAd
from loom.types import AgentNode, CapabilityProfile

pytestmark = [pytest.mark.container, pytest.mark.filterwarnings("default"), pytest.mark.timeout(180)]

IMAGE = "loom-test-nats"
PATIENCE_S = 20.0


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An image of the server found here: static, so that nothing has to be pulled."""
    docker = pytest.importorskip("docker")
    try:
        client = docker.from_env()
        client.ping()
        binary, _ = find_server()
    except (docker.errors.DockerException, BusUnavailable) as error:
        pytest.skip(f"{type(error).__name__}: {error}")
    folder = tmp_path_factory.mktemp("image")
    shutil.copy(binary, folder / "nats-server")
    (folder / "Dockerfile").write_text('FROM scratch\nCOPY nats-server /nats-server\nENTRYPOINT ["/nats-server"]\n')
    client.images.build(path=str(folder), tag=IMAGE, rm=True)
    return IMAGE


@pytest.fixture
def container(image: str) -> Iterator[tuple[str, object]]:
    """Address and container of a server that keeps its streams while it is restarted."""
    core = pytest.importorskip("testcontainers.core.container")
    pytest.importorskip("testcontainers.core.config").testcontainers_config.ryuk_disabled = True
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    server = core.DockerContainer(image).with_command("--jetstream --store_dir /data").with_bind_ports(4222, port)
    with server:
        yield f"nats://127.0.0.1:{port}", server.get_wrapped_container()


async def test_the_loop_runs_on_a_server_in_a_container_and_survives_its_death(container: tuple[str, object]) -> None:
    url, server = container
    go_on = asyncio.Event()

    async def work(job: RunRequest) -> str:
        if job.description == "wait":
            await go_on.wait()
        return job.description.upper()

    node = AgentNode(id="n", agent=work, capabilities=CapabilityProfile())
    async with (
        running_phases(url, patience_s=PATIENCE_S),
        running_nodes(url, lambda: [node], patience_s=PATIENCE_S),
        Bus(url) as bus,
    ):
        first = await tasks.publish(bus, TaskAd(description="hello"))
        assert await first.content(timeout_s=30) == "HELLO"

        second = await tasks.publish(bus, TaskAd(description="wait"))
        await asyncio.to_thread(server.kill)  # type: ignore[attr-defined]
        await asyncio.to_thread(server.start)  # type: ignore[attr-defined]
        go_on.set()
        assert await second.content(timeout_s=90) == "WAIT"
