"""The loop against a nats-server in a container, and the compose files, where a Docker engine answers."""

import asyncio
import json
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from support.compose import ROOT, WITHIN_S, docker, started, within
from support.services import running_phases

from loom.bus import task_client
from loom.bus.bus import Bus
from loom.runner.server.nats_server import find_server
from loom.runner.services import running_nodes
from loom.schemas.errors import BusUnavailable
from loom.schemas.run import RunRequest
from loom.schemas.task import TaskAd, TaskResult
from loom.types import AgentNode, CapabilityProfile

pytestmark = [pytest.mark.container, pytest.mark.filterwarnings("default"), pytest.mark.timeout(400)]

IMAGE = "loom-test-nats"
PATIENCE_S = 20.0


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An image of the local server binary, which is static; nothing is pulled."""
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
        first = await task_client.publish(bus, TaskAd(description="hello"))
        assert await first.content(timeout_s=30) == "HELLO"

        second = await task_client.publish(bus, TaskAd(description="wait"))
        await asyncio.to_thread(server.kill)  # type: ignore[attr-defined]
        await asyncio.to_thread(server.start)  # type: ignore[attr-defined]
        go_on.set()
        assert await second.content(timeout_s=90) == "WAIT"


# -- the compose files


@pytest.fixture(scope="module")
def images() -> None:
    """The image of the Dockerfile under the name the compose files use, and that of the server."""
    (server,) = {
        service["image"]
        for file in ("compose.yaml", "compose.cluster.yaml")
        for service in yaml.safe_load((ROOT / file).read_text())["services"].values()
        if service["image"] != "loom"
    }
    try:
        docker("compose", "version")
        if subprocess.run(["docker", "image", "inspect", server], capture_output=True, check=False).returncode:
            docker("pull", server)
        docker("build", "--network", "host", "--tag", "loom", ".")
    except (AssertionError, FileNotFoundError, subprocess.TimeoutExpired) as error:
        pytest.skip(f"no engine, no compose, or images that cannot be had: {error}")


def run_a_task(url: str) -> TaskResult:
    async def run() -> TaskResult:
        async with Bus(url, patience_s=PATIENCE_S) as bus:
            ad = TaskAd(domain="data", description="statistics", context={"file": "sales.csv"})
            return await (await task_client.publish(bus, ad)).result(90)

    return asyncio.run(run())


def test_both_compose_files_run_together_and_the_cluster_grows_without_one_server(images: None, tmp_path: Path) -> None:
    with started("compose.yaml", tmp_path) as single, started("compose.cluster.yaml", tmp_path) as cluster:
        for project in (single, cluster):
            assert run_a_task(project.url).success
            found = project.compose("run", "--rm", "-T", "doctor").splitlines()
            assert [line for line in found if not line.startswith("ok ")] == []

        docker("kill", "--signal", "STOP", *cluster.containers("nats-2"))  # it runs, and answers nothing
        within(60, lambda: cluster.health("nats-2") == "unhealthy", "the server is found out")
        cluster.compose("up", "--no-build", "--detach", "--scale", "execute=3")
        assert len(cluster.containers("execute")) == 3
        assert run_a_task(cluster.url).success
        docker("kill", "--signal", "CONT", *cluster.containers("nats-2"))

        cluster.compose("kill", "nats-3")
        cluster.compose("up", "--no-build", "--detach", "--no-deps", "--scale", "execute=4", "execute")
        assert len(cluster.containers("execute")) == 4
        assert len(single.containers("execute")) == 1


def test_a_service_in_a_container_logs_json_has_scratch_space_and_is_unhealthy_without_a_server(
    images: None, tmp_path: Path
) -> None:
    with started("compose.yaml", tmp_path) as project:
        for service in ("sense", "node"):
            events = [json.loads(line)["event"] for line in project.logs(service)]
            assert events[0] == "connecting"
            assert "ready" in events
        scratch = "cd /tmp && echo x > scratch && ! echo x > /scratch 2>/dev/null"
        project.compose("exec", "-T", "node", "sh", "-c", scratch)
        orphan = "(setsid sh -c 'sleep 0.1 &' &); sleep 1; ! grep -l '^State:.Z' /proc/[0-9]*/status"
        project.compose("exec", "-T", "node", "sh", "-c", orphan)

        project.compose("kill", "nats")
        within(60, lambda: project.health("sense") == "unhealthy", "the lost server is noticed")
        project.compose("up", "--no-build", "--detach")
        within(WITHIN_S, project.all_healthy, "all are healthy again")
        assert run_a_task(project.url).success


def test_a_file_that_the_user_of_the_image_may_not_read_is_named(images: None, tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o700)
    (closed / "agents.py").write_text("nodes = []")
    tmp_path.chmod(0o755)
    refused = subprocess.run(  # noqa: PLW1510 - the exit code is what is looked at
        [
            "docker",
            "run",
            "--rm",
            "--volume",
            f"{tmp_path}:/given:ro",
            "loom",
            "host",
            "run",
            "/given/closed/agents.py",
        ],
        capture_output=True,
        text=True,
    )

    assert (refused.returncode, refused.stderr) == (2, "invalid_file: /given/closed/agents.py: Permission denied\n")
