"""Fixtures every test may ask for."""

import os
import secrets
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from loom.runner.embedded import NatsServer, find_server
from loom.schemas.errors import BusUnavailable

RAM_DISK = Path("/dev/shm")  # making hundreds of streams is three times as fast there


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
        server.kill()  # a clean end would tidy up hundreds of streams that nobody wants
        server.stop()


@pytest.fixture
def namespace() -> str:
    """A namespace nobody else uses."""
    return f"t{secrets.token_hex(4)}"
