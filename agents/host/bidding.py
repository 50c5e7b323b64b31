"""Selects the nodes of a host that bid on a call for bids."""

from collections.abc import Callable, Sequence
from heapq import nsmallest

from loom.agents.host.slots import Node, RunQueues
from loom.schemas.auction import CallForBids, Offer
from loom.schemas.identity import LOCAL_OWNER, qualified


class Bidder:
    """Makes offers for the nodes of one host.

    Args:
        nodes: Returns the current nodes of the host.
        queues: The run queues of these nodes.
        owner: Owner of the nodes.
    """

    def __init__(self, nodes: Callable[[], Sequence[Node]], queues: RunQueues, owner: str = LOCAL_OWNER) -> None:
        self._nodes = nodes
        self._queues = queues
        self._owner = owner

    def offer(self, call: CallForBids) -> Offer:
        """Return the bids of up to `call.limit` nodes, or a decline.

        Preferred nodes come first, then nodes with a higher self-rating, then nodes with a lower load. A node that
        rates the domain 0 does not bid.
        """
        rated = self._rated(call)
        best = [rated[place][0] for *_, place in nsmallest(call.limit, self._ranks(rated, call))]
        if not best:
            return Offer(decline="busy" if rated else "unqualified")
        bids = (self._queues.get(node.id).bid(node, call.domain_token, call.required_tools) for node in best)
        return Offer(bids=tuple(bids))

    def _rated(self, call: CallForBids) -> list[tuple[Node, float]]:
        """Return the nodes that qualify for a call, with their self-ratings."""
        excluded = set(call.excluded)
        rated = []
        for node in self._nodes():
            if node.agent is None or not node.has_tools(call.required_tools):
                continue
            if excluded and qualified(self._owner, node.id) in excluded:
                continue
            rating = node.claim(call.domain_token)
            if rating > 0:
                rated.append((node, rating))
        return rated

    def _ranks(self, rated: Sequence[tuple[Node, float]], call: CallForBids) -> list[tuple[bool, float, float, int]]:
        """Return sort keys of the nodes with a free place, the best one smallest; each ends with its index."""
        ranks = []
        preferred = set(call.prefer)
        for place, (node, rating) in enumerate(rated):
            if node.status == "dying":
                continue
            queue = self._queues.get(node.id)
            if not queue.full:
                ranks.append((qualified(self._owner, node.id) not in preferred, -rating, queue.load, place))
        return ranks
