"""Trust learned by the whole loop in nodes that fail, stay silent or never answer, and in a world of the benchmark."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import replace

import pytest
from bench.learning import Figures, Setting, World, play
from bench.over_bus import one_at_a_time, side_by_side
from support.fake_host import FakeHost
from support.nodes import echo, fail, node
from support.services import QUICK_START, running_phases
from support.wait import until

from loom.bus import task_client
from loom.bus.bus import Bus
from loom.bus.natsio.transport.message import Msg
from loom.bus.records import records
from loom.phases.execute.timings import ExecuteTimings
from loom.runner.services import running_nodes
from loom.schemas.auction import Bid
from loom.schemas.base import decode
from loom.schemas.config import ClusterConfig
from loom.schemas.envelope import Spec
from loom.schemas.errors import InvalidTask
from loom.schemas.learning.reward import Reward
from loom.schemas.run import RunRequest
from loom.schemas.task import TaskAd, TaskResult

WITHIN_S = 30
AT_ONCE = 4


class Rewards:
    """Return the rewards of every node, in order."""

    def __init__(self) -> None:
        self.all: list[Reward] = []

    async def start(self, bus: Bus) -> None:
        await bus.connection.subscribe(bus.subjects.of("reward", "*", "*", "*", "*"), self._note)

    async def _note(self, msg: Msg) -> None:
        self.all.append(decode(msg.data, Reward))

    def scores(self, node_id: str) -> list[float]:
        return [reward.score for reward in self.all if reward.node_id == node_id]


class LearningCluster:
    """Phases that retry soon and drop a silent host soon."""

    def __init__(self, bus: Bus, url: str, namespace: str, stack: AsyncExitStack) -> None:
        self.bus, self.url, self.namespace = bus, url, namespace
        self.rewards = Rewards()
        self._stack = stack

    async def host(self, *nodes: object) -> None:
        await self._stack.enter_async_context(running_nodes(self.url, lambda: nodes, namespace=self.namespace))  # type: ignore[arg-type,return-value]

    async def silent_host(self, node_id: str, claim: float) -> None:
        """A host that bids and never answers a run request."""
        bus = await self._stack.enter_async_context(Bus(self.url, namespace=self.namespace, role="node"))
        host = FakeHost(bus, f"{node_id}-host", (node_id,))
        host.offer = lambda _call: host.bids(Bid(node_id=node_id, self_rating=claim))
        await host.start()

    async def work(self, count: int, *, timeout_s: float = 30.0) -> list[TaskResult]:
        """Run a number of tasks, four at once, and return their results."""
        room = asyncio.Semaphore(AT_ONCE)

        async def one(number: int) -> TaskResult:
            async with room:
                ad = TaskAd(domain="code", description=f"task {number}", estimated_complexity=0.2, timeout_s=timeout_s)
                return await (await task_client.publish(self.bus, ad, deltas=False)).result(WITHIN_S)

        return list(await asyncio.gather(*map(one, range(count))))


@pytest.fixture
async def cluster(nats_url: str, namespace: str) -> AsyncIterator[LearningCluster]:
    timings = replace(QUICK_START, execute=ExecuteTimings(accept_s=0.3))
    async with AsyncExitStack() as stack:
        config = ClusterConfig(max_attempts=4)
        await stack.enter_async_context(running_phases(nats_url, namespace=namespace, config=config, timings=timings))
        bus = await stack.enter_async_context(Bus(nats_url, namespace=namespace))
        here = LearningCluster(bus, nats_url, namespace, stack)
        await here.rewards.start(bus)
        yield here


async def empty(_job: RunRequest) -> str:
    return "  "


async def call_invalid(_job: RunRequest) -> str:
    raise InvalidTask("the file sales.csv does not exist", field="context.file")


async def hang(_job: RunRequest) -> str:
    await asyncio.Event().wait()
    return "never"


@pytest.mark.slow
async def test_a_node_that_fails_or_is_silent_loses_its_share_and_earns_no_success(cluster: LearningCluster) -> None:
    await cluster.host(node("failing", fail, code=0.9), node("empty", empty, code=0.9))
    await cluster.silent_host("silent", 0.9)
    await cluster.host(node("good", echo, code=0.5))
    results = await cluster.work(80)

    assert {result.node_id for result in results if result.success} == {"good"}
    assert all(result.success for result in results)
    for name in ("failing", "empty", "silent"):
        scores = cluster.rewards.scores(name)
        assert 1 <= len(scores) <= 30, name
        assert set(scores) == {0.0}, name
    assert set(cluster.rewards.scores("good")) == {1.0}
    firsts = [reward.node_id for reward in cluster.rewards.all if reward.attempt == 1]
    assert firsts[-40:].count("good") >= 30, firsts


async def test_an_invalid_task_fails_after_two_nodes_and_costs_them_nothing(cluster: LearningCluster) -> None:
    await cluster.host(*(node(name, call_invalid, code=0.9) for name in ("ann", "bob", "eve")))
    results = await cluster.work(5)

    for result in results:
        assert result.error is not None
        assert (result.error.code, result.error.field) == ("invalid_task", "context.file")
        assert result.error.message == "the file sales.csv does not exist"
        assert result.attempts == 2
    assert cluster.rewards.all == []


async def test_a_node_that_rejects_every_ad_loses_its_share_like_a_failing_one(cluster: LearningCluster) -> None:
    await cluster.host(node("refusing", call_invalid, code=0.9), node("good", echo, code=0.5))
    results = await cluster.work(40)

    assert {result.node_id for result in results} == {"good"}
    assert all(result.success for result in results)
    assert set(cluster.rewards.scores("refusing")) == {0.0}
    assert len(cluster.rewards.scores("refusing")) <= 15
    assert set(cluster.rewards.scores("good")) == {1.0}


@pytest.mark.slow
async def test_a_node_that_hangs_until_the_deadline_loses_its_share(cluster: LearningCluster) -> None:
    await cluster.host(node("hanging", hang, code=0.9), node("good", echo, code=0.5))
    results = await cluster.work(20, timeout_s=0.5)
    ends = Counter(result.success for result in results)

    assert set(cluster.rewards.scores("hanging")) == {0.0}
    assert ends[True] >= 8
    assert all(result.success for result in results[-4:])


@pytest.mark.slow
@pytest.mark.timeout(240)
async def test_one_task_at_a_time_the_bus_picks_exactly_as_the_policy_does_offline(nats_url: str) -> None:
    world = World(4001, Setting(tasks=300))

    assert await one_at_a_time(nats_url, world) == play("glr_ucb", world)


@pytest.mark.slow
@pytest.mark.timeout(240)
async def test_sixteen_tasks_at_once_learn_hardly_less_than_one_at_a_time(nats_url: str) -> None:
    world = World(4002, Setting(tasks=600))
    offline, guessing = (Figures.of(world, play(name, world)).regret for name in ("glr_ucb", "random"))
    regret = Figures.of(world, await side_by_side(nats_url, world)).regret

    assert regret < 2 * offline
    assert regret < 0.75 * guessing


@pytest.mark.slow
@pytest.mark.timeout(400)
async def test_a_dishonest_bidder_hardly_wins_over_the_bus(nats_url: str) -> None:
    """An agent that claims 1.0 and succeeds in 20 % wins at most 5 % of later tasks; by chance it would win 12 %."""
    world = World(4003, Setting(tasks=1200, dishonest=True))

    winners = await side_by_side(nats_url, world, at_once=4)  # 16 awards in a burst would be made without evidence

    assert winners[-600:].count(world.boaster) <= 30


async def test_a_domains_bias_is_read_under_the_key_it_is_written_under(cluster: LearningCluster) -> None:
    """The bias applies to every spelling of the domain, and to no other domain."""
    await cluster.host(node("quick", echo))

    async def guess(domain: str) -> Spec:
        text = "Read the contract, list every clause that names a date, and say which of them is the next to come."
        ad = TaskAd(domain=domain, description=text)
        assert (await (await task_client.publish(cluster.bus, ad, deltas=False)).result(WITHIN_S)).success
        entry = await records(cluster.bus).get(ad.task_id)
        assert entry is not None
        assert entry.value.envelope.spec is not None
        return entry.value.envelope.spec

    async def corrected() -> Spec | None:
        spec = await guess("contract  law".upper())
        return spec if spec.complexity != spec.estimated else None

    first = await guess("Contract  Law")
    assert first.complexity == first.estimated
    assert first.complexity > 0
    later = await until(corrected, within_s=WITHIN_S, what="a guess is corrected")
    assert later is not None
    assert later.complexity < first.complexity
    other = await guess("tax law")
    assert other.complexity == other.estimated
