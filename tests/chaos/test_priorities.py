"""Urgent tasks overtake any number of other tasks."""

import asyncio
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractAsyncContextManager
from statistics import median

import pytest
from support.auctions import offer
from support.builders import ad, envelope
from support.nodes import node
from support.services import running_phases

from loom.agents.host.node_host import NodeHost
from loom.agents.host.runs import Run
from loom.agents.host.slots import RunQueue
from loom.bus import task_client, topology
from loom.bus.bus import Bus
from loom.phases.match.ranked_bids import AllBusy, AuctionResult, Awarded, decide
from loom.phases.match.scoring import AuctionContext, award_hold_s
from loom.runner.server.nats_server import NatsServer
from loom.runner.services import running_nodes
from loom.schemas.auction import Bid
from loom.schemas.run import RunRequest
from loom.schemas.task import PRIORITIES, Priority, TaskAd

FLOOD = 5000
AT_ONCE = 250
RUN_S = 0.1
CRITICALS = 9
TRIES = 3  # the machine may be busy with something else for a moment
WITHIN_S = 30

RAISED = pytest.mark.parametrize(("priority", "raised"), [(name, name in ("high", "critical")) for name in PRIORITIES])
"""Each priority, and whether it may have what is kept."""


@pytest.fixture
def server() -> Iterator[NatsServer]:
    """A server of one test: tasks queued at the end are discarded with it."""
    server = NatsServer()
    server.start()
    yield server
    server.kill()
    server.stop()


async def work(job: RunRequest) -> str:
    await asyncio.sleep(RUN_S)
    return job.priority


def hosting(url: str, name: str) -> AbstractAsyncContextManager[NodeHost]:
    return running_nodes(url, lambda: [node(name, work, any=0.9)], slots=2, drain_timeout_s=0)


async def flood(bus: Bus, count: int) -> None:
    """Submit a number of low tasks, and check that each is accepted."""
    for _ in range(count // AT_ONCE):
        ads = [TaskAd(domain="any", description="can wait", priority="low", wait=False) for _ in range(AT_ONCE)]
        await asyncio.gather(*(task_client.request(bus, bus.subjects.submit, ad, timeout_s=WITHIN_S) for ad in ads))


async def latency(bus: Bus) -> float:
    """Return the seconds from the submission of a critical task to its answer."""
    begun = time.monotonic()
    handle = await task_client.publish(bus, TaskAd(domain="any", description="now", priority="critical"), deltas=False)
    assert await handle.content(WITHIN_S) == "critical"
    return time.monotonic() - begun


@pytest.mark.slow
@pytest.mark.timeout(120)
async def test_a_critical_task_overtakes_five_thousand_low_ones(server: NatsServer) -> None:
    url = server.url
    async with running_phases(url), hosting(url, "n1"), hosting(url, "n2"), Bus(url) as bus:
        empty = [await latency(bus) for _ in range(CRITICALS)]
        await flood(bus, FLOOD)
        waiting = (await topology.stream_state(bus, "INTAKE"))["messages"]
        for _ in range(TRIES):
            loaded = [await latency(bus) for _ in range(CRITICALS)]
            if median(loaded) <= 3 * median(empty):
                break
        left = (await topology.stream_state(bus, "INTAKE"))["messages"]

    assert 0 < left <= waiting  # the flood outlasted the criticals
    assert median(loaded) <= 3 * median(empty), (empty, loaded)


@RAISED
def test_only_urgent_tasks_are_awarded_to_a_node_at_full_load(priority: Priority, raised: bool) -> None:
    task = envelope(ad(priority=priority), now=0)
    full = offer("h1", [Bid(node_id="n1", self_rating=0.9, load=1.0, backlog=13)])
    free = offer("h2", [Bid(node_id="n2", self_rating=0.1, load=0.2)])

    assert isinstance(decide(task, [full], AuctionContext()), Awarded if raised else AllBusy)
    assert isinstance(decide(task, [full, free], AuctionContext()), Awarded)


@RAISED
def test_a_slot_of_a_recent_award_is_awarded_again_only_to_an_urgent_task(priority: Priority, raised: bool) -> None:
    only = offer("h1", [Bid(node_id="n1", load=0.9, backlog=7, free=2)])

    def verdict(taken: int) -> AuctionResult:
        return decide(
            envelope(ad(priority=priority), now=0), [only], AuctionContext(recent_awards={("local", "h1", "n1"): taken})
        )

    assert isinstance(verdict(1), Awarded)
    assert isinstance(verdict(2), Awarded if raised else AllBusy)


def test_recent_awards_spread_a_burst_over_equal_nodes() -> None:
    offers = [offer(f"h{n}", [Bid(node_id=f"n{n}", self_rating=0.9, free=16)]) for n in (1, 2)]
    taken: Counter[tuple[str, str, str]] = Counter()
    for number in range(20):
        verdict = decide(envelope(ad(task_id=f"t{number}"), now=0), offers, AuctionContext(recent_awards=taken))
        assert isinstance(verdict, Awarded)
        taken["local", verdict.award.host_id, verdict.award.node_id] += 1

    assert sorted(taken.values()) == [10, 10]


@pytest.mark.parametrize(
    ("bid", "held_s"),
    [(Bid(node_id="n", expected_s=60), 0.25), (Bid(node_id="n"), 0.25), (Bid(node_id="n", expected_s=0.001), 0.001)],
    ids=["long runs", "nothing known yet", "short runs"],
)
def test_an_award_is_held_against_a_node_no_longer_than_its_runs_are_long(bid: Bid, held_s: float) -> None:
    assert award_hold_s(bid) == held_s


async def test_the_last_places_of_a_backlog_are_for_urgent_tasks() -> None:
    bus = Bus("nats://127.0.0.1:1")

    def run(priority: Priority) -> Run:
        request = RunRequest(
            task_id="t", attempt=1, node_id="n", domain="any", description="x", remaining_s=1, priority=priority
        )
        return Run(bus, request, "_INBOX.x")

    room = RunQueue(slots=1, backlog=10)
    taken = 0
    while room.accepts("normal"):
        room.enqueue(run("normal"))
        room.start_next()
        taken += 1

    assert (taken, room.load, room.full) == (10, 1.0, False)  # a slot, eight places, and one for an award on its way
    assert not room.accepts("low")
    assert room.accepts("high")
    room.enqueue(run("critical"))
    assert room.full
    assert not room.accepts("critical")
    room.running.clear()
    first = room.start_next()
    assert first is not None
    assert first.request.priority == "critical"
