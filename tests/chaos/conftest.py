from collections.abc import Iterator

import pytest

from loom.runner.embedded import NatsServer


@pytest.fixture
def server() -> Iterator[NatsServer]:
    """A server of the test's own, to kill and restart."""
    server = NatsServer()
    server.start()
    yield server
    server.stop()
