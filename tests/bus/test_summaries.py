"""The summaries that ADAPT stores next to the profiles, for MATCH."""

import asyncio
from typing import Any

import pytest
from msgspec.structs import replace
from support.builders import reward
from support.evidence import store_profile
from support.phase_harness import Stage
from support.rewards import publish
from support.wait import until

from loom.phases.adapt.summary_writer import KEPT_ATTEMPTS, agrees, summary_of
from loom.phases.adapt.timings import AdaptTimings
from loom.runner.timings import ServiceTimings
from loom.schemas.base import Undecodable, encode
from loom.schemas.learning.profile import DomainEvidence, NodeProfile, Score
from loom.schemas.learning.summary import ProfileSummary, summary_key

KEY = summary_key("local.n1")


@pytest.fixture(autouse=True)
def hurry(stage: Stage) -> None:
    """A replica checks a summary of another process after 50 ms."""
    stage.timings = ServiceTimings(adapt=AdaptTimings(standby_s=0.05))


async def summarised(stage: Stage, last_seq: int) -> ProfileSummary:
    """Return the stored summary of n1 once it rests on `last_seq`, and agrees with the stored profile."""

    async def stored() -> ProfileSummary | None:
        try:
            entry = await stage.bus.bucket("nodes", ProfileSummary).get(KEY)
        except Undecodable:
            return None
        profile = await stage.bus.bucket("nodes", NodeProfile).get("local.n1")
        if entry is None or profile is None or entry.value.last_seq != last_seq:
            return None
        return entry.value if agrees(entry.value, profile.value) else None

    return await until(stored, what=f"the summary of {last_seq} rewards")  # type: ignore[no-any-return]


async def test_a_summary_has_count_mean_losses_and_the_attempts_rewarded_last(stage: Stage) -> None:
    await stage.phase("adapt")
    await publish(stage, reward(1), reward(2), reward(3, score=0.0))
    code = (await summarised(stage, 3)).domains["code"]
    assert (code.count, code.mean, code.losses) == (3, pytest.approx(2 / 3), 1)
    assert set(code.rewarded) == {"t1:1", "t2:1", "t3:1"}


async def test_missing_and_outdated_summaries_are_written_at_the_start(stage: Stage) -> None:
    adapt = await stage.phase("adapt")
    await publish(stage, reward(1))
    await summarised(stage, 1)
    await adapt.close()
    summaries = stage.bus.bucket("nodes", ProfileSummary)
    outdated = ProfileSummary(node_id="n1", last_seq=0)
    await summaries.update(KEY, outdated, await summaries.revision(KEY))
    await stage.phase("adapt")
    assert (await summarised(stage, 1)).domains["code"].count == 1


@pytest.mark.parametrize(
    "forged",
    [
        encode(ProfileSummary(node_id="n1", last_seq=1)),
        encode(ProfileSummary(node_id="n1", last_seq=2**50)),
        encode(ProfileSummary(node_id="n2", last_seq=1)),
        b"garbage",
    ],
)
async def test_a_forged_summary_is_replaced(stage: Stage, forged: bytes) -> None:
    await stage.phase("adapt")
    await publish(stage, reward(1))
    await summarised(stage, 1)
    await stage.bus.jetstream.publish(f"$KV.{stage.bus.subjects.bucket('nodes')}.{KEY}", forged)
    assert (await summarised(stage, 1)).domains["code"].mean == 1.0
    await publish(stage, reward(2))
    assert (await summarised(stage, 2)).domains["code"].count == 2


async def test_a_repaired_profile_changes_its_summary(stage: Stage) -> None:
    await stage.phase("adapt")
    await publish(stage, reward(1))
    await summarised(stage, 1)
    profiles = stage.bus.bucket("nodes", NodeProfile)
    entry = await profiles.get("local.n1")
    assert entry is not None
    worse = replace(entry.value.domains["code"], mean=0.25)
    await profiles.update("local.n1", replace(entry.value, domains={"code": worse}), entry.revision)

    async def is_changed() -> bool:
        return (await summarised(stage, 1)).domains["code"].mean == 0.25

    await until(is_changed, what="the summary follows the profile")


def test_a_summary_is_small_however_full_the_window_is() -> None:
    scores = tuple(Score(attempt_id=f"{n:032x}:1", score=1.0, ended_at=1.7e9 + n) for n in range(120))
    evidence = DomainEvidence(scores=scores, count=120, mean=1.0, losses=0)
    profile = NodeProfile(node_id="n1", domains={"code": evidence})
    summary = summary_of(profile)
    for number in range(100):
        attempt = replace(reward(number), task_id=f"{number:032x}")
        summary = summary_of(profile, summary, [attempt])
    assert len(summary.domains["code"].rewarded) == KEPT_ATTEMPTS + 1
    assert len(encode(summary)) < 600 < len(encode(profile)) / 10
    assert agrees(summary, profile)


async def test_an_unreadable_summary_leaves_the_known_one(stage: Stage) -> None:
    scores = (Score(attempt_id="t1:1", score=1.0, ended_at=1.0),)
    evidence = DomainEvidence(scores=scores, count=1, mean=1.0)
    await store_profile(stage.bus, NodeProfile(node_id="n1", last_seq=1, domains={"code": evidence}))
    match: Any = await stage.phase("match")
    garbage = b'{"node_id":"n1","last_seq":2,"domains":{"code":{"count":"many"}}}'
    await stage.bus.jetstream.publish(f"$KV.{stage.bus.subjects.bucket('nodes')}.{KEY}", garbage)
    await until(lambda: match.bus.discards.counts["value_undecodable"], what="the value is left out")
    assert match.service._directory.profiles["n1"].last_seq == 1
    assert match.service._directory.ranking.best("code", 1) == ("n1",)


async def test_profiles_of_different_nodes_are_written_side_by_side(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage.timings = ServiceTimings(adapt=AdaptTimings(batch_s=0.3))
    adapt: Any = await stage.phase("adapt")
    bucket, both, waiting = adapt.service._writer._bucket, asyncio.Event(), set[str]()
    update = bucket.update

    async def together(key: str, profile: NodeProfile, revision: int) -> int:
        waiting.add(key)
        if len(waiting) == 2:
            both.set()
        await both.wait()
        return int(await update(key, profile, revision))

    monkeypatch.setattr(bucket, "update", together)
    await publish(stage, reward(1), reward(2, node="n2"))
    await summarised(stage, 1)
    assert waiting == {"local.n1", "local.n2"}
