"""A whole cluster of processes, and a seeded schedule of what is killed when."""

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
"""Shortest and longest time for which a process is stopped."""


@dataclass(frozen=True)
class Kill:
    """Something is killed, or stopped, and comes back a little later."""

    after_s: float
    """Since the kill before."""
    target: str
    down_s: float
    frozen: bool = False
    """Whether the process is stopped and goes on (SIGSTOP, SIGCONT) instead of being replaced."""


def schedule(seed: int, targets: Sequence[str], kills: int, every_s: float, *, stops: bool = False) -> Iterator[Kill]:
    """Yield so many kills, the same ones for the same seed; each target is as likely as any other.

    Args:
        stops: Whether every third one stops a process for a while. The server is only killed.
    """
    dice = random.Random(seed)
    for number in range(kills):
        kill = Kill(dice.uniform(0.5, 1.5) * every_s, dice.choice(targets), dice.uniform(0, LONGEST_DOWN_S))
        if stops and number % 3 == 0 and kill.target != SERVER:
            kill = replace(kill, down_s=dice.uniform(*FROZEN_S), frozen=True)
        yield kill


@dataclass
class Member:
    """One process of the cluster, started again as often as it is killed."""

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
        """End the process and return its exit code; ended already, do nothing."""
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
        """Stop the process for so long; it goes on where it was."""
        if self.process is None:
            return
        process = self.process
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGSTOP)
            await asyncio.sleep(seconds)
            process.send_signal(signal.SIGCONT)


@dataclass
class Cast:
    """A server, phases and nodes, each in a process of its own.

    Args:
        phases: Name of a process -> the phases it runs.
        nodes: Names of node processes, one node each.
        env: For all of them.
    """

    server: NatsServer
    folder: Path
    phases: Mapping[str, Sequence[str]]
    nodes: Sequence[str]
    agents: Path
    env: Mapping[str, str] = field(default_factory=dict)
    killed: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        own = {name: value for name, value in os.environ.items() if not name.startswith(FOREIGN)}
        shared = {**own, "PYTHONPATH": str(Path(__file__).parents[1]), "NATS_URL": self.server.url, **self.env}
        self.members = {
            name: Member(("phase", "run", *words), shared, self.folder / f"{name}.log")
            for name, words in self.phases.items()
        } | {
            name: Member(
                ("host", "run", str(self.agents)), {**shared, "LEDGER_NODE": name}, self.folder / f"{name}.log"
            )
            for name in self.nodes
        }

    async def __aenter__(self) -> Self:
        await create_streams(self.server.url, self.env.get("LOOM_NAMESPACE", "loom"))
        await asyncio.gather(*(member.start() for member in self.members.values()))
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.gather(*(member.kill() for member in self.members.values()))

    @property
    def targets(self) -> list[str]:
        return [SERVER, *self.members]

    async def suffer(self, kills: Iterator[Kill]) -> None:
        """Carry out a schedule; returns when the last one killed is back."""
        async with asyncio.TaskGroup() as group:
            for kill in kills:
                await asyncio.sleep(kill.after_s)
                self.killed[f"{kill.target} stopped" if kill.frozen else kill.target] += 1
                if kill.target == SERVER:
                    await self._kill_server(kill.down_s)  # the only one: nothing else dies meanwhile
                elif kill.frozen:
                    group.create_task(self.members[kill.target].freeze(kill.down_s))
                else:
                    group.create_task(self._kill_member(self.members[kill.target], kill.down_s))

    async def _kill_server(self, down_s: float) -> None:
        await asyncio.to_thread(self.server.kill)
        await asyncio.sleep(down_s)
        await asyncio.to_thread(self.server.restart)

    async def _kill_member(self, member: Member, down_s: float) -> None:
        if member.process is None:
            return  # still down from the time before
        await member.kill()
        await asyncio.sleep(down_s)
        await member.start()
