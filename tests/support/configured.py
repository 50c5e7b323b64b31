"""A nats-server with a configuration of the test's own."""

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from tempfile import mkdtemp

from loom.runner.server.nats_server import find_server
from support.command import command
from support.wait import until


@asynccontextmanager
async def configured_server(folder: Path, config: str) -> AsyncIterator[str]:
    """Run a server on a free port; yields its host and port."""
    own = Path(mkdtemp(dir=folder))
    conf = own / "nats.conf"
    conf.write_text(config)

    def listed() -> str:
        for file in own.glob("*.ports"):
            try:
                return str(json.loads(file.read_text())["nats"][0]).rpartition("/")[2]
            except ValueError:
                pass  # half written
        return ""

    words = (find_server()[0], "-c", str(conf), "-a", "127.0.0.1", "-p", "-1", "--ports_file_dir", str(own))
    async with command(folder, *words) as server:
        await server.wait_for_output("Server is ready")
        yield await until(listed, what="the server lists its ports")
