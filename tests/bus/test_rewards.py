"""The RewardBus as a topic: any client may publish, subscribe, and replay the past."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing

import pytest
from support.bus_helpers import Connect
from support.logs import capture_logs
from support.wait import until

from loom.bus import topology
from loom.bus.bus import Bus
from loom.bus.rewards import RewardBus
from loom.compat import reward_formulas as formulas
from loom.schemas.errors import BusUnavailable, InvalidTask
from loom.schemas.learning.reward import Reward
from loom.schemas.task import TaskAd
from loom.schemas.tokens import domain_token


def reward(
    n: int = 0, *, node_id: str = "n1", domain: str = "code", score: float = 1.0, source: str = "rules"
) -> Reward:
    return Reward(
        reward_id=f"t{n}:1:{source}",
        task_id=f"t{n}",
        attempt=1,
        source=source,
        node_id=node_id,
        domain_token=domain_token(domain),
        score=score,
        ended_at=float(n),
    )


@pytest.fixture
def rewards(bus: Bus) -> RewardBus:
    return RewardBus(bus=bus)


async def replayed(rewards: RewardBus, **only: str) -> list[Reward]:
    async with asyncio.timeout(10):
        return [one async for one in rewards.replay(**only)]


class Listener:
    """Collects the rewards of a subscription."""

    def __init__(self, stream: AsyncIterator[Reward]) -> None:
        self.got: list[Reward] = []
        self._task = asyncio.create_task(self._listen(stream))

    async def _listen(self, stream: AsyncIterator[Reward]) -> None:
        async for one in stream:
            self.got.append(one)

    async def stop(self) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)


async def listening(bus: Bus, count: int) -> None:
    """Wait until so many readers have their consumers."""

    async def have_consumers() -> bool:
        names = (await bus.jetstream.api(f"CONSUMER.NAMES.{bus.subjects.stream('REWARDS')}"))["consumers"] or []
        return len(names) >= count

    await until(have_consumers, what=f"{count} readers")


async def test_a_reward_is_published_and_replayed_unchanged(rewards: RewardBus) -> None:
    await rewards.publish(reward(1))
    await rewards.publish(reward(2, score=0.25))
    assert await replayed(rewards) == [reward(1), reward(2, score=0.25)]


async def test_the_same_reward_twice_counts_once_and_a_revised_one_is_a_new_message(
    bus: Bus, rewards: RewardBus
) -> None:
    await rewards.publish(reward(1))
    await rewards.publish(reward(1))
    await rewards.publish(reward(1, score=1))  # the same number, written otherwise
    assert (await topology.stream_state(bus, "REWARDS"))["messages"] == 1
    await rewards.publish(reward(1, score=0.5))
    assert [one.score for one in await replayed(rewards)] == [1.0, 0.5]
    await rewards.publish(reward(1, source="judge"))
    assert (await topology.stream_state(bus, "REWARDS"))["messages"] == 3


async def test_a_replay_of_nothing_ends(rewards: RewardBus) -> None:
    assert await replayed(rewards) == []


async def test_a_replay_is_complete_however_slowly_it_is_read(rewards: RewardBus) -> None:
    total = 1100  # more than a pull's window
    await asyncio.gather(*(rewards.publish(reward(n)) for n in range(total)))
    seen: list[str] = []
    async with asyncio.timeout(30):
        async for one in rewards.replay():
            if len(seen) % 100 == 0:
                await asyncio.sleep(0.02)  # meanwhile more arrives than has been yielded
            seen.append(one.reward_id)
    assert len(seen) == total
    assert len(set(seen)) == total


async def test_a_replay_may_be_of_one_node_or_one_domain(rewards: RewardBus) -> None:
    for one in (reward(1), reward(2, node_id="n2"), reward(3, domain="数据"), reward(4, domain="代码")):
        await rewards.publish(one)
    assert [one.task_id for one in await replayed(rewards, node_id="n2")] == ["t2"]
    assert [one.task_id for one in await replayed(rewards, domain="Code")] == ["t1", "t2"]
    assert [one.task_id for one in await replayed(rewards, domain="数据")] == ["t3"]
    assert [one.task_id for one in await replayed(rewards, node_id="n1", domain="代码")] == ["t4"]
    assert await replayed(rewards, node_id="n3") == []


async def test_subscribers_receive_new_rewards_of_a_node_or_a_domain_or_all(
    bus: Bus, rewards: RewardBus, connect: Connect
) -> None:
    await rewards.publish(reward(1))
    elsewhere = RewardBus(bus=await connect())
    everything = Listener(elsewhere.subscribe())
    one_node = Listener(elsewhere.subscribe(node_id="n2"))
    one_domain = Listener(elsewhere.subscribe(domain="代码"))
    await listening(bus, 3)
    for one in (reward(2), reward(3, node_id="n2"), reward(4, domain="代码"), reward(5, domain="数据")):
        await rewards.publish(one)
    await until(lambda: len(everything.got) == 4, what="all four rewards")
    assert [one.task_id for one in everything.got] == ["t2", "t3", "t4", "t5"]
    await until(lambda: one_node.got and one_domain.got, what="rewards of one node and one domain")
    assert [one.task_id for one in one_node.got] == ["t3"]
    assert [one.task_id for one in one_domain.got] == ["t4"]
    for listener in (everything, one_node, one_domain):
        await listener.stop()


async def test_an_unreadable_reward_is_left_out_and_logged(bus: Bus, rewards: RewardBus) -> None:
    await bus.jetstream.publish(bus.subjects.of("reward", "rules", "local", "n1", "code"), b"nonsense")
    await rewards.publish(reward(1))
    with capture_logs() as logs:
        assert [one.task_id for one in await replayed(rewards)] == ["t1"]
    assert [entry["event"] for entry in logs] == ["reward_undecodable"]


async def test_a_listener_that_leaves_early_leaves_nothing_behind(bus: Bus, rewards: RewardBus) -> None:
    before = len(bus.connection._nc._subs)
    for n in range(3):
        await rewards.publish(reward(n))
    async with aclosing(rewards.replay()) as stream:  # type: ignore[type-var]
        async for one in stream:
            assert one.task_id == "t0"
            break
    assert len(bus.connection._nc._subs) == before


async def test_only_the_formulas_work_without_a_bus() -> None:
    rewards = formulas.RewardBus()
    assert rewards.compute_signal(TaskAd(description="x"), True, 0).total > 0
    with pytest.raises(BusUnavailable, match="no bus"):
        await rewards.publish(reward(1))
    with pytest.raises(BusUnavailable, match="no bus"):
        await anext(rewards.subscribe())
    with pytest.raises(BusUnavailable, match="no bus"):
        await anext(rewards.replay())


async def test_a_node_id_that_is_not_a_token_is_refused(rewards: RewardBus) -> None:
    with pytest.raises(InvalidTask):
        await anext(rewards.replay(node_id="a.b.c"))
