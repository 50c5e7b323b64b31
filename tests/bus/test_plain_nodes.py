"""Nodes that announce themselves and answer no call: MATCH bids for them."""

import time
from typing import Any

import pytest
from support.auctions import announced, key
from support.builders import ad, envelope
from support.evidence import store_profile
from support.fake_host import FakeHost
from support.phase_harness import Replica, Stage
from support.wait import until

from loom.phases.match.announced_nodes import AnnouncedNodes
from loom.phases.match.calls.plain_bids import REWARD_DELAY_S, PlainNodes
from loom.phases.match.timings import MatchTimings
from loom.runner.timings import ServiceTimings
from loom.schemas.auction import AnnouncedDomain, AnnouncedNode, Award
from loom.schemas.config import ClusterConfig
from loom.schemas.envelope import Envelope
from loom.schemas.learning.profile import DomainEvidence, NodeProfile, Score
from loom.schemas.task import TaskError

LONG = ClusterConfig(bid_window_ms=5000)
"""A window so long that waiting for it would fail the test."""
BODY = b'{"nodes": [{"node_id": "sh", "plain": true, "domains": [{"domain": "Code", "self_rating": 0.8}]}]}'


def plain(node_id: str = "sh", **facts: Any) -> AnnouncedNode:
    return AnnouncedNode(node_id=node_id, plain=True, **facts)


async def announce(stage: Stage, replica: Replica, body: bytes = BODY, host: str = "p1", owner: str = "local") -> None:
    await stage.bus.connection.publish(stage.bus.subjects.of("host", owner, host), body)
    await stage.bus.requests.flush()
    await replica.bus.requests.flush()


async def outcome(stage: Stage, *, phase: str = "execute", **facts: Any) -> Envelope:
    about = {name: facts.pop(name) for name in list(facts) if name in Envelope.__struct_fields__}
    env = envelope(ad(**facts), now=stage.bus.clock.now(), **about)
    await stage.put("match", env)
    done: Envelope = await stage.seen("task", phase=phase, task_id=env.task_id)
    return done


async def award(stage: Stage, **facts: Any) -> Award:
    won = (await outcome(stage, **facts)).award
    assert won is not None
    return won


async def test_a_plain_node_wins_by_its_announcement_alone(stage: Stage) -> None:
    replica = await stage.phase("match", LONG)
    await announce(stage, replica, owner="acme")
    started = time.monotonic()
    won = await award(stage)
    assert time.monotonic() - started < 2
    assert (won.owner, won.host_id, won.node_id, won.plain, won.max_run_s) == ("acme", "p1", "sh", True, None)
    [bid] = won.bids
    assert (bid.self_rating, bid.load, bid.tools) == (0.8, 0.0, 1.0)
    assert not stage.all("auction")


async def test_a_plain_node_competes_with_bidding_nodes_and_its_host_is_not_awaited(stage: Stage) -> None:
    replica = await stage.phase("match", LONG)
    one = await FakeHost(await stage.connect("node"), "h1").start()
    await announce(stage, replica)
    started = time.monotonic()
    won = await award(stage)
    assert time.monotonic() - started < 2
    assert [(bid.node_id, bid.host_id) for bid in won.bids] == [("sh", "p1"), ("n1", "h1")]
    assert one.calls


@pytest.mark.parametrize(
    ("facts", "task"),
    [
        ({"domains": (AnnouncedDomain(domain="sales"),)}, {}),
        ({"tools": ("search",)}, {"required_tools": ("shell",)}),
        ({"domains": (AnnouncedDomain(domain="code", self_rating=0.0), AnnouncedDomain(domain="*"))}, {}),
    ],
    ids=["another domain", "a missing tool", "a rating of 0"],
)
async def test_a_plain_node_that_does_not_qualify_does_not_bid(
    stage: Stage, facts: dict[str, Any], task: dict[str, Any]
) -> None:
    replica = await stage.phase("match", LONG)
    host = FakeHost(stage.bus, "p1", nodes=(plain(**facts),))
    await host.announce()
    await replica.bus.requests.flush()
    assert (await outcome(stage, phase="scale", **task)).award is None


async def test_a_plain_node_that_has_failed_the_task_gets_it_no_more(stage: Stage) -> None:
    replica = await stage.phase("match", LONG)
    await announce(stage, replica)
    failed = await outcome(stage, phase="evaluate", excluded=("sh",), failures=1)
    assert failed.error is not None
    assert (failed.error.code, stage.all("later")) == ("no_bids", [])


async def test_a_pinned_task_goes_to_a_plain_node_with_its_longest_run(stage: Stage) -> None:
    replica = await stage.phase("match", LONG)
    await FakeHost(stage.bus, "p1", nodes=(plain(max_run_s=5.0),)).announce()
    await replica.bus.requests.flush()
    won = await award(stage, node_id="sh")
    assert (won.pinned, won.plain, won.max_run_s) == (True, True, 5.0)


async def test_a_plain_node_fills_its_slots_until_its_tasks_are_judged_or_returned(
    stage: Stage,
) -> None:
    stage.timings = ServiceTimings(match=MatchTimings(min_pause_s=0.01, max_pause_s=0.05))
    replica = await stage.phase("match", LONG)
    await FakeHost(stage.bus, "p1", nodes=(plain(slots=2),)).announce()
    await replica.bus.requests.flush()
    first, second = await outcome(stage), await outcome(stage)
    assert [env.award.bids[0].load for env in (first, second) if env.award] == [0.0, 0.5]
    for number in range(2):
        await stage.put("match", envelope(ad(task_id=f"w{number}"), now=stage.bus.clock.now()))
    await until(lambda: replica.service._loop._slots["match_normal"].waiting == 2, what="two wait")
    scores = (Score(attempt_id=f"{first.task_id}:1", score=1.0, ended_at=1.0),)
    profile = NodeProfile(node_id="sh", domains={"code": DomainEvidence(scores=scores, count=1, mean=1.0)})
    await store_profile(stage.bus, profile)
    await stage.seen("task", phase="execute", count=3)
    lost = TaskError(code="node_lost", message="silent")
    again = envelope(second.ad, now=stage.bus.clock.now(), attempt=2, excluded=("sh",), failures=1, last_error=lost)
    await stage.put("match", again)
    await stage.seen("task", phase="execute", count=4)
    assert {env.task_id for env in stage.all("task", phase="execute")} == {first.task_id, second.task_id, "w0", "w1"}


def test_an_award_that_earns_no_reward_holds_its_place_for_its_longest_run() -> None:
    now = 100.0
    nodes = AnnouncedNodes()
    nodes.update(announced("p1", nodes=(plain(max_run_s=5.0),)))
    load = PlainNodes(nodes, lambda: now)
    place = (key("p1"), "sh")
    assert load.record_award(place, "t1", 1) is not None
    assert load.record_award(place, "t1", 1) is not None, "a message that comes again is one award"
    assert load._used_slots[place] == 1
    now += 5.0 + REWARD_DELAY_S
    load._expire()
    assert (load._used_slots[place], load._awards) == (0, {})
    assert load.record_award((key("p1"), "other"), "t1", 1) is None
