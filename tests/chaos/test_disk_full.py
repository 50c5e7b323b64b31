"""The server's disk is full: submissions are refused, doctor reports it, and accepted tasks end."""

import asyncio
import os
import shutil
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from support.nodes import echo, node
from support.services import running_phases
from support.wait import until

from loom.bus import task_client, topology
from loom.bus.bus import Bus
from loom.bus.hops import hop_loop
from loom.bus.task_client import TaskHandle
from loom.runner.doctor.diagnosis import examine
from loom.runner.doctor.findings import Finding
from loom.runner.server.nats_server import NatsServer
from loom.runner.services import running_nodes
from loom.schemas.config import ClusterConfig
from loom.schemas.errors import Overloaded
from loom.schemas.task import TaskAd

LEFT_BYTES = 300_000


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 24 MB."""
    mount, folder = shutil.which("mount"), tmp_path / "disk"
    folder.mkdir()
    command = [mount or "mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(folder)]
    if mount is None or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("a small disk cannot be mounted: that takes root's rights")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture
async def server(disk: Path) -> AsyncIterator[NatsServer]:
    server = NatsServer(disk / "store")
    await asyncio.to_thread(server.start)
    yield server
    await asyncio.to_thread(server.stop)


def _fill(disk: Path) -> None:
    state = os.statvfs(disk)
    with (disk / "ballast").open("wb") as file:
        file.write(bytes(state.f_bavail * state.f_frsize - LEFT_BYTES))


async def _storage(bus: Bus) -> list[Finding]:
    return [each for each in await examine(bus, ClusterConfig()) if each.about == "storage"]


async def _submit_until_refused(bus: Bus, accepted: list[TaskHandle]) -> tuple[Overloaded, float]:
    """Return the refusal, and the seconds it took."""
    while True:
        asked = time.monotonic()
        try:
            accepted.append(await task_client.publish(bus, TaskAd(description="y" * 8000, domain="code")))
        except Overloaded as error:
            return error, time.monotonic() - asked


@pytest.mark.slow
@pytest.mark.timeout(120)
async def test_a_full_disk_stops_acceptance_and_loses_nothing(
    disk: Path, server: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(topology, "ACK_WAIT_S", 3)
    monkeypatch.setattr(hop_loop, "IN_PROGRESS_S", 1.0)
    accepted: list[TaskHandle] = []
    async with (
        running_phases(server.url),
        running_nodes(server.url, lambda: [node("n", echo, code=0.9)]),
        Bus(server.url) as client,
    ):
        assert [each.mark for each in await _storage(client)] == ["ok"]
        _fill(disk)
        refusal, took_s = await _submit_until_refused(client, accepted)
        assert "disk may be full" in refusal.message
        assert took_s < 20
        found = await _storage(client)
        assert {each.mark for each in found} == {"fail"}
        assert all("restart nats-server" in each.todo for each in found)

        (disk / "ballast").unlink()
        assert "fail" in {each.mark for each in await _storage(client)}  # it does not write again by itself
        await asyncio.to_thread(server.restart)
        await until(lambda: client.connection._nc.is_connected, within_s=20, what="the client is back")
        accepted.append(await task_client.publish(client, TaskAd(description="after", domain="code")))
        results = await asyncio.gather(*(handle.result(60) for handle in accepted))
        assert [each.mark for each in await _storage(client)] == ["ok"]

    assert len(accepted) > 1
    assert all(result.success for result in results)
