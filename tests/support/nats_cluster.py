"""Three nats-servers that replicate each other's streams, to be killed and restarted one by one."""

import asyncio
import json
import os
import shutil
import signal
import socket
import tempfile
import urllib.request
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any

from loom.bus.bus import Bus
from loom.runner.server.nats_server import _await_ports, _Guard, find_server
from loom.runner.server.server_config import server_config
from loom.schemas.errors import BusUnavailable, LoomError
from support.wait import until

NAMES = ("n1", "n2", "n3")
RAM_DISK = Path("/dev/shm")
START_TRIES = 5  # another process may take a port between our looking and the server's listening


class Member:
    """One of the servers; the guard of the embedded server ends it with this process, however that goes."""

    def __init__(self, name: str, folder: Path, ports: dict[str, int], routes: list[int]) -> None:
        self.name = name
        self.port, self._http = ports["client"], ports["http"]
        self._folder = folder
        self._guard: _Guard | None = None
        self._pid = 0
        binary, version = find_server()
        config = folder / "cluster.conf"
        listed = ", ".join(f'"nats://127.0.0.1:{port}"' for port in routes)
        config.parent.mkdir(parents=True)
        config.write_text(
            server_config(version, None, "")
            + f'server_name: {name}\nhttp: "127.0.0.1:{self._http}"\n'
            + f'cluster {{ name: tests, listen: "127.0.0.1:{ports["route"]}", routes: [{listed}] }}\n'
        )
        self._command = [binary, "-c", str(config), "-a", "127.0.0.1", "-p", str(self.port), "-js"]

    def start(self) -> None:
        ports = Path(tempfile.mkdtemp(prefix="ports-", dir=self._folder))
        store = self._folder / "store"
        words = [*self._command, "-sd", str(store), "--ports_file_dir", str(ports)]
        with (self._folder / "lock").open("w") as lock:
            self._guard = _Guard(self._folder, lock.fileno(), words)
        _, self._pid = _await_ports(ports, self._guard)

    def kill(self) -> None:
        os.kill(self._pid, signal.SIGKILL)

    def end(self, *, keep_folder: bool = False) -> None:
        guard, self._guard = self._guard, None
        if guard is not None:
            guard.end(self._pid, keep_folder=keep_folder)

    def looks(self, page: str) -> dict[str, Any]:
        """Return a monitoring page of the server; empty when it does not answer."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self._http}/{page}", timeout=2) as answer:
                parsed: dict[str, Any] = json.load(answer)
        except (OSError, ValueError):
            return {}
        return parsed


class NatsCluster:
    """Three servers on 127.0.0.1, each with a private store; `start` returns once they have a leader."""

    def __init__(self) -> None:
        self.members: dict[str, Member] = {}
        self._folder: Path | None = None

    @property
    def url(self) -> str:
        """All three addresses, as NATS_URL takes them."""
        return ",".join(f"nats://127.0.0.1:{member.port}" for member in self.members.values())

    async def start(self) -> None:
        for left in reversed(range(START_TRIES)):
            try:
                await asyncio.to_thread(self._launch)
            except BusUnavailable:
                self.stop()
                if not left:
                    raise
            else:
                break
        await self.ready()

    def _launch(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="loom-cluster-", dir=RAM_DISK if RAM_DISK.is_dir() else None))
        ports = {name: dict(zip(("client", "route", "http"), free, strict=True)) for name, free in _free_ports()}
        routes = [each["route"] for each in ports.values()]
        for name in NAMES:
            self.members[name] = Member(name, self._folder / name, ports[name], routes)
        for member in self.members.values():
            member.start()

    def stop(self) -> None:
        for member in self.members.values():
            member.end()
        self.members = {}
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def kill(self, name: str) -> None:
        """Kill one server without warning, as a crash would."""
        self.members[name].kill()

    async def restart(self, name: str) -> None:
        """Bring one server up again, on its ports and its store; it may have yet to catch up."""
        member = self.members[name]
        await asyncio.to_thread(member.end, keep_folder=True)
        await asyncio.to_thread(member.start)

    async def ready(self) -> None:
        """Wait until all three have found a leader, and each is as far as it."""
        await until(self._all_healthy, within_s=30, what="the servers have a leader and are level with it")

    async def _all_healthy(self) -> bool:
        pages = await asyncio.gather(*(asyncio.to_thread(m.looks, "jsz") for m in self.members.values()))
        metas = [page.get("meta_cluster", {}) for page in pages]
        first = metas[0].get("leader")
        if not first or any(meta.get("leader") != first for meta in metas):
            return False
        seen = metas[NAMES.index(first)].get("replicas") or []  # only the leader knows of all others
        if len(seen) != len(NAMES) - 1 or not all(each.get("current") for each in seen):
            return False
        health = await asyncio.gather(*(asyncio.to_thread(m.looks, "healthz") for m in self.members.values()))
        return all(page.get("status") == "ok" for page in health)


async def leader(bus: Bus, stream: str, *, other_than: str = "", within_s: float = 30) -> str:
    """Wait for a stream to have a leader and return its name."""

    async def asked() -> str:
        with suppress(LoomError):
            info = await bus.jetstream.api(f"STREAM.INFO.{stream}", timeout_s=2)
            name = str((info.get("cluster") or {}).get("leader", ""))
            return "" if name == other_than else name
        return ""

    return await until(asked, within_s=within_s, what=f"{stream} has a leader")


@asynccontextmanager
async def nats_cluster() -> AsyncIterator[NatsCluster]:
    """Run a cluster for the length of the block."""
    cluster = NatsCluster()
    try:
        await cluster.start()
        yield cluster
    finally:
        await asyncio.to_thread(cluster.stop)


def _free_ports() -> Iterator[tuple[str, list[int]]]:
    with ExitStack() as stack:
        for name in NAMES:
            socks = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(3)]
            yield name, [sock.getsockname()[1] for sock in socks]
