"""`loom up`: the place of its store, access to its server, and the format of its logs."""

import json
import re
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from support.command import LOOM, Command, alive, below, command
from support.command import loom as run_loom
from support.nodes import echo, node
from support.stored import TASKS, ads, everything_is_there
from support.wait import until

from loom.bus.bus import Bus
from loom.bus.task_client import publish
from loom.runner.services import running_nodes
from loom.schemas.errors import BusUnavailable


@asynccontextmanager
async def up(folder: Path, *words: str, **env: str) -> AsyncIterator[tuple[Command, str]]:
    """`loom up`, and the address of its server."""
    async with command(folder, *LOOM, "up", "--port", "0", *words, **env) as running:
        await running.wait_for_output("loom is up on")
        yield running, re.findall(r"loom is up on (nats://\S+:\d+)", running.err)[0]


async def work_on(bus: Bus) -> None:
    """Run all tasks, and wait until their rewards are applied."""
    coder = node("coder", echo, code=0.6)
    async with running_nodes(bus.connection.url, lambda: [coder]):
        handles = [await publish(bus, ad, deltas=False) for ad in ads()]
        assert [await handle.content() for handle in handles] == ["done: sort"] * TASKS
        await until(lambda: coder.capabilities.total_tasks == TASKS, what="all is learned")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
async def test_a_stopped_or_killed_cluster_has_all_records_after_a_restart(
    tmp_path: Path, number: signal.Signals
) -> None:
    async with up(tmp_path) as (running, url), Bus(url) as bus:
        await work_on(bus)
        processes = below(running.process.pid)
        await running.end(number)
    async with up(tmp_path) as (running, url), Bus(url) as bus:
        await everything_is_there(bus)
        assert (await running.end(signal.SIGINT)).code == 0
    assert (tmp_path / "data" / "loom" / "loom").stat().st_mode & 0o777 == 0o700
    await until(lambda: not any(map(alive, processes)), what="nothing of the first is left")


@pytest.mark.slow
async def test_a_second_cluster_on_a_store_ends_with_the_process_and_address_of_the_first(tmp_path: Path) -> None:
    async with up(tmp_path) as (running, url):
        second = await run_loom(tmp_path, "up", "--port", "0")
        pid = running.process.pid

    assert second.code == 3
    assert f"is in use by the server of process {pid} at {url}: set NATS_URL={url} to use it" in second.err
    assert second.err.count("\n") == 1


@pytest.mark.slow
async def test_a_cluster_keeps_its_store_in_the_given_folder_or_nowhere(tmp_path: Path) -> None:
    async with up(tmp_path, "--store", str(tmp_path / "mine")) as (running, _):
        assert json.loads(running.err.splitlines()[0])["folder"] == str(tmp_path / "mine")
    async with up(tmp_path, "--ephemeral") as (running, _):
        assert json.loads(running.err.splitlines()[0])["event"] == "store_temporary"
        assert (await running.end(signal.SIGINT)).code == 0
    assert (tmp_path / "mine" / "jetstream").is_dir()
    assert not (tmp_path / "data").exists()


@pytest.mark.slow
async def test_redirected_logs_are_one_json_object_a_line(tmp_path: Path) -> None:
    async with up(tmp_path, "--ephemeral", "--processes") as (running, _):
        ended = await running.end(signal.SIGINT)

    events = [json.loads(line) for line in ended.err.splitlines()]
    assert {"sense", "adapt"} <= {event["process"] for event in events if "process" in event}
    assert ended.out == ""


# -- beyond this machine


@pytest.mark.slow
async def test_a_server_for_other_machines_requires_the_token(tmp_path: Path) -> None:
    token = "a-long-enough-token"
    async with up(tmp_path, "--ephemeral", "--host", "0.0.0.0", LOOM_TOKEN=token) as (running, url):
        with pytest.raises(BusUnavailable, match="refuses"):
            async with Bus(url):
                pass
        async with Bus(url.replace("nats://", f"nats://{token}@")) as bus:
            await bus.requests.flush()
        ended = await running.end(signal.SIGINT)
    assert ended.code == 0
    assert token not in ended.err + ended.out
