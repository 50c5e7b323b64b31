import asyncio
import time
from collections.abc import Callable
from dataclasses import replace as replace_fields
from typing import Any

import pytest
from msgspec.structs import replace
from support.builders import ad, envelope
from support.evidence import store_profile
from support.fake_host import FakeHost
from support.phase_harness import Replica, Stage
from support.wait import until

from loom.bus.records import records
from loom.phases.match.timings import MatchTimings
from loom.runner.timings import ServiceTimings
from loom.schemas.auction import AnnouncedDomain, AnnouncedNode, Bid, CallForBids, HostAnnouncement, Offer
from loom.schemas.config import ClusterConfig
from loom.schemas.envelope import Envelope, FailedAttempt, Spec
from loom.schemas.learning.profile import DomainEvidence, NodeProfile, Score
from loom.schemas.record import TaskRecord
from loom.schemas.task import TaskError, TaskState

LONG = ClusterConfig(bid_window_ms=3000)
"""A window so long that waiting for it would fail the test."""
SHORT = ClusterConfig(bid_window_ms=40)


TIMINGS = MatchTimings(min_pause_s=0.01, max_pause_s=0.05, no_offers_pause_s=0.05, max_hold_s=0.3)
"""Shorter waits in proportion, a tenth as long or less."""
LONG_HOLD = replace_fields(TIMINGS, max_hold_s=60)


@pytest.fixture
def timings() -> ServiceTimings:
    return ServiceTimings(match=TIMINGS)


async def host(stage: Stage, host_id: str = "h1", *node_ids: str, **facts: Any) -> FakeHost:
    bus = await stage.connect("node")
    one = await FakeHost(bus, host_id, node_ids or ("n1",), **facts).start()
    await stage.seen("host", host_id=host_id)
    return one


async def match(stage: Stage, config: ClusterConfig | None = None, timings: MatchTimings = TIMINGS) -> Replica:
    """Start MATCH and wait until it knows all hosts."""
    stage.timings = ServiceTimings(match=timings)
    before = {host: len(stage.all("host", host_id=host)) for host in ("h1", "h2", "h7")}
    known = [host for host, announced in before.items() if announced]
    replica = await stage.phase("match", config)
    for one in known:
        await stage.seen("host", host_id=one, count=before[one] + 1)
    await replica.bus.requests.flush()
    return replica


def task(stage: Stage, **facts: Any) -> Envelope:
    about = {name: facts.pop(name) for name in list(facts) if name in Envelope.__struct_fields__}
    return envelope(ad(**facts), now=stage.bus.clock.now(), **about)


def declining(why: str) -> Callable[[CallForBids], Offer]:
    return lambda _call: Offer(decline=why)  # type: ignore[arg-type]


# -- the auction


async def test_the_best_bid_wins_and_the_award_names_the_other_bidders(stage: Stage) -> None:
    one = await host(
        stage, "h1", offer=lambda _: one.bids(Bid(node_id="good", self_rating=0.9), Bid(node_id="bad", self_rating=0.1))
    )
    two = await host(stage, "h2", offer=lambda _: two.bids(Bid(node_id="busy", self_rating=0.9, load=0.8, backlog=2)))
    await match(stage)
    env = task(stage)
    await stage.put("match", env)
    won = (await stage.seen("task", phase="execute")).award
    assert (won.node_id, won.host_id, won.backlog, won.pinned) == ("good", "h1", 0, False)
    assert [(bid.node_id, bid.host_id) for bid in won.bids] == [("good", "h1"), ("busy", "h2"), ("bad", "h1")]
    assert won.score == won.bids[0].score == pytest.approx(0.6 * 0.9 + 0.25 + 0.15)


async def test_the_call_has_all_that_a_bid_needs(stage: Stage) -> None:
    one = await host(stage)
    await match(stage)
    env = task(stage, description="é" * 2000, domain="代码", required_tools=("search",), excluded=("n9",), attempt=3)
    one.offer = lambda _: one.bids(Bid(node_id="n1", tools=("search",)))
    await stage.put("match", env)
    await stage.seen("task", phase="execute")
    call = one.calls[0]
    [lot] = call.lots
    assert (call.domain, call.domain_token, lot.task_id, lot.attempt) == ("代码", env.domain_token, env.task_id, 3)
    assert (call.required_tools, call.excluded, call.limit) == (("search",), ("n9",), 16)
    assert (lot.complexity, lot.priority, 50 < lot.remaining_s < 60.1) == (0.3, "normal", True)
    assert 900 < len(lot.description.encode()) <= 1024
    assert env.ad.description.startswith(lot.description)


async def test_learned_profiles_are_followed_live_and_decide_the_auction(stage: Stage) -> None:
    bids = (Bid(node_id="proven", self_rating=0.3), Bid(node_id="boaster", self_rating=1.0))
    one = await host(stage, "h1", offer=lambda _: one.bids(*bids))
    await match(stage)
    await stage.put("match", task(stage))
    assert (await stage.seen("task", phase="execute")).award.node_id == "boaster"
    scores = (Score(attempt_id="r", score=1.0, ended_at=stage.bus.clock.now()),)
    for node, mean in (("proven", 1.0), ("boaster", 0.0)):
        evidence = DomainEvidence(scores=scores, count=60, mean=mean)
        await store_profile(stage.bus, NodeProfile(node_id=node, last_seq=9, domains={"code": evidence}))

    async def auctioned_again() -> bool:
        await stage.put("match", task(stage))
        return bool(stage.all("task", phase="execute")[-1].award.node_id == "proven")

    await until(auctioned_again, what="evidence decides")
    award = stage.all("task", phase="execute")[-1].award
    assert (award.evidence_seq, award.bids[0].evidence, award.bids[0].count) == (9, 1.0, 60)
    assert award.policy == ClusterConfig().policy
    assert set(one.calls[-1].prefer) == {"proven", "boaster"}


async def test_newcomers_of_one_owner_share_their_count_of_tasks(stage: Stage) -> None:
    """Judged tasks count by the stored profiles, pending ones by the latest awards."""
    failed = NodeProfile(node_id="n0", owner="acme", domains={"code": DomainEvidence(count=5, mean=0.0)})
    await store_profile(stage.bus, failed)
    local = await host(stage, "h1", offer=lambda _: local.bids(Bid(node_id="weak", self_rating=0.2)))
    names = [Bid(node_id=f"n{n}", self_rating=1.0, free=9) for n in range(1, 9)]
    acme = await host(stage, "h2", owner="acme", offer=lambda _: acme.bids(*names))
    await match(stage)
    await stage.put("match", task(stage))
    first = (await stage.seen("task", phase="execute")).award
    assert {bid.shared_count for bid in first.bids if bid.owner == "acme"} == {5}
    assert (first.owner, first.bids[0].trust) == ("acme", pytest.approx(2 / 7))
    tried = FailedAttempt(attempt=1, node_id=first.node_id, owner="acme", host_id="h2", code="agent_failed")
    again = replace(task(stage), attempt=2, failures=1, failed_attempts=(tried,), excluded=(first.node,))
    await stage.put("match", again)
    second = (await stage.seen("task", phase="execute", count=2)).award
    assert second.node == "weak"
    assert first.node not in {bid.node for bid in second.bids}
    assert [bid.comes_last for bid in second.bids] == [False] + [True] * 7


async def test_profiles_learned_before_the_start_are_known_to_the_first_auction(stage: Stage) -> None:
    evidence = DomainEvidence(
        scores=(Score(attempt_id="r", score=1.0, ended_at=stage.bus.clock.now()),), count=60, mean=1.0
    )
    profile = NodeProfile(node_id="n1", last_seq=9, domains={"code": evidence})
    await store_profile(stage.bus, profile)
    await host(stage)
    await match(stage)
    await stage.put("match", task(stage))
    assert (await stage.seen("task", phase="execute")).award.evidence_seq == 9


# -- the bid window


async def timed(stage: Stage, env: Envelope, phase: str = "execute") -> float:
    """Return how long MATCH took over a task, in seconds."""
    await stage.put("match", env)
    done = await stage.seen("task", phase=phase, task_id=env.task_id)
    hop = done.hops[-1]
    return float(hop.finished - hop.started)


async def test_an_auction_ends_once_all_known_hosts_have_answered(stage: Stage) -> None:
    await host(stage, "h1")
    await host(stage, "h2")
    await match(stage, LONG)
    assert await timed(stage, task(stage)) < 1
    assert len(stage.all("task", phase="execute")[0].award.bids) == 2


async def test_an_auction_without_a_known_host_lasts_the_whole_window(stage: Stage) -> None:
    one = await host(stage, "h1")
    one.announce = quietly  # type: ignore[method-assign]
    await stage.phase("match", ClusterConfig(bid_window_ms=300))
    assert 0.29 < await timed(stage, task(stage)) < 2


async def quietly(**_facts: Any) -> None:
    """Make no offer."""


@pytest.mark.slow
async def test_a_proven_host_that_missed_three_windows_is_not_awaited_until_it_announces_itself(
    stage: Stage,
) -> None:
    await host(stage, "h1")
    silent = await host(stage, "h2", "n2")
    await match(stage, ClusterConfig(bid_window_ms=400), replace_fields(TIMINGS, unproven_every_s=0.0))
    await timed(stage, task(stage))
    silent.offer = lambda _: None
    for _ in range(3):
        assert await timed(stage, task(stage)) > 0.39
    assert await timed(stage, task(stage)) < 0.3
    await silent.announce()
    await silent.bus.requests.flush()
    assert await timed(stage, task(stage)) > 0.39


async def test_a_host_that_never_made_an_offer_slows_one_auction_in_two_seconds(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loom.phases.match.calls.presence.UNPROVEN_BURST", 1)
    await host(stage, "h1")
    await host(stage, "h2", "n2", offer=lambda _: None)
    await match(stage, ClusterConfig(bid_window_ms=400))
    assert await timed(stage, task(stage)) > 0.39
    assert await timed(stage, task(stage)) < 0.3


@pytest.mark.slow
async def test_twenty_thousand_invented_hosts_do_not_delay_a_task(stage: Stage) -> None:
    await host(stage, "h1")
    await match(stage)
    alone_s = max([await timed(stage, task(stage)) for _ in range(10)])
    for number in range(20_000):
        body = b'{"seq": 1, "nodes": [{"node_id": "m%d", "slots": 4}]}' % number
        await stage.bus.connection.publish(stage.bus.subjects.of("host", "local", f"m{number}"), body)
    took_s = sorted([await timed(stage, task(stage)) for _ in range(20)])
    assert took_s[-2] < alone_s + 1  # one of them may have waited for the newcomers
    assert stage.all("task", phase="execute")[-1].award.host_id == "h1"


@pytest.mark.slow
async def test_a_pinned_task_goes_to_the_first_of_two_hosts_that_announce_its_node(stage: Stage) -> None:
    await host(stage, "h1", "good-1")
    await match(stage)
    await timed(stage, task(stage, node_id="good-1"))
    await host(stage, "evil", "good-1")
    await timed(stage, task(stage, node_id="good-1"))
    assert [env.award.host_id for env in stage.all("task", phase="execute")] == ["h1", "h1"]


async def test_the_drain_of_another_owners_host_of_the_same_name_has_no_effect(stage: Stage) -> None:
    await host(stage, "h1", "good-1")
    await match(stage)
    body = HostAnnouncement(seq=9, draining=True)
    await stage.bus.connection.publish(stage.bus.subjects.of("host", "evil", "h1"), body)
    await stage.bus.requests.flush()
    await timed(stage, task(stage, node_id="good-1"))
    assert stage.all("task", phase="execute")[-1].award.host_id == "h1"


async def test_a_host_that_leaves_is_not_waited_for(stage: Stage) -> None:
    await host(stage, "h1")
    leaving = await host(stage, "h2", "n2", offer=lambda _: leaving.declines("draining"))
    await match(stage, LONG)
    await leaving.announce(draining=True)
    await until(lambda: stage.all("host", host_id="h2")[-1].draining, what="its announcement")
    await leaving.bus.requests.flush()
    assert await timed(stage, task(stage)) < 1
    leaving.offer = lambda _: None
    assert await timed(stage, task(stage)) < 1


# -- no nodes, or none left


@pytest.mark.slow
async def test_a_task_without_nodes_goes_to_scale_once_and_then_fails(stage: Stage) -> None:
    await match(stage, replace(SHORT, no_bids_after_s=0.5))
    env = task(stage)
    await stage.put("match", env)
    sent = await stage.seen("task", phase="scale")
    assert sent.award is None
    assert sent.spec.no_offers_since == pytest.approx(stage.bus.clock.now(), abs=2)
    await stage.put("match", sent)  # SCALE sends it back
    ended = await stage.seen("task", phase="evaluate")
    assert ended.error.code == "no_bids"
    assert stage.bus.clock.now() - sent.spec.no_offers_since >= 0.5
    assert len(stage.all("task", phase="scale")) == 1
    assert len([hop for hop in ended.hops if hop.phase == "match"]) == 1
    assert stage.all("later")


@pytest.mark.slow
async def test_a_node_that_comes_meanwhile_gets_the_task_and_the_clock_is_cleared(stage: Stage) -> None:
    await match(stage, SHORT)
    since = stage.bus.clock.now() - 5
    env = task(stage, spec=Spec(complexity=0.1, domains=("code",), method="given", no_offers_since=since))
    await stage.put("match", env)
    await stage.seen("later")
    await host(stage)
    won = await stage.seen("task", phase="execute")
    assert won.award.node_id == "n1"
    assert won.spec.no_offers_since is None


async def test_nodes_without_a_required_tool_count_as_no_nodes(stage: Stage) -> None:
    await host(stage, offer=declining("unqualified"))
    await match(stage, replace(SHORT, no_bids_after_s=0.0))
    env = task(stage, required_tools=("search",))
    await stage.put(
        "match", replace(env, spec=Spec(complexity=0, domains=("code",), method="given", no_offers_since=1))
    )
    ended = await stage.seen("task", phase="evaluate")
    assert ended.error.code == "no_bids"
    assert "search" in ended.error.message


async def test_a_task_for_which_only_excluded_nodes_are_left_fails_at_once(stage: Stage) -> None:
    await host(stage, offer=declining("unqualified"))
    await match(stage, SHORT)
    await stage.put("match", task(stage, excluded=("n1",), failures=1))
    assert (await stage.seen("task", phase="evaluate")).error.code == "no_bids"
    assert not stage.all("task", phase="execute")
    assert not stage.all("later")


async def test_a_task_waits_while_a_known_host_is_slow(stage: Stage) -> None:
    await host(stage, "h1", offer=declining("unqualified"))
    slow = await host(stage, "h2", "n2", offer=lambda _: slow.bids() if len(slow.calls) > 1 else None)
    await match(stage, ClusterConfig(bid_window_ms=100))
    await stage.put("match", task(stage, excluded=("n1",), failures=1))
    assert (await stage.seen("task", phase="execute")).award.node_id == "n2"


# -- all busy


async def test_a_task_waits_and_calls_again_while_all_nodes_are_busy(stage: Stage) -> None:
    one = await host(stage, offer=lambda _: one.bids() if len(one.calls) > 3 else one.declines("busy"))
    await match(stage, LONG)
    await stage.put("match", task(stage))
    assert (await stage.seen("task", phase="execute")).award.node_id == "n1"
    assert len(one.calls) == 4
    assert not stage.all("later")


@pytest.mark.slow
async def test_a_task_that_has_waited_long_goes_to_the_tail(stage: Stage) -> None:
    free = asyncio.Event()
    one = await host(stage, offer=lambda _: one.bids() if free.is_set() else one.declines("busy"))
    await match(stage, LONG)
    await stage.put("match", task(stage))
    await stage.seen("later")
    assert len(one.calls) > 3
    assert not stage.all("task", phase="evaluate")
    free.set()
    assert (await stage.seen("task", phase="execute")).award.node_id == "n1"


async def test_no_more_of_a_lane_is_read_while_enough_of_it_wait(stage: Stage) -> None:
    one = await host(stage, offer=lambda _: one.declines("busy"))
    replica = await match(stage, ClusterConfig(waiting_limit=4), LONG_HOLD)
    for n in range(20):
        await stage.put("match", task(stage, task_id=f"t{n}"))
    await until(lambda: len({call.lots[0].task_id for call in one.calls}) >= 4, what="four wait")
    await until(lambda: len(one.calls) > 40, what="they have called again and again")
    assert len({call.lots[0].task_id for call in one.calls}) <= 8
    await stage.put("match", task(stage, task_id="urgent", priority="critical"))
    await until(lambda: "urgent" in {call.lots[0].task_id for call in one.calls}, what="another lane is read")
    assert len({call.lots[0].task_id for call in one.calls}) <= 9
    one.offer = None
    await stage.seen("task", phase="execute", count=21, within_s=15)
    await replica.service.drain(1)


async def test_a_task_that_waits_past_its_deadline_fails(stage: Stage) -> None:
    one = await host(stage, offer=lambda _: one.declines("busy"))
    await match(stage, LONG)
    env = replace(task(stage), deadline=stage.bus.clock.now() + 0.2)
    await stage.put("match", env)
    assert (await stage.seen("task", phase="evaluate")).error.code == "deadline_exceeded"
    assert env.deadline <= stage.bus.clock.now() < env.deadline + 1.5
    await stage.put("match", replace(env, ad=ad(task_id="late")))
    assert (await stage.seen("task", phase="evaluate", task_id="late")).error.code == "deadline_exceeded"
    assert "late" not in {call.lots[0].task_id for call in one.calls}


async def test_a_drained_replica_gives_waiting_tasks_back(stage: Stage) -> None:
    one = await host(stage, offer=lambda _: one.declines("busy"))
    replica = await match(stage, LONG, LONG_HOLD)
    await stage.put("match", task(stage))
    await until(lambda: one.calls, what="it is called for")
    await replica.service.drain(0.1)
    await stage.seen("later")
    one.offer = None
    await match(stage, LONG)
    await stage.seen("task", phase="execute")


# -- tasks that end while they wait


async def put_record(stage: Stage, env: Envelope, state: TaskState) -> int:
    record = TaskRecord(task_id=env.task_id, state=state, envelope=env, admitted_at=stage.bus.clock.now())
    bucket = records(stage.bus)
    before = await bucket.get(env.task_id)
    return await bucket.update(env.task_id, record, before.revision if before else 0)


async def settled(stage: Stage) -> None:
    """Wait until MATCH has no task in hand, queued or scheduled."""

    async def empty() -> bool:
        return await stage.pending("TASKS") == len(stage.all("task", phase="execute"))

    await until(empty, what="nothing waits")


@pytest.mark.slow
async def test_a_task_cancelled_while_no_node_exists_is_dropped(stage: Stage) -> None:
    await match(stage, SHORT)
    env = task(
        stage, spec=Spec(complexity=0.1, domains=("code",), method="given", no_offers_since=stage.bus.clock.now())
    )
    await put_record(stage, env, "running")
    await stage.put("match", env)
    await stage.seen("later", count=2)
    await put_record(stage, env, "cancelled")
    await settled(stage)
    await host(stage)
    await stage.put("match", task(stage, task_id="next"))
    await stage.seen("task", phase="execute", task_id="next")
    assert [each.task_id for each in stage.all("task", phase="execute")] == ["next"]
    assert not stage.all("task", phase="evaluate")


@pytest.mark.slow
async def test_a_pinned_task_that_is_cancelled_is_not_awarded_when_its_node_comes(stage: Stage) -> None:
    await match(stage, SHORT)
    env = task(
        stage,
        node_id="late",
        spec=Spec(complexity=0.1, domains=("code",), method="given", no_offers_since=stage.bus.clock.now()),
    )
    await put_record(stage, env, "running")
    await stage.put("match", env)
    await stage.seen("later", count=2)
    await put_record(stage, env, "cancelled")
    await settled(stage)
    await host(stage, "h1", "late")
    await stage.put("match", task(stage, task_id="next", node_id="late"))
    await stage.seen("task", phase="execute", task_id="next")
    assert [each.task_id for each in stage.all("task", phase="execute")] == ["next"]


@pytest.mark.parametrize("state", ["cancelled", "failed", "succeeded"])
async def test_a_task_that_ends_while_all_nodes_are_busy_calls_for_bids_no_more(stage: Stage, state: TaskState) -> None:
    one = await host(stage, offer=lambda _: one.declines("busy"))
    await match(stage, LONG, LONG_HOLD)
    env = task(stage)
    await put_record(stage, env, "running")
    await stage.put("match", env)
    await until(lambda: len(one.calls) > 3, what="it waits in hand")
    await put_record(stage, env, state)
    await settled(stage)
    calls = len(one.calls)
    one.offer = None
    await stage.put("match", task(stage, task_id="next"))
    await stage.seen("task", phase="execute", task_id="next")
    assert [each.task_id for each in stage.all("task", phase="execute")] == ["next"]
    assert len(one.calls) == calls + 1
    assert not stage.all("later")


async def test_a_first_auction_reads_no_record(stage: Stage) -> None:
    await host(stage)
    replica = await match(stage)
    read: list[str] = []

    async def count(key: str) -> None:
        read.append(key)

    replica.service._records.get = count
    await stage.put("match", task(stage))
    await stage.seen("task", phase="execute")
    assert not read


# -- pins


async def test_a_pinned_task_goes_to_its_node_without_an_auction(stage: Stage) -> None:
    one = await host(stage, "h7", "me", "other")
    await match(stage)
    await stage.put("match", task(stage, node_id="me"))
    award = (await stage.seen("task", phase="execute")).award
    assert (award.node_id, award.host_id, award.pinned) == ("me", "h7", True)
    assert not one.calls


async def test_a_pinned_task_waits_for_its_node_and_fails_without_it(stage: Stage) -> None:
    await match(stage, replace(SHORT, no_bids_after_s=0.3))
    await stage.put("match", task(stage, node_id="absent"))
    sent = await stage.seen("task", phase="scale")
    await stage.put("match", sent)
    ended = await stage.seen("task", phase="evaluate")
    assert ended.error.code == "no_bids"
    assert "absent" in ended.error.message


@pytest.mark.slow
async def test_a_pinned_task_waits_for_its_node_and_gets_it(stage: Stage) -> None:
    await match(stage, SHORT)
    await stage.put("match", task(stage, node_id="late"))
    await stage.put("match", await stage.seen("task", phase="scale"))
    await stage.seen("later")
    await host(stage, "h1", "late")
    assert (await stage.seen("task", phase="execute")).award.node_id == "late"


async def test_a_task_pinned_to_a_node_that_failed_it_is_given_up(stage: Stage) -> None:
    await host(stage)
    await match(stage)
    await stage.put("match", task(stage, node_id="n1", excluded=("n1",), failures=1))
    assert (await stage.seen("task", phase="evaluate")).error.code == "no_bids"


@pytest.mark.parametrize("pinned", [None, "n1"])
async def test_a_task_whose_node_was_busy_pauses_first(pinned: str | None, stage: Stage) -> None:
    await host(stage)
    await match(stage)
    busy = TaskError(code="node_busy", message="full")
    assert await timed(stage, task(stage, node_id=pinned, last_error=busy, busy_retries=4)) >= 0.08


# -- other cases


async def test_an_envelope_without_a_spec_is_a_dead_letter(stage: Stage) -> None:
    await match(stage)
    await stage.put("match", task(stage, spec=None))
    assert (await stage.seen("task", phase="evaluate")).error.code == "dead_letter"
    assert await stage.pending("DEAD") == 1


async def test_two_replicas_share_the_tasks(stage: Stage) -> None:
    await host(stage)
    one, two = await match(stage), await match(stage)
    started = time.monotonic()
    for n in range(30):
        await stage.put("match", task(stage, task_id=f"t{n}"))
    await stage.seen("task", phase="execute", count=30)
    won = stage.all("task", phase="execute")
    assert {env.task_id for env in won} == {f"t{n}" for n in range(30)}
    assert {env.hops[-1].instance for env in won} <= {one.bus.instance, two.bus.instance}
    assert time.monotonic() - started < 5


# -- misspelt domains


def naming(domain: str) -> tuple[AnnouncedNode, ...]:
    return (AnnouncedNode(node_id="n1", domains=(AnnouncedDomain(domain=domain), AnnouncedDomain(domain="*"))),)


async def test_an_award_in_an_unknown_domain_has_a_warning_with_the_nearest_one(stage: Stage) -> None:
    one = await host(stage, nodes=naming("sales"))
    await match(stage)
    await stage.put("match", task(stage, task_id="t1", domain="Sael"))
    awarded = await stage.seen("task", phase="execute", task_id="t1")
    assert awarded.warnings == ("no node rates itself in 'Sael'; did you mean 'sales'?",)
    assert one.calls[0].domain == "Sael"
    found = task(stage, task_id="t2", domain="", spec=Spec(complexity=0.3, domains=("sael",), method="heuristic"))
    await stage.put("match", found)
    assert (await stage.seen("task", phase="execute", task_id="t2")).warnings == ()


async def test_one_host_that_names_the_domain_leaves_no_warning(stage: Stage) -> None:
    await host(stage, "h1", nodes=naming("sales"))
    await host(stage, "h2", nodes=naming("Sael"))
    await match(stage)
    await stage.put("match", task(stage, task_id="t1", domain="sael"))
    assert (await stage.seen("task", phase="execute", task_id="t1")).warnings == ()


async def test_evidence_in_the_domain_leaves_no_warning(stage: Stage) -> None:
    await host(stage, nodes=naming("sales"))
    scores = (Score(attempt_id="a", score=1, ended_at=1),)
    profile = NodeProfile(node_id="n9", domains={"sael": DomainEvidence(scores=scores, count=1)})
    await store_profile(stage.bus, profile)
    await match(stage)
    await stage.put("match", task(stage, domain="sael"))
    assert (await stage.seen("task", phase="execute")).warnings == ()


async def test_a_task_that_no_node_takes_ends_with_the_nearest_domain_as_its_reason(stage: Stage) -> None:
    await host(stage, offer=declining("unqualified"), nodes=naming("sales"))
    await match(stage, ClusterConfig(no_bids_after_s=0.2))
    await stage.put("match", task(stage, domain="sael"))
    await stage.put("match", await stage.seen("task", phase="scale"))
    ended = await stage.seen("task", phase="evaluate")
    sentence = "no node rates itself in 'sael'; did you mean 'sales'?"
    assert (ended.error.code, ended.error.message, ended.warnings) == ("no_bids", sentence, (sentence,))


async def test_a_task_whose_domain_no_node_takes_names_the_domain(stage: Stage) -> None:
    await host(stage, offer=declining("unqualified"))
    await match(stage, ClusterConfig(no_bids_after_s=0.2))
    await stage.put("match", task(stage, domain="poetry"))
    await stage.put("match", await stage.seen("task", phase="scale"))
    error = (await stage.seen("task", phase="evaluate")).error
    assert error.message.startswith("no node accepts tasks of the domain 'poetry'; start a node for it")
