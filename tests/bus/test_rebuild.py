"""Profiles rebuilt from the stream alone: compared, repaired, and begun at snapshots once its head is gone."""

from typing import Any

import pytest
from msgspec.structs import replace
from support.builders import reward
from support.phase_harness import Replica, Stage
from support.rewards import publish
from support.wait import until

from loom.bus.rewards import RewardBus
from loom.phases.adapt.rebuild import compare, rebuild, repair, stored_profiles
from loom.phases.adapt.reward_weights import weights_of
from loom.phases.adapt.timings import AdaptTimings
from loom.runner.timings import ServiceTimings
from loom.schemas.base import encode
from loom.schemas.config import ClusterConfig
from loom.schemas.learning.profile import NodeProfile
from loom.schemas.learning.reward import SNAPSHOTS

KEEPS_ALL = ClusterConfig(policy="ucb")
LIMIT = 256 * 1024
WITHIN_S = 20


async def stored(stage: Stage) -> dict[str, NodeProfile]:
    return {entry.value.name: entry.value for entry in (await stored_profiles(stage.bus)).values()}


async def learned(stage: Stage, tasks: int) -> dict[str, NodeProfile]:
    """Wait until the stored profiles hold so many tasks in all."""

    async def known() -> dict[str, NodeProfile] | None:
        found = await stored(stage)
        return found if sum(profile.total_tasks for profile in found.values()) >= tasks else None

    found = await until(known, within_s=WITHIN_S, what=f"{tasks} tasks are learned")
    assert found is not None
    return found


async def verdicts(stage: Stage) -> dict[str, str]:
    _, compared = await compare(stage.bus, forget=False)
    return {one.node: one.verdict for one in compared}


async def test_each_node_is_compared_as_of_the_last_reward_it_holds(stage: Stage) -> None:
    adapt = await stage.phase("adapt", KEEPS_ALL)
    await publish(stage, *(reward(n, f"n{n % 4}") for n in range(20)))
    whole = await learned(stage, 20)
    assert await verdicts(stage) == dict.fromkeys(("n0", "n1", "n2", "n3"), "same")
    await adapt.close()

    await publish(stage, reward(21, "n1"), reward(22, "n4"))
    bucket = stage.bus.bucket("nodes", NodeProfile)
    entries = await stored_profiles(stage.bus)
    await bucket.update("local.n2", replace(whole["n2"], total_tasks=99), entries["local.n2"].revision)
    await bucket.create("local.stranger", NodeProfile(node_id="stranger"))
    assert await verdicts(stage) == {
        "n0": "same", "n1": "behind", "n2": "differs", "n3": "same", "n4": "missing", "stranger": "beyond",
    }  # fmt: skip

    _, compared = await compare(stage.bus, forget=False)
    assert await repair(stage.bus, compared) == []
    assert await repair(stage.bus, compared) == [
        "local.n2",
        "local.n4",
    ]  # entries read before the repair are outdated after it
    repaired = await stored(stage)
    assert repaired["n2"] == whole["n2"]
    assert repaired["n4"].total_tasks == 1
    assert repaired["stranger"] == NodeProfile(node_id="stranger")


async def test_a_repair_holds_though_the_running_phase_has_folded_on_wrong_values(stage: Stage) -> None:
    bucket = stage.bus.bucket("nodes", NodeProfile)
    await publish(stage, *(reward(n) for n in range(4)))
    await bucket.create("local.n1", NodeProfile(node_id="n1", total_tasks=70, last_seq=4))
    adapt: Any = await stage.phase("adapt", KEEPS_ALL)
    await publish(stage, reward(5))
    await learned(stage, 71)

    _, compared = await compare(stage.bus, forget=False)
    assert [one.verdict for one in compared] == ["differs"]
    assert await repair(stage.bus, compared) == []
    await until(lambda: _total(adapt.service) == 5, within_s=WITHIN_S, what="the running phase takes it over")
    await publish(stage, reward(6))

    async def six() -> bool:
        return (await stored(stage))["n1"].last_seq == 6

    await until(six, within_s=WITHIN_S, what="the next reward is learned")
    assert (await stored(stage))["n1"].total_tasks == 6
    assert await verdicts(stage) == {"n1": "same"}


async def test_a_custom_judge_moves_a_profile_by_its_weight_and_so_does_a_rebuild(stage: Stage) -> None:
    weights = {"linter": 2.0, "gossip": 0.0}
    await stage.phase("adapt", ClusterConfig(policy="ucb", judge_weights=weights))
    await publish(stage, reward(1, score=1.0))
    for source, score in (("linter", 0.25), ("person", 0.5), ("gossip", 0.0)):  # plain JSON, as another language has it
        word = {"reward_id": f"{source}/1", "task_id": "t1", "attempt": 1, "source": source, "node_id": "n1"}
        words = encode({**word, "domain_token": "code", "score": score, "ended_at": 1.0})
        await stage.bus.jetstream.publish(stage.bus.subjects.of("reward", source, "local", "n1", "code"), words)

    async def read() -> NodeProfile | None:
        known = (await stored(stage)).get("n1")
        return known if known and known.last_seq == 4 else None

    profile: Any = await until(read, within_s=WITHIN_S, what="all four are read")
    evidence = profile.domains["code"]
    assert evidence.mean == pytest.approx((1 * 1.0 + 2 * 0.25 + 3 * 0.5) / 6, abs=1e-6)
    assert (evidence.count, profile.total_tasks, profile.tokens) == (1, 1, 10)
    _, as_adapt = await compare(stage.bus, forget=False, weights=weights_of(weights))
    _, otherwise = await compare(stage.bus, forget=False)
    assert [one.verdict for one in (*as_adapt, *otherwise)] == ["same", "differs"]


@pytest.fixture
async def short(stage: Stage) -> Stage:
    """A stage whose stream of rewards soon drops its head."""
    stage.timings = ServiceTimings(adapt=AdaptTimings(snapshot_retry_s=0.05))
    stream = stage.bus.subjects.stream("REWARDS")
    info = await stage.bus.jetstream.api(f"STREAM.INFO.{stream}")
    await stage.bus.jetstream.api(f"STREAM.UPDATE.{stream}", {**info["config"], "max_bytes": LIMIT})
    return stage


async def head_dropped(stage: Stage, adapts: list[Replica]) -> dict[str, NodeProfile]:
    """Publish rewards until the first ones are gone, no faster than they are read; return the learned profiles."""
    services: list[Any] = [adapt.service for adapt in adapts]
    await publish(stage, *(reward(n, "idle") for n in range(3)))
    for start in range(3, 1503, 100):
        await publish(stage, *(reward(n, f"n{n % 3}", (n % 5) / 4) for n in range(start, start + 100)))
        await until(
            lambda start=start: all(_total(one) >= start + 100 for one in services),  # type: ignore[misc]
            within_s=WITHIN_S,
            what="all is read",
        )
    return await learned(stage, 1503)


def _total(service: Any) -> int:
    return sum(profile.total_tasks for profile in service._profiles.values())


@pytest.mark.slow
async def test_a_rebuild_begins_at_the_snapshots_when_the_head_is_gone(short: Stage) -> None:
    replicas = [await short.phase("adapt", KEEPS_ALL) for _ in range(2)]
    whole = await head_dropped(short, replicas)
    for replica in replicas:
        await replica.close()

    state = (await short.bus.jetstream.api(f"STREAM.INFO.{short.bus.subjects.stream('REWARDS')}"))["state"]
    assert state["first_seq"] > 100
    rebuilt = await rebuild(short.bus, forget=False)
    assert {
        one.name: one for one in rebuilt.profiles.values()
    } == whole  # the idle node too, whose rewards are all gone
    assert rebuilt.start.whole
    assert rebuilt.start.seq >= state["first_seq"] - 1
    assert set((await verdicts(short)).values()) == {"same"}

    await short.bus.jetstream.api(f"STREAM.PURGE.KV_{short.bus.subjects.bucket('nodes')}")
    await short.phase("adapt", KEEPS_ALL)
    assert await learned(short, 1503) == whole
    assert [one async for one in RewardBus(bus=short.bus).replay(domain=SNAPSHOTS)] == []


@pytest.mark.slow
async def test_only_one_replica_takes_each_round(short: Stage) -> None:
    replicas = [await short.phase("adapt", KEEPS_ALL) for _ in range(2)]
    await head_dropped(short, replicas)

    def rounds() -> dict[int, list[str]]:
        found: dict[int, list[str]] = {}
        for one in short.all("reward"):
            if one.kind == "snapshot":
                found.setdefault(one.snapshot.through, []).append(one.node_id)
        return {through: sorted(nodes) for through, nodes in found.items()}

    # the last round may be on its way still
    await until(lambda: all(len(nodes) >= 4 for nodes in rounds().values()), within_s=WITHIN_S, what="all are whole")
    assert 2 <= len(rounds()) <= 16
    assert rounds() == {through: ["idle", "n0", "n1", "n2"] for through in rounds()}


async def test_without_snapshots_a_lost_head_is_reported_and_nothing_is_repaired(stage: Stage) -> None:
    adapt = await stage.phase("adapt", KEEPS_ALL)
    await publish(stage, *(reward(n) for n in range(10)))
    whole = await learned(stage, 10)
    await adapt.close()
    await stage.bus.jetstream.api(f"STREAM.PURGE.{stage.bus.subjects.stream('REWARDS')}", {"seq": 4})

    rebuilt, compared = await compare(stage.bus, forget=False)
    assert not rebuilt.start.whole
    assert [one.verdict for one in compared] == ["beyond"]
    assert await repair(stage.bus, compared) == []
    assert await stored(stage) == whole
