"""The offer of a host: for any nodes, it equals the best of the bids of all of them."""

import asyncio
from collections.abc import Callable, Collection
from contextvars import copy_context
from typing import Any, ClassVar, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace
from support.builders import call_for_bids

from loom.agents.host.bidding import MAX_RANKINGS
from loom.agents.host.hosted_agents import HostedAgents
from loom.agents.host.node_host import NodeHost
from loom.agents.host.runs import Run
from loom.agents.host.slots import Node
from loom.bus.bus import Bus
from loom.schemas.auction import MAX_LOTS, Bid, CallForBids, Lot
from loom.schemas.base import Undecodable, decode, encode
from loom.schemas.identity import Identity, qualified
from loom.schemas.learning.profile import DomainEvidence, NodeProfile
from loom.schemas.run import RunRequest
from loom.schemas.task import PRIORITIES
from loom.types import AgentNode, CapabilityProfile

SLOTS, BACKLOG = 2, 3
TOOLS = ("search", "shell")
UNCONNECTED = Bus("nats://127.0.0.1:1")
NAMES = tuple(f"n{number}" for number in range(12))


def agent(description: str) -> str:
    return description


nodes = st.builds(
    lambda node_id, claim, tools, status, given_agent: AgentNode(
        id=node_id,
        capabilities=CapabilityProfile(scores={"code": claim} if claim is not None else {}, tools=list(tools)),
        status=status,
        agent=given_agent,
    ),
    st.sampled_from(NAMES),
    st.sampled_from((None, 0.0, 0.3, 0.7, 1.0)),
    st.sets(st.sampled_from(TOOLS)),
    st.sampled_from(("idle", "busy", "dying")),
    st.sampled_from((agent, agent, None)),
)
calls = st.builds(
    call_for_bids,
    excluded=st.lists(st.sampled_from(NAMES), max_size=3).map(tuple),
    prefer=st.lists(st.sampled_from((*NAMES, "elsewhere")), max_size=3).map(tuple),
    required_tools=st.sets(st.sampled_from(TOOLS)).map(tuple),
    limit=st.integers(1, 6),
)


def in_hand(host: NodeHost, node_id: str, count: int) -> None:
    room = host._queues.get_or_create(node_id)
    for number in range(count):
        request = RunRequest(task_id=f"{node_id}-{number}", node_id=node_id, description="x")
        room.enqueue(Run(cast("Bus", None), request, ""))
    while room.start_next() is not None:
        pass


def best(host: NodeHost, there: list[AgentNode], call: CallForBids) -> tuple[list[Bid], bool]:
    """Return all bids in order, and whether any node is qualified, busy or not."""
    able = [
        node
        for node in there
        if node.agent is not None
        and node.id not in call.excluded
        and set(call.required_tools) <= set(node.capabilities.tools)
        and node.claim(call.domain_token) > 0
    ]
    free = [node for node in able if node.status != "dying" and not host._queues.get_or_create(node.id).full]
    bids = [
        host._queues.get_or_create(node.id).bid(cast("Node", node), call.domain_token, call.required_tools)
        for node in free
    ]
    return sorted(bids, key=lambda bid: (bid.node_id not in call.prefer, -bid.self_rating, bid.load)), bool(able)


@given(
    st.lists(nodes, max_size=12, unique_by=lambda node: node.id),
    st.dictionaries(st.sampled_from(NAMES), st.integers(0, 5)),
    calls,
)
def test_the_offered_bids_are_the_best_of_all_nodes(
    there: list[AgentNode], work: dict[str, int], call: CallForBids
) -> None:
    host = NodeHost(UNCONNECTED, lambda: cast("list[Node]", there), slots=SLOTS, backlog=BACKLOG)
    for node_id, count in work.items():
        in_hand(host, node_id, count)
    offer = host.offer(call)
    bids, able = best(host, there, call)
    assert list(offer.bids) == bids[: call.limit]
    assert offer.decline == (None if bids else "busy" if able else "unqualified")


Change = Callable[[NodeHost, list[AgentNode]], None]
"""A change of a host, of its nodes or of their loads."""


def at_node(place: int, change: Callable[[AgentNode], None]) -> Change:
    def apply(_host: NodeHost, hosted: list[AgentNode]) -> None:
        if hosted:
            change(hosted[place % len(hosted)])

    return apply


def add_node(place: int, node: AgentNode) -> Change:
    def apply(_host: NodeHost, hosted: list[AgentNode]) -> None:
        if node.id not in [other.id for other in hosted]:
            hosted.insert(place, node)

    return apply


def remove_node(place: int) -> Change:
    def apply(_host: NodeHost, hosted: list[AgentNode]) -> None:
        if hosted:
            hosted.pop(place % len(hosted))

    return apply


def start_run(place: int, number: int) -> Change:
    def apply(host: NodeHost, hosted: list[AgentNode]) -> None:
        if hosted:
            queue = host._queues.get_or_create(hosted[place % len(hosted)].id)
            if not queue.full:
                request = RunRequest(task_id=f"t{number}", description="x")
                queue.enqueue(Run(cast("Bus", None), request, ""))
                started = queue.start_next()
                if started is not None:
                    started.work = cast("Any", "a task")

    return apply


def end_run(place: int, ending: str) -> Change:
    def apply(host: NodeHost, hosted: list[AgentNode]) -> None:
        if hosted:
            queue = host._queues.get_or_create(hosted[place % len(hosted)].id)
            suspended = [run for run in queue.suspended if run not in queue._resuming]
            if ending == "resume" and suspended:
                queue.resume(suspended[0])
            elif ending != "resume" and queue.running:
                getattr(queue, ending)(next(iter(queue.running)))
            queue.start_next()

    return apply


def change_rating(node: AgentNode, domain: str, rating: float) -> None:
    node.capabilities.scores[domain] = rating


places = st.integers(0, 11)
ratings = st.sampled_from((0.0, 0.3, 0.7, 1.0))
domains = st.sampled_from(("code", "Code", "law"))
changes = st.one_of(
    st.builds(add_node, places, nodes),
    st.builds(remove_node, places),
    st.builds(start_run, places, st.integers(0, 99)),
    st.builds(end_run, places, st.sampled_from(("remove", "suspend", "resume"))),
    st.builds(
        lambda place, domain, rating: at_node(place, lambda node: change_rating(node, domain, rating)),
        places,
        domains,
        ratings,
    ),
    st.builds(
        lambda place, rating: at_node(place, lambda node: node.mirror(learned(node.id, rating))), places, ratings
    ),
    st.builds(
        lambda place, only: at_node(place, lambda node: setattr(node, "domains", only)),
        places,
        st.sampled_from((None, ["law"], ["code", "law"])),
    ),
    st.builds(
        lambda place, given_agent: at_node(place, lambda node: setattr(node, "agent", given_agent)),
        places,
        st.sampled_from((agent, None)),
    ),
    st.builds(
        lambda place, status: at_node(place, lambda node: setattr(node, "status", status)),
        places,
        st.sampled_from(("idle", "dying")),
    ),
    st.builds(
        lambda place, tools: at_node(place, lambda node: setattr(node.capabilities, "tools", sorted(tools))),
        places,
        st.sets(st.sampled_from(TOOLS)),
    ),
)


def learned(node_id: str, mean: float) -> NodeProfile:
    return NodeProfile(node_id=node_id, domains={"code": DomainEvidence(count=3, mean=mean)}, total_tasks=3)


@given(
    st.lists(nodes, max_size=12, unique_by=lambda node: node.id),
    st.lists(st.tuples(changes, calls, domains), max_size=20),
    st.sampled_from(("local", "acme")),
)
def test_the_offer_is_that_of_a_full_ranking_after_any_changes(
    hosted: list[AgentNode], steps: list[tuple[Change, CallForBids, str]], owner: str
) -> None:
    bus = Bus("nats://127.0.0.1:1", identity=Identity(owner=owner))
    host = NodeHost(bus, lambda: cast("list[Node]", hosted), slots=SLOTS, backlog=BACKLOG)
    for change, call, domain in steps:
        change(host, hosted)
        asked = replace(
            call,
            domain=domain,
            excluded=tuple(qualified(owner, name) for name in call.excluded),
            prefer=tuple(qualified(owner, name) for name in call.prefer),
        )
        offer = host.offer(asked)
        bids, able = best(host, hosted, replace(call, domain=domain))
        assert list(offer.bids) == bids[: call.limit]
        assert offer.decline == (None if bids else "busy" if able else "unqualified")


class Rated(AgentNode):
    """A node that counts the bids and the tool checks it is asked for."""

    asked: ClassVar[list[str]] = []

    def has_tools(self, required: Collection[str]) -> bool:
        self.asked.append(self.id)
        return super().has_tools(required)


def test_an_offer_examines_no_more_nodes_than_bid_and_the_order_is_not_made_again() -> None:
    Rated.asked.clear()
    hosted = [
        Rated(id=f"n{n}", agent=agent, capabilities=CapabilityProfile(scores={"code": n / 200})) for n in range(1, 101)
    ]
    host = NodeHost(UNCONNECTED, lambda: cast("list[Node]", hosted))
    for _ in range(2):
        offer = host.offer(call_for_bids(limit=5))
        assert [bid.node_id for bid in offer.bids] == ["n100", "n99", "n98", "n97", "n96"]
    assert len(Rated.asked) == 10
    order = host._bidder._rankings["code"]._order
    in_hand(host, "n99", 1)
    hosted[97].capabilities.scores["code"] = 0.01
    assert [bid.node_id for bid in host.offer(call_for_bids(limit=3)).bids] == ["n100", "n99", "n97"]
    assert host._bidder._rankings["code"]._order is order


def test_the_rankings_of_the_domains_called_for_last_are_kept() -> None:
    hosted = [AgentNode(id="n1", agent=agent)]
    host = NodeHost(UNCONNECTED, lambda: cast("list[Node]", hosted))
    for number in range(MAX_RANKINGS + 1):
        host.offer(call_for_bids(f"d{number}"))
        host.offer(call_for_bids("d0"))
    assert len(host._bidder._rankings) == MAX_RANKINGS
    assert "d0" in host._bidder._rankings
    assert "d1" not in host._bidder._rankings


class Claiming(AgentNode):
    """A node that counts how often its self-rating is read."""

    claims = 0

    def claim(self, domain: str) -> float:
        Claiming.claims += 1
        return super().claim(domain)


async def test_self_ratings_are_read_once_for_all_calls_of_a_turn_of_the_event_loop() -> None:
    hosted = [Claiming(id=f"n{n}", agent=agent, capabilities=CapabilityProfile(scores={"code": 0.5})) for n in range(9)]
    host = NodeHost(UNCONNECTED, lambda: cast("list[Node]", hosted))
    host.offer(call_for_bids())

    def order() -> list[str]:
        Claiming.claims = 0
        return [bid.node_id for bid in host.offer(call_for_bids(limit=2), in_turn=True).bids]

    for turn in range(3):
        hosted[turn].capabilities.scores["code"] = 0.6 + turn / 10
        assert order()[0] == f"n{turn}"
        assert Claiming.claims == 9 + 2
        in_hand(host, f"n{turn}", SLOTS + BACKLOG + 99)
        assert order()[0] != f"n{turn}"
        assert Claiming.claims == 2
        host._bidder.forget_ratings()
        order()
        assert Claiming.claims == 9 + 2
        await asyncio.sleep(0)


# -- lots


def lots(count: int) -> tuple[Lot, ...]:
    return tuple(
        Lot(task_id=f"t{n}", attempt=1, complexity=0.5, remaining_s=60.0, priority=PRIORITIES[n % len(PRIORITIES)])
        for n in range(count)
    )


@given(st.lists(nodes, max_size=12, unique_by=lambda node: node.id), calls, st.integers(1, MAX_LOTS))
def test_one_list_of_bids_is_for_all_lots_of_a_call(hosted: list[AgentNode], call: CallForBids, count: int) -> None:
    host = NodeHost(UNCONNECTED, lambda: cast("list[Node]", hosted), slots=SLOTS, backlog=BACKLOG)
    joint = decode(encode(replace(call, lots=lots(count))), CallForBids)
    offer = host.offer(joint)
    assert offer == host.offer(call)
    assert all(bid.is_for(lot.task_id) for bid in offer.bids for lot in joint.lots)
    assert len(offer.bids) <= call.limit


@pytest.mark.parametrize("count", [0, MAX_LOTS + 1])
def test_a_call_without_lots_or_with_too_many_cannot_be_decoded(count: int) -> None:
    with pytest.raises(Undecodable):
        decode(encode(replace(call_for_bids(), lots=lots(count))), CallForBids)


@given(st.lists(st.tuples(st.booleans(), st.sampled_from(NAMES), st.integers(0, 11)), max_size=30))
def test_a_node_is_found_wherever_its_list_has_moved_it(changes: list[tuple[bool, str, int]]) -> None:
    there: list[AgentNode] = []
    host = NodeHost(UNCONNECTED, lambda: cast("list[Node]", there))
    for adds, name, place in changes:
        known = [node.id for node in there]
        if adds and name not in known:
            there.insert(place, AgentNode(id=name, agent=agent))
        elif not adds and name in known:
            there.pop(known.index(name))
        for wanted in NAMES:
            assert cast("Any", host._find_node(wanted)) is next((node for node in there if node.id == wanted), None)


def test_an_agent_is_built_once_for_a_function_and_again_for_another() -> None:
    node = AgentNode(id="n1", agent=agent)
    agents = HostedAgents(copy_context())
    first = agents.agent_of(cast("Node", node))
    assert agents.agent_of(cast("Node", node)) is first
    node.agent = asyncio.sleep
    assert agents.agent_of(cast("Node", node)) is not first
