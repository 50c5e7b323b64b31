"""A cluster of processes, and a seeded schedule of kills."""

import asyncio
import contextlib
import os
import random
import signal
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Self

from loom.runner.server.nats_server import NatsServer
from support.command import FOREIGN
from support.streams import create_streams

SERVER = "server"
LONGEST_DOWN_S = 1.5
FROZEN_S = (5.0, 40.0)
"""Shortest and longest seconds for which a process is stopped."""


@dataclass(frozen=True)
class Kill:
    """One fault: a target is killed and restarted later, or stopped and continued later."""

    after_s: float
    """Seconds since the previous kill."""
    target: str
    down_s: float
    frozen: bool = False
    """Whether the process is stopped and goes on (SIGSTOP, SIGCONT) instead of being replaced."""


def schedule(seed: int, targets: Sequence[str], kills: int, every_s: float, *, stops: bool = False) -> Iterator[Kill]:
    """Yield `kills` faults, the same ones for the same random seed; every target is equally likely.

    Args:
        seed: Start of the random numbers.
        targets: Names of processes; `server` is the NATS server.
        kills: Number of faults.
        every_s: Mean seconds between two faults.
        stops: Whether every third fault stops a process for a while. The server is only killed.
    """
    rng = random.Random(seed)
    for number in range(kills):
        kill = Kill(rng.uniform(0.5, 1.5) * every_s, rng.choice(targets), rng.uniform(0, LONGEST_DOWN_S))
        if stops and number % 3 == 0 and kill.target != SERVER:
            kill = replace(kill, down_s=rng.uniform(*FROZEN_S), frozen=True)
        yield kill


@dataclass
class ClusterProcess:
    """One process of the cluster, which can be killed, stopped and started again."""

    words: Sequence[str]
    env: Mapping[str, str]
    log: Path
    process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        with self.log.open("ab") as log:
            self.process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "support.quick_loom", *self.words, stdout=log, stderr=log, env=self.env
            )

    async def kill(self, number: signal.Signals = signal.SIGKILL) -> int:
        """Send a signal to the process and return its exit code, or 0 if it has ended already."""
        if self.process is None:
            return 0
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(number)
        process, self.process = self.process, None
        return await process.wait()

    @property
    def running(self) -> bool:
        """Whether the process was started and has not ended."""
        return self.process is not None and self.process.returncode is None

    async def freeze(self, seconds: float) -> None:
        """Stop the process for that time, then continue it."""
        if self.process is None:
            return
        process = self.process
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGSTOP)
            await asyncio.sleep(seconds)
            process.send_signal(signal.SIGCONT)


@dataclass
class ProcessCluster:
    """A server, phases and nodes, each in a process of its own.

    Args:
        server: A running server, which the schedule may kill.
        folder: Where each process writes its log.
        phases: Name of a process -> the phases it runs.
        nodes: Names of node processes, one node each.
        agents: The file of agents that each node process loads.
        env: Environment of all processes.
    """

    server: NatsServer
    folder: Path
    phases: Mapping[str, Sequence[str]]
    nodes: Sequence[str]
    agents: Path
    env: Mapping[str, str] = field(default_factory=dict)
    killed: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(FOREIGN)}
        shared = {**inherited, "PYTHONPATH": str(Path(__file__).parents[1]), "NATS_URL": self.server.url, **self.env}
        self.processes = {
            name: ClusterProcess(("phase", "run", *words), shared, self.folder / f"{name}.log")
            for name, words in self.phases.items()
        } | {
            name: ClusterProcess(
                ("host", "run", str(self.agents)), {**shared, "TEST_NODE_ID": name}, self.folder / f"{name}.log"
            )
            for name in self.nodes
        }

    async def __aenter__(self) -> Self:
        await create_streams(self.server.url, self.env.get("LOOM_NAMESPACE", "loom"))
        await asyncio.gather(*(process.start() for process in self.processes.values()))
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.gather(*(process.kill() for process in self.processes.values()))

    @property
    def targets(self) -> list[str]:
        return [SERVER, *self.processes]

    async def run_schedule(self, kills: Iterator[Kill]) -> None:
        """Run a schedule, and return when the last killed process has been restarted."""
        async with asyncio.TaskGroup() as group:
            for kill in kills:
                await asyncio.sleep(kill.after_s)
                self.killed[f"{kill.target} stopped" if kill.frozen else kill.target] += 1
                if kill.target == SERVER:
                    await self._kill_server(kill.down_s)  # there is one server: no other process is killed meanwhile
                elif kill.frozen:
                    group.create_task(self.processes[kill.target].freeze(kill.down_s))
                else:
                    group.create_task(self._kill_process(self.processes[kill.target], kill.down_s))

    async def _kill_server(self, down_s: float) -> None:
        await asyncio.to_thread(self.server.kill)
        await asyncio.sleep(down_s)
        await asyncio.to_thread(self.server.restart)

    async def _kill_process(self, process: ClusterProcess, down_s: float) -> None:
        if process.process is None:
            return  # still down after the previous kill
        await process.kill()
        await asyncio.sleep(down_s)
        await process.start()
