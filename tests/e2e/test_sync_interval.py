"""LOOM_SYNC_INTERVAL reaches every server that is started here."""

import asyncio
import re
from pathlib import Path

import pytest
from support.command import LOOM, below, command

PIECE = """
import asyncio, sys
from loom import Runtime

async def main():
    async with Runtime():
        print("open", flush=True)
        await asyncio.to_thread(sys.stdin.read)

asyncio.run(main())
"""


def _server_settings(pid: int) -> str:
    """The configuration of the nats-server below a process."""
    (config,) = {found[1] for words in below(pid).values() if (found := re.search(r"nats-server -c (\S+)", words))}
    return Path(config).read_text()


@pytest.mark.slow
async def test_a_server_started_here_flushes_as_often_as_set(tmp_path: Path) -> None:
    (tmp_path / "piece.py").write_text(PIECE)

    async def settings(ready_line: str, *words: str) -> str:
        async with command(tmp_path, *words, LOOM_SYNC_INTERVAL="always") as running:
            await running.wait_for_output(ready_line)
            return _server_settings(running.process.pid)

    texts = await asyncio.gather(
        settings("loom is up", *LOOM, "up", "--port", "0"), settings("open", LOOM[0], str(tmp_path / "piece.py"))
    )
    assert all('sync_interval: "always"' in text for text in texts)
