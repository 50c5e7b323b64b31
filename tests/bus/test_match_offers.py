"""The owner of an offer, the call it answers, and offers that answer no call."""

from typing import Any

import pytest
from support.auctions import key
from support.builders import ad, envelope
from support.fake_host import FakeHost
from support.phase_harness import Replica, Stage
from support.wait import until

from loom.bus.logs.discard_reports import DiscardReport
from loom.phases.match.timings import MatchTimings
from loom.runner.timings import ServiceTimings
from loom.schemas.auction import AnnouncedDomain, AnnouncedNode, Award, Bid, CallForBids, Offer
from loom.schemas.config import ClusterConfig
from loom.schemas.envelope import Envelope

SHORT = ClusterConfig(bid_window_ms=60)


async def host(stage: Stage, host_id: str = "h1", *node_ids: str, **facts: Any) -> FakeHost:
    one = await FakeHost(await stage.connect("node"), host_id, node_ids or ("n1",), **facts).start()
    await stage.seen("host", host_id=host_id)
    return one


async def match(stage: Stage, *hosts: FakeHost, config: ClusterConfig = SHORT) -> Replica:
    """Start MATCH and wait until it knows the hosts."""
    replica = await stage.phase("match", config)
    for one in hosts:
        await one.announce()
        await one.bus.requests.flush()
    await replica.bus.requests.flush()
    return replica


async def awarded(stage: Stage, **facts: Any) -> Award:
    about = {name: facts.pop(name) for name in list(facts) if name in Envelope.__struct_fields__}
    env = envelope(ad(**facts), now=stage.bus.clock.now(), **about)
    await stage.put("match", env)
    award: Award | None = (await stage.seen("task", phase="execute", task_id=env.task_id)).award
    assert award is not None
    return award


def left_out(replica: Replica, host: str) -> DiscardReport:
    return replica.bus.discards.hosts.get(host, DiscardReport())


# -- owners


async def test_an_award_names_the_owner_of_the_subject_and_excludes_no_other_owners_evidence(
    stage: Stage,
) -> None:
    one = await host(stage, "h1", owner="acme", offer=lambda _: one.bids(Bid(node_id="n1", self_rating=0.9)))
    await match(stage, one)
    award = await awarded(stage, excluded=("n1",))
    assert (award.owner, award.host_id, award.node_id) == ("acme", "h1", "n1")
    assert [(bid.owner, bid.host_id) for bid in award.bids] == [("acme", "h1")]


async def test_hosts_of_two_owners_under_one_id_make_an_offer_each(stage: Stage) -> None:
    local = await host(stage, "h1", "n1", offer=lambda _: local.bids(Bid(node_id="n1", self_rating=0.1)))
    other = await host(stage, "h1", "n1", owner="acme", offer=lambda _: other.bids(Bid(node_id="n1", self_rating=1)))
    await match(stage, local, other, config=ClusterConfig(bid_window_ms=3000))
    award = await awarded(stage)
    assert [(bid.owner, bid.node_id) for bid in award.bids] == [("acme", "n1"), ("local", "n1")]


async def test_a_pin_without_an_owner_is_to_a_local_node(stage: Stage) -> None:
    local, other = await host(stage, "h1", "n1"), await host(stage, "h2", "n1", owner="acme")
    await match(stage, local, other)
    assert (await awarded(stage, node_id="n1")).host_id == "h1"


# -- offers that answer no call


async def test_an_offer_to_a_call_that_was_never_made_is_counted_for_its_host(stage: Stage) -> None:
    one = await host(stage)
    replica = await match(stage, one)
    subject = stage.bus.subjects.of("offer", "acme", "h9", replica.bus.instance, "c0ffee")
    await stage.bus.connection.publish(subject, Offer(bids=(Bid(node_id="n9"),)))
    await until(lambda: left_out(replica, "acme.h9").counts, what="it is counted")
    assert left_out(replica, "acme.h9").counts == {"offers": 1}
    assert "not published such a call" in left_out(replica, "acme.h9").last


async def test_an_offer_to_another_replica_does_not_arrive(stage: Stage) -> None:
    one = await host(stage)
    first, second = await match(stage, one), await match(stage, one)
    subject = stage.bus.subjects.of("offer", "local", "h9", first.bus.instance, "c0ffee")
    await stage.bus.connection.publish(subject, Offer())
    await until(lambda: left_out(first, "h9").counts, what="the first counts it")
    await second.bus.requests.flush()
    assert not left_out(second, "h9").counts


async def test_an_offer_after_the_window_is_counted_unless_its_host_was_not_awaited(
    stage: Stage,
) -> None:
    prompt = await host(stage, "h1")
    late = await host(stage, "h2", "n2", offer=lambda _: None)
    replica = await match(stage, prompt, late)
    await awarded(stage)  # waits for h2 in vain
    await late.answer(late.calls[0], late.bids())
    await until(lambda: left_out(replica, "h2").counts, what="it is counted")
    assert left_out(replica, "h2").counts == {"offers": 1}
    assert "LOOM_BID_WINDOW_MS" in left_out(replica, "h2").last
    replica.service._directory._presence.remove(key("h2"))
    await awarded(stage)
    await late.answer(late.calls[1], late.bids())
    await late.bus.requests.flush()
    await replica.bus.requests.flush()
    assert left_out(replica, "h2").counts == {"offers": 1}


# -- lots


async def test_a_bid_for_other_tasks_of_its_call_does_not_count(stage: Stage) -> None:
    def offer(call: CallForBids) -> Offer:
        task_id = call.lots[0].task_id
        others = (Bid(node_id="n2", self_rating=1.0, tasks=("t9",)), Bid(node_id="n3", self_rating=1.0, tasks=()))
        return one.bids(Bid(node_id="n1", self_rating=0.1, tasks=("t9", task_id)), *others)

    one = await host(stage, "h1", "n1", "n2", "n3", offer=offer)
    await match(stage, one)
    assert [bid.node_id for bid in (await awarded(stage)).bids] == ["n1"]


# -- announced hosts that make no offer


@pytest.fixture
def hurry(stage: Stage) -> None:
    timings = MatchTimings(min_pause_s=0.01, max_pause_s=0.05, no_offers_pause_s=30.0, max_hold_s=30.0)
    stage.timings = ServiceTimings(match=timings)


@pytest.mark.usefixtures("hurry")
async def test_a_task_waits_for_an_announced_node_whose_host_has_not_answered(stage: Stage) -> None:
    slow = await host(stage, offer=lambda _: slow.bids() if len(slow.calls) > 2 else None)
    await match(stage, slow)
    await awarded(stage)
    assert not [env for env in stage.all("task", phase="execute") if env.award is None]


@pytest.mark.usefixtures("hurry")
@pytest.mark.parametrize(
    "node",
    [
        AnnouncedNode(node_id="n1", domains=(AnnouncedDomain(domain="sales"),)),
        AnnouncedNode(node_id="n1", domains=(AnnouncedDomain(domain="code", self_rating=0.0),)),
        AnnouncedNode(node_id="n1", domains=()),
    ],
    ids=["another domain", "a rating of 0", "no domain"],
)
async def test_announced_nodes_that_do_not_qualify_do_not_keep_a_task_waiting(
    stage: Stage, node: AnnouncedNode
) -> None:
    silent = await host(stage, nodes=(node,), offer=lambda _: None)
    await match(stage, silent)
    env = envelope(ad(), now=stage.bus.clock.now())
    await stage.put("match", env)
    assert (await stage.seen("task", phase="scale", task_id=env.task_id)).award is None


@pytest.mark.usefixtures("hurry")
@pytest.mark.parametrize("pinned", [None, "n2"])
async def test_a_task_without_bidders_is_auctioned_again_when_unknown_nodes_are_announced(
    stage: Stage, pinned: str | None
) -> None:
    unable = await host(stage, offer=lambda _: unable.declines("unqualified"))
    replica = await match(stage, unable)
    env = envelope(ad(node_id=pinned), now=stage.bus.clock.now())
    await stage.put("match", env)
    asks = await stage.seen("task", phase="scale", task_id=env.task_id)
    assert asks.award is None
    await stage.put("match", asks)
    await until(lambda: replica.service._loop._slots["match_normal"].waiting == 1, what="it waits in hand")
    await host(stage, "h2", "n2")
    won = await stage.seen("task", phase="execute", task_id=env.task_id)
    assert (won.award.node_id, won.spec.no_offers_since) == ("n2", None)
    assert not stage.all("later")
