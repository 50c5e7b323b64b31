"""The benchmark's worlds over a real bus: six phases in this process, agents in others, one task is one run."""

import asyncio
import json
import secrets
import tempfile
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from unittest.mock import patch

from msgspec.structs import replace
from support.command import LOOM, command
from support.wait import until

from bench.learning import AGENTS, HEAD, Figures, Setting, World, play, row
from loom.bus import task_client
from loom.bus.bus import Bus
from loom.bus.natsio.transport.message import Msg
from loom.phases.match import Match
from loom.runner import log_output
from loom.runner.server.nats_server import NatsServer
from loom.runner.services import PhaseGroup
from loom.schemas.base import decode
from loom.schemas.config import ClusterConfig
from loom.schemas.learning.reward import Reward
from loom.schemas.task import TaskAd

FILE = Path(__file__).with_name("agents.py")
WITHIN_S = 60
AT_ONCE = 16
CONFIG = ClusterConfig(max_attempts=1, half_life_days=1e15)
"""One task is one run; and no time passes, as offline."""


@dataclass
class Cluster:
    """A running cluster whose agents are those of a world."""

    world: World
    url: str
    namespace: str
    folder: Path
    match: Match
    bus: Bus
    """A client's connection."""
    stack: AsyncExitStack
    winners: dict[int, int] = field(default_factory=dict)
    """Task -> agent, once its reward is out."""
    scores: dict[int, float] = field(default_factory=dict)

    async def host(self, agents: Sequence[int]) -> None:
        """Start agents in a process of their own; returns once MATCH knows them."""
        given = {"seed": self.world.seed, "agents": list(agents), "setting": asdict(self.world.setting)}
        environment = {
            "NATS_URL": self.url,
            "LOOM_NAMESPACE": self.namespace,
            "LOOM_LOG_LEVEL": "error",
            "PYTHONPATH": str(FILE.parents[1]),
            "LEARNING_WORLD": json.dumps(given),
        }
        await self.stack.enter_async_context(command(self.folder, *LOOM, "host", "run", str(FILE), **environment))
        await until(
            lambda: all(self.match._directory.host_of(str(agent)) for agent in agents),
            within_s=WITHIN_S,
            what=f"MATCH knows {agents}; {[each.read_text() for each in self.folder.glob('*.err')]}",
        )

    async def play(self, at_once: int = 1) -> list[int]:
        """Run every task and return the agent that each was awarded to.

        A task is submitted once fewer than `at_once` rewards are missing in the directory of MATCH. So a slow machine
        adds no awards without evidence.

        Args:
            at_once: Tasks in progress at a time, at least 1.
        """
        room = asyncio.Semaphore(at_once)

        async def on_reward(msg: Msg) -> None:
            reward = decode(msg.data, Reward)
            number = int(reward.task_id.removeprefix("t"))
            assert number not in self.winners, f"task {number} was rewarded twice"
            self.winners[number], self.scores[number] = int(reward.node_id), reward.score
            room.release()

        await self.bus.connection.subscribe(self.bus.subjects.of("reward", "*", "*", "*", "*"), on_reward)
        setting = self.world.setting
        for number in range(setting.tasks):
            if number == setting.join_at:
                await self.host([AGENTS])
            async with asyncio.timeout(WITHIN_S):
                await room.acquire()
            await until(self._rewards_known(at_once), within_s=WITHIN_S, what="MATCH knows the rewards")
            await self._submit(number)
        await until(lambda: len(self.winners) == setting.tasks, within_s=WITHIN_S, what="all is judged")
        return [self.winners[number] for number in range(setting.tasks)]

    def _rewards_known(self, at_once: int) -> Callable[[], bool]:
        return lambda: self.known > len(self.winners) - at_once

    @property
    def known(self) -> int:
        """Sequence of the newest reward that MATCH knows, which is their number: each task earns one reward."""
        return max((profile.last_seq for profile in self.match._directory.profiles.values()), default=0)

    async def _submit(self, number: int) -> None:
        domain = f"d{self.world.domain(number)}"
        ad = TaskAd(task_id=f"t{number}", domain=domain, description="x", estimated_complexity=0.3)
        await (await task_client.publish(self.bus, ad, deltas=False)).close()


@asynccontextmanager
async def cluster(url: str, world: World, config: ClusterConfig = CONFIG) -> AsyncIterator[Cluster]:
    """Run six phases, and the agents of a world in two processes, in a namespace of their own."""
    namespace = f"t{secrets.token_hex(4)}"
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        bus = await stack.enter_async_context(Bus(url, namespace=namespace))
        own = await stack.enter_async_context(Bus(url, namespace=namespace, role="phases"))
        phases = PhaseGroup(own, config=config)
        stack.push_async_callback(phases.drain)
        await phases.start()
        match = next(service for service in phases._started if isinstance(service, Match))
        running = Cluster(world, url, namespace, folder, match, bus, stack)
        half = AGENTS // 2
        await asyncio.gather(running.host(range(half)), running.host(range(half, AGENTS)))
        yield running


async def one_at_a_time(url: str, world: World, policy: str = "glr_ucb") -> list[int]:
    """Return whom a policy awards each task of a world to, when nothing is under way meanwhile and all are free."""
    with patch("loom.phases.match.scoring.AWARD_TO_RUN_S", 0.0):  # an award of a moment ago is over, and is not a load
        async with cluster(url, world, replace(CONFIG, policy=policy)) as running:
            return await running.play()


async def side_by_side(url: str, world: World, policy: str = "glr_ucb", *, at_once: int = AT_ONCE) -> list[int]:
    """Return the agent that a policy awards each task to, with `at_once` tasks in progress at a time."""
    async with cluster(url, world, replace(CONFIG, policy=policy)) as running:
        return await running.play(at_once)


async def compare(policies: Sequence[str], settings: Sequence[Setting], seeds: Sequence[int]) -> None:
    """Print what the policies do over a bus, next to what they do without one."""
    log_output.configure("error")
    print(HEAD)
    server = NatsServer()
    server.start()
    try:
        for setting in settings:
            worlds = [World(seed, setting) for seed in seeds]
            for policy in policies:
                offline = [play(policy, world) for world in worlds]
                serial = [await one_at_a_time(server.url, world, policy) for world in worlds]
                at_once = [await side_by_side(server.url, world, policy) for world in worlds]
                same = sum(a == b for a, b in zip(offline, serial, strict=True))
                for how, played in (("offline", offline), ("1 at once", serial), (f"{AT_ONCE} at once", at_once)):
                    figures = [Figures.of(world, winners) for world, winners in zip(worlds, played, strict=True)]
                    print(row(how, setting, figures), flush=True)
                print(f"{policy}: one at a time picks as offline in {same} of {len(worlds)} worlds", flush=True)
    finally:
        server.stop()
