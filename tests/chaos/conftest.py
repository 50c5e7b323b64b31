from collections.abc import Iterator

import pytest
from support.crash_process import QUICK, each_setting

from loom.runner.server.nats_server import NatsServer


@pytest.fixture
def server() -> Iterator[NatsServer]:
    """A server of one test, to kill and restart."""
    server = NatsServer()
    server.start()
    yield server
    server.stop()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shorten the intervals after which lost processes are replaced."""
    for module, name, value in each_setting(QUICK):
        monkeypatch.setattr(module, name, value)
