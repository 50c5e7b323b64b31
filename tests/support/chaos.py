"""A whole cluster of processes, and a seeded schedule of what is killed when."""

import asyncio
import contextlib
import os
import random
import signal
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from loom.runner.embedded import NatsServer
from support.command import FOREIGN

SERVER = "server"
LONGEST_DOWN_S = 1.5


@dataclass(frozen=True)
class Kill:
    """Something is killed, and comes back a little later."""

    after_s: float
    """Since the kill before."""
    target: str
    down_s: float


def schedule(seed: int, targets: Sequence[str], kills: int, every_s: float) -> Iterator[Kill]:
    """Yield so many kills, the same ones for the same seed; each target is as likely as any other."""
    dice = random.Random(seed)
    for _ in range(kills):
        yield Kill(dice.uniform(0.5, 1.5) * every_s, dice.choice(targets), dice.uniform(0, LONGEST_DOWN_S))


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
            name: Member(("phase", *words), shared, self.folder / f"{name}.log") for name, words in self.phases.items()
        } | {
            name: Member(("node", str(self.agents)), {**shared, "LEDGER_NODE": name}, self.folder / f"{name}.log")
            for name in self.nodes
        }

    async def __aenter__(self) -> Self:
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
                self.killed[kill.target] += 1
                if kill.target == SERVER:
                    await self._kill_server(kill.down_s)  # the only one: nothing else dies meanwhile
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
