"""Announcements of node hosts: their content, their times, and the number of hosts in each."""

import asyncio
import time
from typing import Any

import pytest
from msgspec import to_builtins
from support.auctions import offer_to
from support.builders import call_for_bids
from support.nodes import echo, node
from support.phase_harness import Stage
from support.runs import run
from support.wait import until

from loom.agents.host import announcer
from loom.agents.host.announcement import announced_node, fit_size
from loom.agents.host.announcer import AnnouncePace
from loom.agents.host.node_partition import NodePartition
from loom.agents.host.timings import HostTimings
from loom.bus.host_directory import announced_hosts
from loom.schemas.auction import (
    ANNOUNCED_NAMES,
    ANNOUNCED_NODES,
    MAX_ANNOUNCEMENT_BYTES,
    AnnouncedNode,
    HostAnnouncement,
)
from loom.schemas.base import encode
from loom.schemas.identity import Identity
from loom.types import AgentNode, CapabilityProfile

# -- the announcement of a node


@pytest.mark.parametrize(
    ("of", "domains"),
    [
        (AgentNode(id="n", agent=echo), None),
        (AgentNode(id="n", agent=echo, domains=["CSV files"]), [{"domain": "CSV files"}]),
        (node("n", echo, code=0.9), [{"domain": "code", "self_rating": 0.9}, {"domain": "*"}]),
        (AgentNode(id="n", agent=echo, domains=[]), []),
    ],
    ids=["any domain", "limited", "rated", "no domain"],
)
def test_a_node_is_announced_with_the_domains_it_names_and_whether_it_takes_others(of: Any, domains: Any) -> None:
    shown = announced_node(of, 4).domains
    assert (None if shown is None else [to_builtins(one) for one in shown]) == domains


def test_a_node_is_announced_with_its_tools_and_slots_in_bounds() -> None:
    many = CapabilityProfile(
        scores={f"domain {n}": 0.4 for n in range(200)}, tools=[f"tool-{n:03}" for n in range(200)]
    )
    shown = announced_node(AgentNode(id="n", agent=echo, capabilities=many), 3)
    assert shown.domains is not None
    assert (len(shown.domains), shown.domains[-1].domain) == (ANNOUNCED_NAMES, "*")
    assert (len(shown.tools), shown.tools[0], shown.slots) == (ANNOUNCED_NAMES, "tool-000", 3)


def test_an_announcement_that_is_too_long_names_the_nodes_alone() -> None:
    nodes = tuple(AnnouncedNode(node_id=f"n{n}", tools=tuple(f"{n}-{t}" * 10 for t in range(60))) for n in range(128))
    assert len(encode(fit_size(HostAnnouncement(nodes=nodes)))) <= MAX_ANNOUNCEMENT_BYTES
    assert fit_size(HostAnnouncement(nodes=nodes)).node_ids == tuple(f"n{n}" for n in range(128))


# -- times


async def test_a_draining_host_announces_it_three_times_under_rising_numbers(stage: Stage) -> None:
    host = await stage.host([node("n1", echo)])
    await host.drain(0)
    await until(lambda: sum(one.draining for one in stage.all("host")) == 3, what="three announcements")
    numbers = [one.seq for one in stage.all("host")]
    assert numbers == sorted(set(numbers))


@pytest.mark.slow
async def test_requests_for_announcements_are_answered_together_and_seldom(monkeypatch: pytest.MonkeyPatch) -> None:
    timings = HostTimings(requested_announce_s=0.2, max_announce_delay_s=0.01)
    monkeypatch.setattr(announcer, "BURST", 2)
    answers: list[float] = []
    pace = AnnouncePace(lambda: answers.append(time.monotonic()), timings)
    began = time.monotonic()
    while time.monotonic() < began + 0.7:
        pace.request()
        await asyncio.sleep(0.001)
    pace.stop()
    assert 3 <= len(answers) <= 5
    assert answers[-1] - answers[-2] > 0.1


async def test_a_node_that_refused_a_run_is_announced_once_it_has_room(stage: Stage) -> None:
    go = asyncio.Event()

    async def held(description: str) -> str:
        await go.wait()
        return description

    host = await stage.host([node("n1", held)], slots=1, backlog=0)
    for task, answer in (("t1", "accepted"), ("t2", "rejected")):
        await (await run(stage, host, task_id=task)).event(answer)  # type: ignore[arg-type]
    before = len(stage.all("host"))
    go.set()
    await until(
        lambda: len(stage.all("host")) > before, within_s=HostTimings.announce_s / 2, what="one before it is due"
    )


# -- more nodes than one announcement holds


@pytest.mark.slow
async def test_a_process_with_many_nodes_announces_itself_as_several_hosts(stage: Stage) -> None:
    nodes = [node(f"n{number:03}", echo, code=0.5) for number in range(2 * ANNOUNCED_NODES + 3)]
    host = await stage.host(lambda: nodes)
    hosts = await announced_hosts(stage.bus, 0.4)
    assert sorted(len(one.nodes) for one in hosts) == [3, ANNOUNCED_NODES, ANNOUNCED_NODES]
    assert {node_id for one in hosts for node_id in one.node_ids} == {one.id for one in nodes}
    for one in hosts:
        subject = stage.bus.subjects.of("call", "local", one.host_id)
        offer = await offer_to(stage.bus, call_for_bids(limit=64), subject)
        assert {bid.node_id for bid in offer.bids} <= set(one.node_ids)
    nodes.append(node("late", echo))
    assert host.is_new("late")
    await host.announce()
    assert not host.is_new("late")
    await host.drain(0)
    await until(lambda: len({one.seq for one in stage.all("host") if one.draining}) >= 3, what="all of them drain")


def test_a_node_stays_with_its_host_as_others_come_and_go() -> None:
    nodes: list[Any] = [AgentNode(id=f"n{number}") for number in range(5)]
    share = NodePartition(lambda: nodes, 3)
    assert ([one.id for one in share.own()], [one.id for one in share.rest()]) == (["n0", "n1", "n2"], ["n3", "n4"])
    del nodes[0]
    assert ([one.id for one in share.own()], [one.id for one in share.rest()]) == (["n1", "n2"], ["n3", "n4"])
    nodes.insert(0, AgentNode(id="n5"))
    assert ([one.id for one in share.own()], [one.id for one in share.rest()]) == (["n5", "n1", "n2"], ["n3", "n4"])


# -- owners


async def test_a_host_of_an_owner_publishes_under_its_own_subjects(stage: Stage) -> None:
    bus = await stage.connect("node", identity=Identity(owner="acme"))
    host = await stage.host([node("n1", echo), node("n2", echo)], bus=bus)
    [one] = await announced_hosts(stage.bus, 0.3)
    assert (one.owner, one.host_id, one.name) == ("acme", host.host_id, f"acme.{host.host_id}")
    offer = await offer_to(stage.bus, call_for_bids(excluded=("n1", "acme.n2"), prefer=("acme.n1",)))
    assert [bid.node_id for bid in offer.bids] == ["n1"]
    lifecycle = await stage.seen("lifecycle", kind="joined", source="acme", owner="acme", node_id="n1")
    assert lifecycle.owner == "acme"
