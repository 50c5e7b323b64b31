"""Which of a host's nodes bid on a call."""

from collections.abc import Callable, Sequence
from heapq import nsmallest

from loom.agents.node import Node, Room
from loom.schemas.auction import CallForBids, Offer

Rooms = Callable[[str], Room]
"""Returns the room of a node."""


def make_offer(host_id: str, call: CallForBids, nodes: Sequence[Node], rooms: Rooms) -> Offer:
    """Return a host's answer to a call: bids, or why there are none.

    The nodes that are preferred come first, then the highest claims, then the least loaded. A node whose claim in the
    domain is 0 does not take it.
    """
    excluded = set(call.excluded)
    able = []
    for node in nodes:
        if node.agent is None or node.id in excluded or not node.has_tools(call.required_tools):
            continue
        claim = node.claim(call.domain_token)
        if claim > 0:
            able.append((node, claim))
    best = [able[place][0] for *_, place in nsmallest(call.limit, _ranks(able, call, rooms))]
    if not best:
        return Offer(host_id=host_id, decline="busy" if able else "unqualified")
    bids = tuple(rooms(node.id).bid(node, call.domain_token, call.required_tools) for node in best)
    return Offer(host_id=host_id, bids=bids)


def _ranks(
    claims: Sequence[tuple[Node, float]], call: CallForBids, rooms: Rooms
) -> list[tuple[bool, float, float, int]]:
    """What orders the nodes that take work, the first one least; last comes a node's place among `claims`."""
    ranks = []
    preferred = set(call.prefer)
    for place, (node, claim) in enumerate(claims):
        if node.status == "dying":
            continue
        room = rooms(node.id)
        if not room.full:
            ranks.append((node.id not in preferred, -claim, room.load, place))
    return ranks
