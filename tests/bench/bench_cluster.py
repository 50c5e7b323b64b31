"""A cluster of processes for benchmarks: a server, phases in one process or in six, two node hosts."""

import os
import sys
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

from support.command import Command, command

from bench.measure import closed_loop
from bench.raw_pipe import FILLER_BYTES
from loom.bus import task_client
from loom.bus.bus import Bus
from loom.runner.server.nats_server import NatsServer
from loom.schemas.base import decode
from loom.schemas.envelope import PHASES
from loom.schemas.task import TaskAd, TaskResult

HERE = Path(__file__).parent
PROFILED = (sys.executable, str(HERE / "profiled.py"))
RUN_PHASES = (sys.executable, str(HERE / "checkout/run_phases.py"))
RUN_HOSTS = (sys.executable, str(HERE / "checkout/run_hosts.py"))
READY = "ready\n"
"""Output of these programs once they work."""
HOSTS = 2
SLOTS = 512
"""Runs at once on each node: more than come, so that no task waits for a place."""
WITHIN_S = 60


class BenchCluster:
    """A running cluster, and a client of it in this process."""

    def __init__(self, url: str, server_pid: int, folder: Path, stack: AsyncExitStack, **environment: str) -> None:
        self.processes = {"server": server_pid}
        self.url = url
        self.bus: Bus
        self.by_request = False
        """Whether tasks are handed in by a request to `loom.submit`, instead of being stored and followed."""
        self._folder, self._stack = folder, stack
        self._environment = {
            "NATS_URL": url,
            "LOOM_NAMESPACE": "loom",
            "PYTHONPATH": os.pathsep.join(str(folder) for folder in HERE.parents[:2]),  # this tree's loom
            **environment,
        }

    async def start(self, name: str, *words: str, output: str, **environment: str) -> Command:
        """Start a process and return once it prints that output."""
        running = await self._stack.enter_async_context(
            command(
                self._folder,
                *words,
                **self._environment,
                **environment,
            )
        )
        await running.wait_for_output(output)
        self.processes[name] = running.process.pid
        return running

    async def phases(self, *, together: bool = True, profile: Path | None = None) -> None:
        """Start the six phases, in one process or in one each."""
        if together:
            program, environment = RUN_PHASES, {}
            if profile is not None:
                program, environment = PROFILED, {"BENCH_PROFILE": str(profile)}
            await self.start("phases", *program, *PHASES, output=READY, **environment)
            return
        for phase in PHASES:
            await self.start(phase, *RUN_PHASES, phase, output=READY)

    async def hosts(self) -> None:
        """Start two hosts with an agent each that does nothing."""
        for number in range(1, HOSTS + 1):
            await self.start(f"host {number}", *RUN_HOSTS, f"n{number}", "1", "1", "0", output=READY)

    async def connect(self) -> None:
        """Connect the client, and begin to count what this process takes."""
        self.bus = await self.connection(role="client")
        self.processes["submitter"] = os.getpid()

    async def connection(self, *, role: str) -> Bus:
        """Return one more connection of this process, closed with the cluster."""
        return await self._stack.enter_async_context(Bus(self.url, role=role))

    async def carry(self, count: int, at_once: int) -> list[float]:
        return await closed_loop(self._ask if self.by_request else self._publish, count, at_once)

    async def _publish(self) -> None:
        handle = await task_client.publish(self.bus, ad(), deltas=False)
        result = await handle.result(WITHIN_S)
        if not result.success:
            raise RuntimeError(f"a task failed: {result.error}")

    async def _ask(self) -> None:
        """Hand a task in as a client of any language does."""
        answer = await self.bus.requests.request(self.bus.subjects.submit, ad(), timeout_s=WITHIN_S)
        if not decode(answer.data, TaskResult).success:
            raise RuntimeError(f"a task failed: {answer.data!r}")


def ad(*, timeout_s: float = 300.0) -> TaskAd:
    return TaskAd(domain="code", description="x" * FILLER_BYTES, estimated_complexity=0.3, timeout_s=timeout_s)


@asynccontextmanager
async def bench_cluster() -> AsyncIterator[BenchCluster]:
    """Run a server, and the processes that the body starts."""
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        server = NatsServer()
        stack.callback(server.stop)
        server.start()
        yield BenchCluster(server.url, server.pid, folder, stack)


@asynccontextmanager
async def whole_loop(
    *, together: bool = True, by_request: bool = False, profile: Path | None = None
) -> AsyncIterator[BenchCluster]:
    """Run a cluster whose phases are in one process or in six."""
    async with bench_cluster() as running:
        await running.phases(together=together, profile=profile)
        await running.hosts()
        await running.connect()
        running.by_request = by_request
        yield running


def of_phases(processes: Sequence[str]) -> list[str]:
    """Return those of the processes that run phases."""
    return [name for name in processes if name == "phases" or name in PHASES]
