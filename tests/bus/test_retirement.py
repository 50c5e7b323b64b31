import pytest
from support.nodes import node
from support.phase_harness import Stage
from support.spawning_host import WITHIN_S, HeldAgent, SpawningHost, start_spawning_host
from support.wait import until

from loom.agents.host.timings import HostTimings
from loom.bus.rewards import RewardBus
from loom.phases.adapt.evidence import apply_reward
from loom.phases.adapt.timings import AdaptTimings
from loom.runner.timings import ServiceTimings
from loom.schemas.auction import RetireRequest
from loom.schemas.base import decode
from loom.schemas.config import ClusterConfig
from loom.schemas.identity import node_key
from loom.schemas.learning.lease import Lease
from loom.schemas.learning.profile import NodeProfile
from loom.schemas.learning.reward import Reward


@pytest.fixture
def timings() -> ServiceTimings:
    return ServiceTimings(host=HostTimings(announce_s=0.1), adapt=AdaptTimings(sweep_s=0.05))


@pytest.fixture
async def grown(stage: Stage) -> SpawningHost:
    """A host that has grown from one node to three, all busy; `let_go` ends their work."""
    agent = HeldAgent()
    host = await start_spawning_host(stage, [node("a", agent, code=0.9)], 3, slots=1)
    host.let_go = agent.released.set  # type: ignore[attr-defined]
    await host.occupy("a", agent)
    for child in ("a-c1", "a-c2"):
        assert (await host.spawn()).node_id == child
        await host.occupy(child, agent)
    await host.announces("a", "a-c1", "a-c2")
    return host


def orders(stage: Stage) -> list[RetireRequest]:
    return [decode(raw, RetireRequest) for raw in stage.all("retire")]


async def earned(stage: Stage, node_id: str, *scores: float, domain_token: str = "code") -> None:
    bus = RewardBus(bus=stage.bus)
    for n, score in enumerate(scores):
        task = f"{node_id}-{domain_token}-{n}"
        one = Reward(
            reward_id=f"{task}:1:rules",
            task_id=task,
            attempt=1,
            node_id=node_id,
            domain_token=domain_token,
            score=score,
            ended_at=stage.bus.clock.now() + n,
        )
        await bus.publish(one)


async def profiles(stage: Stage) -> dict[str, NodeProfile]:
    bucket = stage.bus.bucket("nodes", NodeProfile)
    entries = [await bucket.get(node_key("local", name)) for name in ("a", "a-c1", "a-c2")]
    return {entry.value.node_id: entry.value for entry in entries if entry}


async def refolded(stage: Stage) -> dict[str, NodeProfile]:
    """The profiles by the stream itself, folded from the beginning; no message is ever removed here."""
    known: dict[str, NodeProfile] = {}
    seq = 0
    async for one in RewardBus(bus=stage.bus).replay():
        seq += 1
        known[one.node_id] = apply_reward(known.get(one.node_id, NodeProfile(node_id=one.node_id)), one, seq)
    return known


@pytest.mark.slow
async def test_idle_children_retire_and_the_survivor_inherits_the_profile_that_a_rebuild_finds(
    stage: Stage, grown: SpawningHost
) -> None:
    await stage.phase("adapt", ClusterConfig(idle_timeout_s=0.5))
    await earned(stage, "a-c1", 1.0, 0.5)
    await earned(stage, "a", 0.0, 0.0)
    grown.let_go()  # type: ignore[attr-defined]
    await grown.announces("a")
    assert {one.node_id for one in orders(stage)} == {"a-c1", "a-c2"}
    assert all(one.when_idle and one.reason.startswith("idle for") for one in orders(stage))

    async def inherited() -> bool:
        known = await profiles(stage)
        return "a" in known and known["a"].domains["code"].count == 3 and known == await refolded(stage)

    await until(inherited, within_s=WITHIN_S, what="the survivor's stored profile holds the inheritance")
    heir = (await profiles(stage))["a"]
    assert (heir.domains["code"].mean, heir.total_tasks, heir.consecutive_losses) == (0.25, 2, 2)
    await until(lambda: published_count(stage, "a") == 3, within_s=WITHIN_S, what="the inheritance is published")
    [passed] = [one for one in stage.all("reward", node_id="a") if one.kind == "inherit"]
    assert (passed.reward_id, passed.score) == ("inherit:a-c1", 0.75)


def published_count(stage: Stage, node_id: str) -> int:
    """Return the rewards in `code` that the newest published profile counts."""
    news = stage.all("lifecycle", kind="learned", node_id=node_id)
    return news[-1].profile.domains["code"].count if news else 0


async def test_a_failing_child_retires_during_its_work_and_ends_it(stage: Stage, grown: SpawningHost) -> None:
    await stage.phase("adapt", ClusterConfig(idle_timeout_s=0.01, consecutive_loss_limit=3))
    await earned(stage, "a-c2", 0.0, 0.0, 0.0)
    changed = await stage.seen("lifecycle", kind="changed", node_id="a-c2", within_s=WITHIN_S)
    assert changed.reason == "takes no more work: failed 3 times in a row"
    assert grown.names() == ["a", "a-c1", "a-c2"]
    grown.let_go()  # type: ignore[attr-defined]
    await stage.seen("lifecycle", kind="retired", node_id="a-c2", within_s=WITHIN_S)


@pytest.mark.slow
async def test_one_of_two_replicas_acts_and_min_nodes_stay(stage: Stage, grown: SpawningHost) -> None:
    stage.timings = ServiceTimings(adapt=AdaptTimings(sweep_s=0.05, lease_s=1.0))
    config = ClusterConfig(idle_timeout_s=0.3, min_nodes=2)
    replicas = [await stage.phase("adapt", config) for _ in range(2)]
    grown.let_go()  # type: ignore[attr-defined]
    await until(lambda: len(grown.names()) == 2, within_s=WITHIN_S, what="one child has gone")
    count = len(stage.all("host"))
    await stage.seen("host", count=count + 10, within_s=WITHIN_S)  # both replicas check their nodes meanwhile
    assert len(orders(stage)) == 1
    assert len(grown.names()) == 2
    holder = await stage.bus.bucket("tuning", Lease).get("apoptosis")
    [active] = [replica for replica in replicas if replica.bus.instance == holder.value.holder]
    active.die()
    await stage.phase("adapt", ClusterConfig(idle_timeout_s=0.3, min_nodes=1))
    await grown.announces("a")
    assert len(orders(stage)) == 2


@pytest.mark.slow
async def test_a_replica_waits_while_another_holds_the_lease(stage: Stage, grown: SpawningHost) -> None:
    bucket = stage.bus.bucket("tuning", Lease)
    held = await bucket.create("apoptosis", Lease(holder="another", until=stage.bus.clock.now() + 25))
    await stage.phase("adapt", ClusterConfig(idle_timeout_s=0.1))
    grown.let_go()  # type: ignore[attr-defined]
    await until(lambda: idle_for(stage, 0.5), within_s=WITHIN_S, what="both are idle and known to be")
    assert not orders(stage)
    await bucket.update("apoptosis", Lease(holder="another", until=stage.bus.clock.now() - 1), held)
    await grown.announces("a")


def idle_for(stage: Stage, seconds: float) -> bool:
    children = stage.all("host")[-1].spawned
    return len(children) == 2 and all(child.idle_s > seconds for child in children)
