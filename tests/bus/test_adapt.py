import asyncio
from typing import Any

import pytest
from support.builders import reward
from support.phase_harness import Replica, Stage
from support.rewards import publish
from support.wait import until

from loom.bus.rewards import RewardBus
from loom.phases.adapt.evidence import apply_reward
from loom.phases.adapt.timings import AdaptTimings
from loom.runner.timings import ServiceTimings
from loom.schemas.identity import node_key
from loom.schemas.learning.calibration import BIAS, Calibration
from loom.schemas.learning.profile import WINDOW, NodeProfile


async def profile(stage: Stage, node: str = "n1") -> NodeProfile | None:
    entry = await stage.bus.bucket("nodes", NodeProfile).get(node_key("local", node))
    return entry.value if entry else None


async def learned(stage: Stage, total: int, node: str = "n1") -> NodeProfile:
    """Wait until the stored profile of a node holds so many tasks."""

    async def known() -> NodeProfile | None:
        found = await profile(stage, node)
        return found if found and found.total_tasks >= total else None

    found: Any = await until(known, what=f"{total} tasks of {node} are learned")
    return found  # type: ignore[no-any-return]


async def refolded(stage: Stage, node: str = "n1") -> NodeProfile:
    """Return the profile of a node by the stream itself, folded from the beginning."""
    known = NodeProfile(node_id=node)
    stream = stage.bus.subjects.stream("REWARDS")
    last = (await stage.bus.jetstream.api(f"STREAM.INFO.{stream}"))["state"]["last_seq"]
    seq = 0
    async for one in RewardBus(bus=stage.bus).replay():
        seq += 1  # nothing is ever removed here: the n-th reward has sequence n
        if one.node_id == node:
            known = apply_reward(known, one, seq)
    assert seq == last
    return known


async def writes(stage: Stage) -> int:
    """Return how often a profile or a summary was written."""
    info = await stage.bus.jetstream.api(f"STREAM.INFO.KV_{stage.bus.subjects.bucket('nodes')}")
    return int(info["state"]["last_seq"])


def hold(adapt: Any, monkeypatch: pytest.MonkeyPatch) -> tuple[asyncio.Event, asyncio.Event]:
    """Hold the writes of a replica; return an event set at its first write, and an event that releases it."""
    bucket, entered, go = adapt.service._writer._bucket, asyncio.Event(), asyncio.Event()
    update = bucket.update

    async def held(*args: Any) -> int:
        entered.set()
        await go.wait()
        return int(await update(*args))

    monkeypatch.setattr(bucket, "update", held)
    return entered, go


def tasks_named(stage: Stage, node: str = "n1") -> set[str]:
    return {task for news in stage.all("lifecycle", kind="learned", node_id=node) for task in news.task_ids}


async def test_a_reward_becomes_a_profile_and_is_published(stage: Stage) -> None:
    await stage.phase("adapt")
    await publish(stage, reward(1, score=0.25))
    news = await stage.seen("lifecycle", kind="learned", node_id="n1")
    assert news.task_ids == ("t1",)
    stored = await profile(stage)
    assert stored is not None
    assert news.profile == stored
    assert (stored.total_tasks, stored.success_rate, stored.consecutive_losses) == (1, 0.0, 1)
    assert (stored.tokens, stored.seconds, stored.last_seq) == (10, 0.5, 1)
    assert (stored.domains["code"].count, stored.domains["code"].mean) == (1, 0.25)


async def test_a_storm_is_folded_whole_and_written_in_few_batches(stage: Stage) -> None:
    await stage.phase("adapt")
    storm = [reward(n, score=(n % 5) / 4, domain_token="code" if n % 3 else "data") for n in range(600)]
    for start in range(0, 600, 50):
        await publish(stage, *storm[start : start + 50])
    stored = await learned(stage, 600)
    assert stored == await refolded(stage)
    assert stored.domains["code"].count == stored.domains["data"].count == WINDOW
    assert await writes(stage) < 200
    await until(lambda: len(tasks_named(stage)) == 600, what="every task is named")


async def test_rewards_that_come_during_a_write_are_written_next(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    adapt: Any = await stage.phase("adapt")
    entered, go = hold(adapt, monkeypatch)
    await publish(stage, reward(1))
    await entered.wait()
    await publish(stage, reward(2))
    await until(lambda: adapt.service._profiles["local.n1"].total_tasks == 2, what="the second is folded")
    go.set()
    assert await learned(stage, 2) == await refolded(stage)
    news = await stage.seen("lifecycle", kind="learned", count=2)
    assert (stage.all("lifecycle", kind="learned")[0].task_ids, news.task_ids) == (("t1",), ("t2",))


async def test_an_inheritance_that_comes_during_a_write_is_written_next(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It names no task: only the profile shows that it is unwritten."""
    adapt: Any = await stage.phase("adapt")
    entered, go = hold(adapt, monkeypatch)
    await publish(stage, reward(1))
    await entered.wait()
    await publish(stage, reward(2, kind="inherit", source="adapt"))
    await until(lambda: adapt.service._profiles["local.n1"].last_seq == 2, what="it is folded")
    go.set()
    await until(lambda: at_the_end(stage), what="it is written")
    stored = await profile(stage)
    assert stored == await refolded(stage)
    assert (stored.total_tasks, stored.domains["code"].count) == (1, 2)
    assert tasks_named(stage) == {"t1"}


async def test_each_node_has_a_profile_of_its_own(stage: Stage) -> None:
    await stage.phase("adapt")
    await publish(stage, *(reward(n, node=f"n{n % 4}") for n in range(40)))
    for n in range(4):
        assert await learned(stage, 10, f"n{n}") == await refolded(stage, f"n{n}")


async def test_a_revised_score_replaces_its_twin_and_is_published_again(stage: Stage) -> None:
    await stage.phase("adapt")
    await publish(stage, reward(1, score=1.0))
    await stage.seen("lifecycle", kind="learned")
    await publish(stage, reward(1, score=1.0))  # the same again: the server drops it
    await publish(stage, reward(1, score=0.25))
    await stage.seen("lifecycle", kind="learned", count=2)
    stored = await profile(stage)
    assert stored is not None
    assert (stored.total_tasks, stored.domains["code"].mean, stored.last_seq) == (1, 0.25, 2)


async def test_garbage_on_the_reward_bus_changes_no_profile_and_stops_no_replica(stage: Stage) -> None:
    await stage.phase("adapt")
    subjects = stage.bus.subjects
    await stage.bus.jetstream.publish(subjects.of("reward", "rules", "local", "n1", "code"), b"\xff not a reward")
    await stage.bus.jetstream.publish(subjects.of("reward", "rules", "local", "n1", "code"), b'{"score": 7}')
    await stage.bus.jetstream.publish(
        subjects.of("reward", "rules", "local", "n1", "code"), reward(1, node="n2")
    )  # another's, to be credited here
    await stage.bus.jetstream.publish(subjects.of("reward", "rules", "local", "n1", "data"), reward(2))
    await publish(stage, reward(3))
    stored = await learned(stage, 1)
    assert (stored.total_tasks, stored.last_seq, set(stored.domains)) == (1, 5, {"code"})
    assert await profile(stage, "n2") is None


async def test_only_adapt_publishes_inheritances_and_only_their_subject_counts(stage: Stage) -> None:
    adapt = await stage.phase("adapt")
    subjects = stage.bus.subjects
    await publish(stage, reward(1, kind="inherit", source="person"), reward(2, kind="snapshot", source="rules"))
    await stage.bus.jetstream.publish(subjects.of("reward", "alice", "local", "n1", "code"), reward(3))
    await stage.bus.jetstream.publish(subjects.of("reward", "rules", "acme", "n1", "code"), reward(4))
    await publish(stage, reward(5))
    stored = await learned(stage, 1)
    assert (stored.total_tasks, stored.last_seq) == (1, 5)
    counts = adapt.bus.discards.counts
    assert (counts["reward_kind_forbidden"], counts["reward_misaddressed"]) == (2, 2)
    assert [one.task_id async for one in RewardBus(bus=stage.bus).replay()] == ["t5"]


async def test_one_name_of_two_owners_is_two_nodes(stage: Stage) -> None:
    await stage.phase("adapt")
    await publish(stage, reward(1), reward(2, score=0.0, owner="acme"), reward(3, owner="acme"))
    await learned(stage, 1)

    async def other_profile() -> NodeProfile | None:
        entry = await stage.bus.bucket("nodes", NodeProfile).get("acme.n1")
        return entry.value if entry is not None and entry.value.total_tasks == 2 else None

    found = await until(other_profile, what="the other owner's node has a profile of its own")
    assert found is not None
    assert (found.owner, found.node_id, found.domains["code"].mean) == ("acme", "n1", 0.5)
    news = await stage.seen("lifecycle", kind="learned", owner="acme", node_id="n1")
    assert (news.owner, news.profile.owner) == ("acme", "acme")


async def test_a_restarted_replica_goes_on_without_counting_twice(stage: Stage) -> None:
    first = await stage.phase("adapt")
    await publish(stage, *(reward(n) for n in range(10)))
    await learned(stage, 10)
    await first.service.drain(1)
    await publish(stage, *(reward(n) for n in range(10, 15)))
    second = await stage.phase("adapt")
    assert await learned(stage, 15) == await refolded(stage)
    second.die()
    await publish(stage, reward(15))
    await stage.phase("adapt")
    stored = await learned(stage, 16)
    assert stored == await refolded(stage)
    assert stored.total_tasks == 16


async def test_a_drain_writes_the_folded_rewards(stage: Stage) -> None:
    stage.timings = ServiceTimings(adapt=AdaptTimings(batch_s=60))
    adapt: Any = await stage.phase("adapt")
    await publish(stage, reward(1))
    await until(lambda: adapt.service._profiles, what="it is folded")
    await adapt.service.drain(1)
    assert await profile(stage) == await refolded(stage)


async def test_a_rebuild_from_the_stream_equals_the_stored_profile(stage: Stage) -> None:
    first = await stage.phase("adapt")
    await publish(stage, *(reward(n % 30, score=(n * 7 % 11) / 10, domain_token=f"d{n % 4}") for n in range(150)))
    await learned(stage, 30)
    await until(lambda: at_the_end(stage), what="all is folded")
    stored = await profile(stage)
    await first.service.drain(1)
    nodes = f"KV_{stage.bus.subjects.bucket('nodes')}"
    await stage.bus.jetstream.api(f"STREAM.PURGE.{nodes}")
    await stage.phase("adapt")
    await until(lambda: at_the_end(stage), what="all is folded again")
    assert await profile(stage) == stored == await refolded(stage)


async def at_the_end(stage: Stage) -> bool:
    stored = await profile(stage)
    return stored is not None and stored.last_seq == await stage.pending("REWARDS")


# -- replicas


@pytest.fixture
async def replicas(stage: Stage) -> list[Replica]:
    """Two replicas; a standby checks after 0.2 s."""
    stage.timings = ServiceTimings(adapt=AdaptTimings(standby_s=0.2))
    return [await stage.phase("adapt"), await stage.phase("adapt")]


async def test_two_replicas_agree_and_no_task_counts_twice(stage: Stage, replicas: list[Replica]) -> None:
    for start in range(0, 300, 30):
        await publish(stage, *(reward(n, node=f"n{n % 2}") for n in range(start, start + 30)))
    for node in ("n0", "n1"):
        assert await learned(stage, 150, node) == await refolded(stage, node)
    known: list[Any] = [replica.service for replica in replicas]
    await until(
        lambda: all(service._profiles["local.n1"].total_tasks == 150 for service in known), what="both have read it all"
    )
    assert known[0]._profiles == known[1]._profiles
    await until(lambda: len(tasks_named(stage, "n1")) == 150, what="every task is named")


async def test_one_replica_writes_and_the_other_stands_by(stage: Stage, replicas: list[Replica]) -> None:
    await publish(stage, reward(0))
    await stage.seen("lifecycle", kind="learned")  # a profile and its summary are stored before its event is published
    before = await writes(stage)
    for n in range(1, 16):
        await publish(stage, reward(n))
        await learned(stage, n + 1)
    await stage.seen("lifecycle", kind="learned", count=16)
    assert await writes(stage) - before == 2 * 15
    assert len(stage.all("lifecycle", kind="learned")) == 16
    assert len(replicas) == 2


async def test_a_standby_takes_over_from_a_dead_replica(stage: Stage, replicas: list[Replica]) -> None:
    for n in range(3):
        await publish(stage, reward(n))
        await learned(stage, n + 1)
    services: list[Any] = [replica.service for replica in replicas]
    active = max(range(2), key=lambda i: services[i]._writer._revisions.get("local.n1", 0))
    replicas[active].die()
    await publish(stage, reward(3), reward(4))
    assert await learned(stage, 5) == await refolded(stage)
    await publish(stage, reward(5))
    assert await learned(stage, 6) == await refolded(stage)
    assert {"t3", "t4", "t5"} <= tasks_named(stage)


async def test_a_replica_that_lags_behind_adopts_the_stored_profile(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own write conflicts while it folds on: neither the rewards folded since nor the stored ones are lost."""
    stage.timings = ServiceTimings(adapt=AdaptTimings(standby_s=0.1))
    slow: Any = await stage.phase("adapt")
    entered, go = hold(slow, monkeypatch)
    await publish(stage, reward(1))
    await entered.wait()
    fast = await stage.phase("adapt")
    await learned(stage, 1)
    fast.die()
    await publish(stage, reward(2))
    await until(lambda: slow.service._profiles["local.n1"].total_tasks == 2, what="the second is folded")
    go.set()
    assert await learned(stage, 2) == await refolded(stage)


# -- profiles that claim more than the stream holds


def forged(last_seq: int) -> NodeProfile:
    """A profile that no reward supports, as of a sequence the stream does not have."""
    return NodeProfile(node_id="n1", last_seq=last_seq, total_tasks=500, success_rate=0.0)


async def put_profile(stage: Stage, wanted: NodeProfile) -> None:
    bucket = stage.bus.bucket("nodes", NodeProfile)
    entry = await bucket.get("local.n1")
    await bucket.update("local.n1", wanted, entry.revision if entry else 0)


@pytest.mark.parametrize("last_seq", [4, 2**50])
async def test_a_profile_beyond_the_stream_is_refused_at_the_start(stage: Stage, last_seq: int) -> None:
    await publish(stage, *(reward(n) for n in range(3)))
    await put_profile(stage, forged(last_seq))
    await stage.phase("adapt")
    assert await rebuilt(stage, 3) == await refolded(stage)


async def test_the_stored_profile_of_a_node_is_kept_where_the_stream_was_lost(stage: Stage) -> None:
    await put_profile(stage, forged(4))
    await stage.phase("adapt")
    await publish(stage, reward(1))
    found = await rebuilt(stage, 501)
    assert found.last_seq == 1


@pytest.mark.parametrize("last_seq", [100, 2**50])
async def test_a_profile_beyond_the_stream_is_refused_later_too(stage: Stage, last_seq: int) -> None:
    await publish(stage, reward(1))
    await stage.phase("adapt")
    await learned(stage, 1)
    await put_profile(stage, forged(last_seq))
    await publish(stage, reward(2), reward(3))
    assert await rebuilt(stage, 3) == await refolded(stage)


async def test_a_calibration_that_claims_more_than_the_stream_holds_starts_empty(stage: Stage) -> None:
    bucket = stage.bus.bucket("tuning", Calibration)
    await bucket.update(f"{BIAS}code", Calibration(domain_token="code", bias=0.9, count=99, last_seq=2**50), 0)
    await stage.phase("adapt")
    await publish(stage, reward(1, estimated=0.5))

    async def known() -> Calibration | None:
        entry = await bucket.get(f"{BIAS}code")
        return entry.value if entry is not None and entry.value.count == 1 else None

    assert abs((await until(known, what="the calibration starts again")).bias) < 0.5


async def rebuilt(stage: Stage, total: int) -> NodeProfile:
    """Wait until the stored profile holds exactly so many tasks."""

    async def known() -> NodeProfile | None:
        found = await profile(stage)
        return found if found is not None and found.total_tasks == total else None

    return await until(known, what=f"exactly {total} tasks of n1 are learned")
