"""A connected bus with its streams, and servers that may be killed."""

from collections.abc import AsyncIterator, Iterator

import pytest
from support.bus_helpers import Connect
from support.loop_harness import Phases
from support.phase_harness import Stage

from loom.bus import topology
from loom.bus.bus import Bus
from loom.runner.server.nats_server import NatsServer
from loom.runner.timings import ServiceTimings
from loom.schemas.config import ClusterConfig


@pytest.fixture
async def connect(namespace: str, nats_url: str) -> AsyncIterator[Connect]:
    """Opens connections to the test's namespace, and closes them after it."""
    buses: list[Bus] = []

    async def open_one(*, url: str = nats_url, namespace: str = namespace, role: str = "client") -> Bus:
        bus = Bus(url, namespace=namespace, role=role)
        buses.append(bus)
        await bus.connect()
        bus.connection._nc.options["reconnect_time_wait"] = 0.02  # tests need not be patient
        return bus

    yield open_one
    for bus in reversed(buses):
        await bus.close()


@pytest.fixture
async def plain(connect: Connect) -> Bus:
    """A connection, and no stream."""
    return await connect()


@pytest.fixture
async def bus(plain: Bus) -> Bus:
    """A connection to a namespace that has its streams."""
    assert await topology.apply(plain, ClusterConfig()) == []
    return plain


@pytest.fixture
def server() -> Iterator[NatsServer]:
    """A server of the test's own, to kill and restart."""
    server = NatsServer()
    server.start()
    yield server
    server.stop()


@pytest.fixture
async def mortal(server: NatsServer, connect: Connect) -> Bus:
    """A connection to `server`, with streams."""
    bus = await connect(url=server.url)
    assert await topology.apply(bus, ClusterConfig()) == []
    return bus


@pytest.fixture
async def phases() -> AsyncIterator[Phases]:
    """Phases of the test's own making, stopped after it."""
    phases = Phases()
    yield phases
    await phases.stop()


@pytest.fixture
def timings() -> ServiceTimings:
    """The times of the services of `stage`; a test module may replace this fixture."""
    return ServiceTimings()


@pytest.fixture
async def stage(nats_url: str, namespace: str, timings: ServiceTimings) -> AsyncIterator[Stage]:
    """A namespace with its streams, in which a test starts phases and hosts and reads every message."""
    async with Stage(nats_url, namespace, timings) as stage:
        yield stage
