"""Tasks that arrive together and are alike share a call for bids."""

from collections import Counter
from typing import Any

import pytest
from msgspec.structs import replace
from support.builders import ad, envelope
from support.fake_host import FakeHost
from support.phase_harness import Stage
from support.wait import until

from loom.phases.match.auctioneer import Auctioneer
from loom.schemas.auction import MAX_LOTS, AnnouncedNode, Bid
from loom.schemas.config import ClusterConfig
from loom.schemas.envelope import Envelope, Hop
from loom.schemas.errors import BusUnavailable

LONG = ClusterConfig(bid_window_ms=3000)


@pytest.fixture
async def host(stage: Stage) -> FakeHost:
    return await FakeHost(await stage.connect("node"), "h1", ("n1",)).start()


def tasks(stage: Stage, count: int, **facts: object) -> list[Envelope]:
    return [envelope(ad(task_id=f"t{n}", **facts), now=stage.bus.clock.now()) for n in range(count)]


async def award_all(stage: Stage, queued: list[Envelope], config: ClusterConfig = LONG) -> list[Envelope]:
    """Store tasks before MATCH starts, so that they arrive together, and return them with their awards."""
    for task in queued:
        await stage.put("match", task)
    await stage.phase("match", config)
    await stage.seen("task", phase="execute", count=len(queued))
    hops: list[Envelope] = stage.all("task", phase="execute")
    return hops


async def test_tasks_that_arrive_together_share_calls_of_at_most_sixteen(stage: Stage, host: FakeHost) -> None:
    queued = tasks(stage, 3 * MAX_LOTS)
    awarded = await award_all(stage, queued)
    assert {task.task_id for task in awarded} == {task.task_id for task in queued}
    assert Counter(lot.task_id for call in host.calls for lot in call.lots) == Counter(t.task_id for t in queued)
    assert max(len(call.lots) for call in host.calls) <= MAX_LOTS
    assert len(host.calls) < len(queued) / 2


@pytest.mark.parametrize(
    "other",
    [{"domain": "data"}, {"required_tools": ("search",)}, {"priority": "high"}],
    ids=["another domain", "other tools", "a priority with slots of its own"],
)
async def test_tasks_that_differ_have_calls_of_their_own(
    stage: Stage, host: FakeHost, other: dict[str, object]
) -> None:
    host.nodes = (AnnouncedNode(node_id="n1", tools=("search",)),)
    host.offer = lambda call: host.bids(Bid(node_id="n1", tools=call.required_tools))
    queued = tasks(stage, 4)
    odd = envelope(ad(task_id="odd", **other), now=stage.bus.clock.now())
    await award_all(stage, [*queued, odd])
    [call] = [call for call in host.calls if "odd" in {lot.task_id for lot in call.lots}]
    assert len(call.lots) == 1


async def test_the_oldest_task_of_a_call_gets_the_last_slot(stage: Stage, host: FakeHost) -> None:
    host.offer = lambda _: host.bids(Bid(node_id="n1", free=1))
    now = stage.bus.clock.now()
    aged = [
        replace(task, hops=(Hop(phase="sense", instance="s", started=now - age, finished=now),))
        for task, age in zip(tasks(stage, 3), (1, 30, 5), strict=True)
    ]
    for task in aged:
        await stage.put("match", task)
    await stage.phase("match", LONG)
    first = await stage.seen("task", phase="execute")
    assert first.task_id == "t1"


async def test_a_bid_for_some_tasks_of_a_call_wins_no_others(stage: Stage, host: FakeHost) -> None:
    host.node_ids = ("n1", "n2")
    host.offer = lambda _: host.bids(Bid(node_id="n1", self_rating=0.2), Bid(node_id="n2", tasks=("t1", "t3")))
    awarded = await award_all(stage, tasks(stage, 4))
    winners = {task.task_id: task.award.node_id for task in awarded if task.award}
    assert winners == {"t0": "n1", "t1": "n2", "t2": "n1", "t3": "n2"}


async def test_an_auction_that_fails_gives_each_of_its_tasks_back(
    stage: Stage, host: FakeHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server delivers them again, and the next auction decides them."""
    hold, failures = Auctioneer._call_for_bids, []

    async def fail_once(self: Auctioneer, group: Any) -> Any:
        if not failures:
            failures.extend(task.envelope.task_id for task in group)
            raise BusUnavailable("the server is away")
        return await hold(self, group)

    monkeypatch.setattr(Auctioneer, "_call_for_bids", fail_once)
    awarded = await award_all(stage, tasks(stage, 3))
    assert failures
    assert {task.task_id for task in awarded} == {"t0", "t1", "t2"}


async def test_beyond_64_hosts_a_call_goes_to_a_shortlist_and_to_all_only_without_bids(stage: Stage) -> None:
    bus = await stage.connect("node")
    hosts = [await FakeHost(bus, f"h{n}", (f"n{n}",)).start() for n in range(80)]
    match = await stage.phase("match", LONG)
    await until(lambda: match.service._directory.bidding_hosts == 80, what="all hosts are known")
    await stage.put("match", envelope(ad(task_id="t1"), now=stage.bus.clock.now()))
    await stage.seen("task", phase="execute", task_id="t1")
    assert sum(len(host.calls) for host in hosts) == 64
    for host in hosts[:-1]:
        host.offer = lambda _: hosts[0].declines("busy")
        host.calls.clear()
    last = hosts[-1]
    last.calls.clear()
    await stage.put("match", envelope(ad(task_id="t2"), now=stage.bus.clock.now()))
    won = await stage.seen("task", phase="execute", task_id="t2")
    assert won.award.node_id == "n79"
    assert sum(len(host.calls) for host in hosts) >= 64
