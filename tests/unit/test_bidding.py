"""The offer of a host: for any nodes, it equals the best of the bids of all of them."""

import asyncio
from contextvars import copy_context
from typing import Any, cast

from hypothesis import given
from hypothesis import strategies as st
from support.builders import call_for_bids

from loom.agents.host.hosted_agents import HostedAgents
from loom.agents.host.node_host import NodeHost
from loom.agents.host.runs import Run
from loom.agents.host.slots import Node
from loom.bus.bus import Bus
from loom.schemas.auction import Bid, CallForBids
from loom.schemas.run import RunRequest
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
    """All bids in their order, and whether any node could, busy or not."""
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
