"""Waits of MATCH: for hosts that have not announced themselves yet, and for nodes without a free slot."""

import asyncio
import time
from typing import Any

import pytest
from msgspec.structs import replace
from support.auctions import announced, key, offer
from support.builders import ad, awarded, envelope
from support.fake_host import FakeHost
from support.phase_harness import Stage
from support.wait import until

from loom.phases.match.announced_nodes import AnnouncedNodes
from loom.phases.match.busy_nodes import MAX_TASKS, BusyNodes
from loom.phases.match.timings import MatchTimings
from loom.runner.services import build
from loom.runner.timings import ServiceTimings
from loom.schemas.auction import Bid
from loom.schemas.config import ClusterConfig
from loom.schemas.envelope import Envelope
from loom.schemas.task import TaskError

BUSY = TaskError(code="node_busy", message="full")


async def host(stage: Stage, host_id: str = "h1", *node_ids: str, **facts: Any) -> FakeHost:
    return await FakeHost(await stage.connect("node"), host_id, node_ids or ("n1",), **facts).start()


# -- the start


@pytest.mark.slow
async def test_the_first_task_is_taken_once_hosts_have_had_time_to_announce_themselves(stage: Stage) -> None:
    slow = await host(stage, "h2", "good", offer=lambda _: slow.bids(Bid(node_id="good", self_rating=0.9)))
    announce = slow.announce

    async def after_a_while(**facts: Any) -> None:
        await asyncio.sleep(0.3 * MatchTimings.announce_wait_s)
        await announce(**facts)

    slow.announce = after_a_while  # type: ignore[method-assign]
    await host(stage, "h1", "bad", offer=lambda _: None)
    await stage.put("match", envelope(ad(task_id="t1"), now=stage.bus.clock.now()))
    match = build("match", await stage.connect("match"), ClusterConfig())
    began = time.monotonic()
    await match.start()
    try:
        assert MatchTimings.announce_wait_s <= time.monotonic() - began < 4
        assert (await stage.seen("task", phase="execute")).award.node_id == "good"
    finally:
        await match.drain(0)


async def test_a_phase_whose_hosts_start_after_it_in_its_process_takes_tasks_at_once(stage: Stage) -> None:
    match = build("match", await stage.connect("match"), ClusterConfig(), hosts_here=True)
    began = time.monotonic()
    await match.start()
    assert time.monotonic() - began < MatchTimings.announce_wait_s
    await match.drain(0)


# -- nodes without a free slot


def rejected(stage: Stage, env: Envelope, node_id: str, host_id: str = "h1") -> Envelope:
    """The envelope as EVALUATE sends it back from a busy node."""
    facts = {"attempt": env.attempt + 1, "busy_retries": 1, "last_error": BUSY}
    return awarded(envelope(env.ad, now=stage.bus.clock.now(), **facts), node_id, host_id)


async def test_a_busy_node_ranks_last_for_the_task_until_its_host_announces_itself(
    stage: Stage,
) -> None:
    stage.timings = ServiceTimings(match=MatchTimings(min_pause_s=0.01, max_pause_s=0.05, max_hold_s=30.0))
    both = (Bid(node_id="best", self_rating=0.9), Bid(node_id="next", self_rating=0.2))
    one = await host(stage, "h1", "best", "next", offer=lambda _: one.bids(*both))
    match = await stage.phase("match")
    await until(lambda: match.service._directory.has_nodes, what="the host is known")
    env = envelope(ad(task_id="t1"), now=stage.bus.clock.now())
    await stage.put("match", rejected(stage, env, "best"))
    assert (await stage.seen("task", phase="execute")).award.node_id == "next"
    await stage.put("match", envelope(ad(task_id="t2"), now=stage.bus.clock.now()))
    assert (await stage.seen("task", phase="execute", task_id="t2")).award.node_id == "best", "by that task alone"

    again = rejected(stage, rejected(stage, env, "best"), "next")
    await stage.put("match", again)
    hop = await stage.seen("task", phase="execute", count=2, task_id="t1")
    assert hop.award.node_id == "best", "no other node bids"
    await one.announce()
    await until(lambda: not match.service._auctioneer._busy._busy_nodes_of("t1"), what="the announcement has arrived")
    await stage.put("match", replace(again, attempt=again.attempt + 1))
    assert (await stage.seen("task", phase="execute", count=3, task_id="t1")).award.node_id == "best"


def nodes(*hosts: str) -> AnnouncedNodes:
    known = AnnouncedNodes()
    for name in hosts:
        known.update(announced(name, "n1"))
    return known


def test_a_node_on_two_hosts_is_passed_over_on_the_one_that_was_busy() -> None:
    busy = BusyNodes(nodes("h1", "h2"))
    busy.record_rejection("t1", (key("h1"), "n1"))
    offers = busy.without_busy("t1", [offer(name, [Bid(node_id="n1"), Bid(node_id="n2")]) for name in ("h1", "h2")])
    assert [[bid.node_id for bid in one.bids] for one in offers] == [["n2"], ["n1", "n2"]]
    assert busy.without_busy("t2", offers) is offers


def test_the_list_of_busy_nodes_is_bounded_and_forgotten_with_their_host() -> None:
    known = nodes("h1")
    busy = BusyNodes(known)
    for number in range(MAX_TASKS + 10):
        busy.record_rejection(f"t{number}", (key("h1"), "n1"))
    busy.record_rejection("t", (key("gone"), "n1"))
    assert len(busy._tasks) == MAX_TASKS
    known.remove_host(key("h1"))
    offers = [offer("h1", [Bid(node_id="n1")])]
    assert busy.without_busy(f"t{MAX_TASKS}", offers) is offers
    assert len(busy._tasks) == MAX_TASKS - 1
