"""The processes of one measured system: a server, phases, hosts and submitters."""

import asyncio
import json
import os
import sys
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from support.command import FOREIGN, command

from bench.measure import Load
from loom.runner.server.nats_server import NatsServer

TESTS = Path(__file__).parents[2]
ROOT = TESTS.parent
READY_S = 120
ROLES = ("phases", "hosts", "server", "submitter")
"""First words of the names of processes."""


@dataclass(frozen=True)
class Checkout:
    """A copy of the project with a virtual environment of its own."""

    path: Path = ROOT

    @property
    def python(self) -> str:
        """The interpreter that imports loom from this copy."""
        own = self.path / ".venv/bin/python"
        return str(own) if own.exists() else sys.executable


class SubmitterProcess:
    """A process that submits tasks on order."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self._stdin, self._stdout = process.stdin, process.stdout

    async def carry(self, tasks: int, in_flight: int) -> tuple[list[float], Mapping[str, int]]:
        """Return the time of each task, in seconds, and the number of failed tasks by code."""
        self._stdin.write(json.dumps({"tasks": tasks, "in_flight": in_flight}).encode() + b"\n")
        outcome = json.loads(await self._stdout.readline() or b"null")
        if outcome is None:
            raise RuntimeError("the submitter has ended; its standard error has the reason")
        return outcome["times_s"], outcome["failures"]


class ProcessGroup:
    """Starts the processes of a system on one server, and gives their submitters tasks to carry."""

    def __init__(self, server: NatsServer, checkout: Checkout, folder: Path, stack: AsyncExitStack) -> None:
        self.processes = {"server": server.pid}
        self.url = server.url
        self.failures: Counter[str] = Counter()
        """Code of an error -> tasks that have failed with it so far."""
        self._checkout, self._folder, self._stack = checkout, folder, stack
        self._submitters: list[SubmitterProcess] = []

    async def start(self, name: str, file: Path, *words: str, namespace: str = "loom") -> None:
        """Start a Python program of the benchmark; return once it has printed that it is ready."""
        environment = self._environment(namespace)
        arguments = (self._checkout.python, str(file), *words)
        running = await self._stack.enter_async_context(command(self._folder, *arguments, **environment))
        async with asyncio.timeout(READY_S):
            await running.wait_for_output("ready\n")
        self.processes[name] = running.process.pid

    async def start_submitter(self, name: str, file: Path, *words: str, namespace: str = "loom") -> None:
        """Start a program that reads orders on its standard input."""
        own = {variable: value for variable, value in os.environ.items() if not variable.startswith(FOREIGN)}
        process = await asyncio.create_subprocess_exec(
            self._checkout.python,
            str(file),
            *words,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            limit=1 << 26,
            env=own | self._environment(namespace),
        )
        self._stack.push_async_callback(_kill, process)
        assert process.stdout is not None
        async with asyncio.timeout(READY_S):
            if await process.stdout.readline() != b"ready\n":
                raise RuntimeError(f"{file.name} has not started; its standard error has the reason")
        self.processes[name] = process.pid
        self._submitters.append(SubmitterProcess(process))

    async def carry(self, tasks: int, at_once: int) -> list[float]:
        """Carry tasks by all submitters at the same time, in equal shares, and return the time of each task."""
        count = len(self._submitters)
        shares = [(_share(tasks, count, number), _share(at_once, count, number)) for number in range(count)]
        outcomes = await asyncio.gather(
            *(
                submitter.carry(share, max(in_flight, 1))
                for submitter, (share, in_flight) in zip(self._submitters, shares, strict=True)
                if share
            )
        )
        for _, failures in outcomes:
            self.failures.update(failures)
        return [time_s for times_s, _ in outcomes for time_s in times_s]

    def _environment(self, namespace: str) -> dict[str, str]:
        return {
            "NATS_URL": self.url,
            "LOOM_NAMESPACE": namespace,
            "LOOM_LOG_LEVEL": "error",
            "PYTHONPATH": os.pathsep.join((str(self._checkout.path), str(TESTS))),
        }


@asynccontextmanager
async def process_group(checkout: Checkout) -> AsyncIterator[ProcessGroup]:
    """Run a server, and the processes that the body starts with the checkout's Python."""
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        server = NatsServer()
        stack.callback(server.stop)
        server.start()
        yield ProcessGroup(server, checkout, folder, stack)


def cpu_by_role(figures: Load) -> Mapping[str, float]:
    """Return the CPU time for each task, in µs, of phases, hosts, server and submitters."""
    return {role: sum(took for name, took in figures.cpu_us.items() if name.split()[0] == role) for role in ROLES}


def _share(total: int, count: int, number: int) -> int:
    return total // count + (number < total % count)


async def _kill(process: asyncio.subprocess.Process) -> None:
    if process.returncode is None:
        process.kill()
    await process.wait()
