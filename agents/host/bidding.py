"""Which of a host's nodes bid on a call."""

from collections.abc import Callable, Sequence
from heapq import nsmallest

from loom.agents.host.slots import Node, RunQueue
from loom.schemas.auction import CallForBids, Offer
from loom.schemas.identity import LOCAL_OWNER, qualified

Rooms = Callable[[str], RunQueue]
"""Returns the room of a node."""


def make_offer(call: CallForBids, nodes: Sequence[Node], rooms: Rooms, owner: str = LOCAL_OWNER) -> Offer:
    """Return a host's answer to a call: bids on all of its lots, or why there are none.

    The nodes that are preferred come first, then the highest self-ratings, then the least loaded. A node whose
    self-rating in the domain is 0 does not take it.

    Args:
        owner: Whose nodes they are.
    """
    excluded, token = set(call.excluded), call.domain_token
    able = []
    for node in nodes:
        if node.agent is None or not node.has_tools(call.required_tools):
            continue
        if excluded and qualified(owner, node.id) in excluded:
            continue
        rating = node.claim(token)
        if rating > 0:
            able.append((node, rating))
    best = [able[place][0] for *_, place in nsmallest(call.limit, _ranks(able, call, rooms, owner))]
    if not best:
        return Offer(decline="busy" if able else "unqualified")
    return Offer(bids=tuple(rooms(node.id).bid(node, token, call.required_tools) for node in best))


def _ranks(
    rated: Sequence[tuple[Node, float]], call: CallForBids, rooms: Rooms, owner: str
) -> list[tuple[bool, float, float, int]]:
    """What orders the nodes that take work, the first one least; last comes a node's place among `rated`."""
    ranks = []
    preferred = set(call.prefer)
    for place, (node, rating) in enumerate(rated):
        if node.status == "dying":
            continue
        room = rooms(node.id)
        if not room.full:
            ranks.append((qualified(owner, node.id) not in preferred, -rating, room.load, place))
    return ranks
