"""Fixtures every test may ask for."""

import os
import secrets
from collections.abc import Iterator

import pytest

from loom.runner.embedded import NatsServer, find_server
from loom.schemas.errors import BusUnavailable


@pytest.fixture(scope="session")
def nats_url() -> Iterator[str]:
    """Address of one nats-server for the whole session; tests share it, each in a namespace of its own."""
    try:
        find_server()
    except BusUnavailable as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(error.message)
    server = NatsServer()
    server.start()
    yield server.url
    server.kill()  # a clean end would tidy up hundreds of streams that nobody wants
    server.stop()


@pytest.fixture
def namespace() -> str:
    """A namespace nobody else uses."""
    return f"t{secrets.token_hex(4)}"
