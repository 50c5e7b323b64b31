"""A compose file of the project, started for real under a name and on ports of the test's own."""

import json
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
WITHIN_S = 150


def docker(*words: str) -> str:
    """Return what `docker WORDS` prints.

    Raises:
        AssertionError: It fails; the message is its error output.
    """
    done = subprocess.run(["docker", *words], cwd=ROOT, capture_output=True, text=True, timeout=WITHIN_S)  # noqa: PLW1510
    assert done.returncode == 0, f"docker {' '.join(words)}: {done.stderr}"
    return done.stdout


def free_ports(count: int) -> list[int]:
    probes = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


class Project:
    """The services of a compose file; `url` names its servers."""

    def __init__(self, file: str, folder: Path) -> None:
        content: dict[str, Any] = yaml.safe_load((ROOT / file).read_text())
        content["name"] += "-test"  # nothing that already runs is touched
        servers = [service for service in content["services"].values() if "ports" in service]
        ports = free_ports(len(servers))
        for server, port in zip(servers, ports, strict=True):
            server["ports"] = [f"127.0.0.1:{port}:4222"]
        self.url = ",".join(f"nats://127.0.0.1:{port}" for port in ports)
        self._file = folder / file
        self._file.write_text(yaml.safe_dump(content))

    def compose(self, *words: str) -> str:
        """Return what `docker compose WORDS` prints."""
        return docker("compose", "--project-directory", str(ROOT), "--file", str(self._file), *words)

    def containers(self, service: str) -> list[str]:
        """Return the ids of the running containers of a service."""
        return self.compose("ps", "--quiet", service).split()

    def all_healthy(self) -> bool:
        """Return whether every container runs and its health check succeeds, but for `init`, which has ended well."""
        columns = "{{.Service}} {{.State}} {{.Health}} {{.ExitCode}}"
        states = {" ".join(line.split()) for line in self.compose("ps", "--all", "--format", columns).splitlines()}
        others = {state.partition(" ")[2] for state in states - {"init exited 0"}}
        return "init exited 0" in states and others == {"running healthy 0"}

    def health(self, service: str) -> str:
        """Return `starting`, `healthy` or `unhealthy` of the first container of a service."""
        (first, *_) = self.containers(service)
        state = json.loads(docker("inspect", "--format", "{{json .State}}", first))
        return str(state["Health"]["Status"])

    def logs(self, service: str) -> list[str]:
        """Return all lines that a service has written to standard output and error."""
        lines = [docker_logs(container) for container in self.containers(service)]
        return [line for some in lines for line in some]


def within(seconds: float, done: Callable[[], bool], what: str) -> None:
    """Wait until `done`; containers are asked from outside, so this blocks."""
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end, what
        time.sleep(0.5)


def docker_logs(container: str) -> list[str]:
    done = subprocess.run(["docker", "logs", container], capture_output=True, text=True, check=True)
    return [*done.stdout.splitlines(), *done.stderr.splitlines()]


@contextmanager
def started(file: str, folder: Path) -> Iterator[Project]:
    """Start all services of a file, wait until they are healthy, and remove them after the body."""
    project = Project(file, folder)
    try:
        project.compose("up", "--no-build", "--detach")
        within(WITHIN_S, project.all_healthy, f"all of {file} are healthy")
        yield project
    finally:
        project.compose("down", "--volumes", "--timeout", "5")
