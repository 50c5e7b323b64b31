"""Fixtures for all tests."""

import os
import secrets
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from support.command import FOREIGN
from support.process_state import process_state_restored
from support.services import running_phases

from loom.bus.bus import Bus
from loom.runner.server.nats_server import NatsServer, find_server
from loom.schemas.errors import BusUnavailable

RAM_DISK = Path("/dev/shm")  # making hundreds of streams is three times as fast there

# A slow moment of the machine is no failure. Under CI the examples are the same each time: hypothesis's own choice.
settings.register_profile(
    "loom", max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True
)
settings.load_profile("loom")


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, exitstatus: int, config: pytest.Config) -> None:
    """Print, after a failure, how to run the tests in the same order."""
    if exitstatus == pytest.ExitCode.TESTS_FAILED and config.getoption("randomly_reorganize", default=False):
        seed = config.getoption("randomly_seed")
        terminalreporter.write_line(f"the order of this run: pytest --randomly-seed={seed}", red=True)


@pytest.fixture(scope="session", autouse=True)
def outside_ignored(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The developer's own settings, keys and certificates play no part: no test asks a server outside."""
    with pytest.MonkeyPatch.context() as environment:
        for name in [name for name in os.environ if name.startswith(FOREIGN)]:
            environment.delenv(name)
        environment.delenv("SSL_CERT_FILE", raising=False)
        environment.setenv("XDG_DATA_HOME", str(tmp_path_factory.mktemp("data")))
        # Reading the system's certificates takes 50 ms of CPU for every model client.
        environment.setenv("SSL_CERT_DIR", str(tmp_path_factory.mktemp("certificates")))
        yield


@pytest.fixture(autouse=True)
def process_state() -> Iterator[None]:
    """Every test begins with the same logging, environment, signal handlers, folder and event loop policy."""
    with process_state_restored():
        yield


@pytest.fixture(scope="session")
def nats_url() -> Iterator[str]:
    """Address of one nats-server for the whole session; tests share it, each in a namespace of its own."""
    try:
        find_server()
    except BusUnavailable as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(error.message)
    with tempfile.TemporaryDirectory(dir=RAM_DISK if RAM_DISK.is_dir() else None) as store:
        server = NatsServer(Path(store))
        server.start()
        yield server.url
        server.kill()  # a clean stop would spend time on hundreds of unused streams
        server.stop()


@pytest.fixture
def namespace() -> str:
    """A namespace of the test's own."""
    return f"t{secrets.token_hex(4)}"


@pytest.fixture
def on_bus(nats_url: str, namespace: str, monkeypatch: pytest.MonkeyPatch) -> tuple[str, str]:
    """The environment of a process that uses the shared server; returns address and namespace."""
    monkeypatch.setenv("NATS_URL", nats_url)
    monkeypatch.setenv("LOOM_NAMESPACE", namespace)
    return nats_url, namespace


@pytest.fixture
async def phases(on_bus: tuple[str, str]) -> AsyncIterator[Bus]:
    """All six phases on the shared server."""
    url, namespace = on_bus
    async with running_phases(url, namespace=namespace) as bus:
        yield bus


@pytest.fixture
async def client(on_bus: tuple[str, str]) -> AsyncIterator[Bus]:
    """A client's connection."""
    url, namespace = on_bus
    async with Bus(url, namespace=namespace) as bus:
        yield bus
