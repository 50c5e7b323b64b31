"""The cluster and the commands of the README have the shown results; tests/e2e/test_pages.py runs its programs."""

import asyncio
import json
import os
import re
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest
from support.pages import ROOT, commands, output_of

from loom.bus import task_client
from loom.bus.bus import Bus
from loom.schemas.auction import HostAnnouncement
from loom.schemas.base import decode
from loom.schemas.task import TaskResult

LOOM = [sys.executable, "-m", "loom.runner.cli"]
COMMANDS = commands("README.md")


@asynccontextmanager
async def service(command: list[str], **environment: str) -> AsyncIterator[None]:
    process = await asyncio.create_subprocess_exec(
        *LOOM, *command[1:], cwd=ROOT, env={**os.environ, **environment}, stderr=asyncio.subprocess.DEVNULL
    )
    try:
        yield
    finally:
        process.terminate()
        async with asyncio.timeout(15):
            assert await process.wait() == 0


async def test_the_cluster_of_the_readme_does_the_task_of_the_readme(on_bus: tuple[str, str], client: Bus) -> None:
    """`loom up`, `loom host run` and the two ways to submit, word for word."""
    up = next(command for command in COMMANDS if command[:2] == ["loom", "up"])
    [nodes] = [command for command in COMMANDS if command[:3] == ["loom", "host", "run"]]
    [submit] = [command for command in COMMANDS if command[:2] == ["loom", "submit"]]
    [request] = [command for command in COMMANDS if command[:2] == ["nats", "req"]]
    announced = asyncio.Event()

    async def on_announcement(msg: object) -> None:
        if decode(msg.data, HostAnnouncement).nodes:  # type: ignore[attr-defined]
            announced.set()

    await client.connection.subscribe(client.subjects.of("host", "*", "*"), on_announcement)
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(service(up))
        await stack.enter_async_context(service(nodes))
        async with asyncio.timeout(20):
            await announced.wait()
        printed = await output_of([*LOOM, *submit[1:]], NATS_URL=on_bus[0])
        subject, ad = request[-2:]
        answer = await task_client.request(client, subject.replace("loom.", f"{on_bus[1]}."), ad.encode(), timeout_s=30)

    assert "revenue" in printed or "rows" in printed
    result = decode(answer, TaskResult)
    assert result.state == "succeeded"
    assert json.loads(ad)["domain"] == result.domain == "data"


async def test_the_report_of_the_readme_is_written(tmp_path: Path) -> None:
    """From real files, by a plan in the ad, on a server of its own."""
    [run] = [command for command in COMMANDS if command[:2] == ["loom", "run"]]
    out = tmp_path / "results.jsonl"
    run_summary = await output_of([*LOOM, *run[1:], "--out", str(out)])

    [result] = [decode(line, TaskResult) for line in out.read_bytes().splitlines()]
    assert result.success
    assert not result.below_threshold
    assert result.node_id == "editor"
    assert "loans per visitor: Hill Library 2.47" in result.content
    assert "begun subtasks done" in run_summary


@pytest.mark.parametrize("target", [command[1] for command in COMMANDS if command[0] == "make"])
def test_every_make_target_exists(target: str) -> None:
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)
