"""Selects the nodes of a host that bid on a call for bids."""

import asyncio
from bisect import bisect_left, insort
from collections.abc import Callable, Iterator, Sequence

from loom.agents.host.slots import Node, RunQueues
from loom.schemas.auction import CallForBids, Offer
from loom.schemas.identity import LOCAL_OWNER, qualified

MAX_RANKINGS = 64
"""Domains whose ranking is kept; the domain that was called for least recently is dropped."""

Rank = tuple[float, float, int]
"""Sort key of a node, the best one smallest: negative self-rating, load, place in the list of nodes."""


class Bidder:
    """Makes offers for the nodes of one host.

    Args:
        nodes: Returns the current nodes of the host; another list whenever they have changed.
        queues: The run queues of these nodes.
        owner: Owner of the nodes.
    """

    def __init__(self, nodes: Callable[[], Sequence[Node]], queues: RunQueues, owner: str = LOCAL_OWNER) -> None:
        self._nodes = nodes
        self._queues = queues
        self._owner = owner
        self._rankings: dict[str, Ranking] = {}
        """Domain token -> ranking of the nodes, the one used last at the end."""
        self._read: set[str] = set()
        """Domains whose self-ratings were read in this turn of the event loop."""

    def offer(self, call: CallForBids, *, in_turn: bool = False) -> Offer:
        """Return the bids of up to `call.limit` nodes, each for all lots of the call, or a decline.

        Preferred nodes come first, then nodes with a higher self-rating, then nodes with a lower load. A node that
        rates the domain 0 does not bid.

        Args:
            in_turn: Whether self-ratings that such a call has read in this turn of the event loop are used again,
                because no program has changed them since.
        """
        domain = call.domain_token
        tools, excluded = call.required_tools, frozenset(call.excluded)
        best: list[Node] = []
        are_qualified = False
        for node in self._ranking(domain, in_turn=in_turn).nodes(self._preferred_ids(call)):
            if not node.has_tools(tools) or (excluded and qualified(self._owner, node.id) in excluded):
                continue
            are_qualified = True
            if node.status != "dying" and not self._queues.get(node.id).full:
                best.append(node)
                if len(best) == call.limit:
                    break
        if not best:
            return Offer(decline="busy" if are_qualified else "unqualified")
        return Offer(bids=tuple([self._queues.get(node.id).bid(node, domain, tools) for node in best]))

    def forget_ratings(self) -> None:
        """Read the self-ratings again for the next call."""
        self._read.clear()

    def _ranking(self, domain: str, *, in_turn: bool) -> "Ranking":
        """Return the current ranking of the nodes for a domain."""
        nodes = self._nodes()
        ranking = self._rankings.pop(domain, None)
        if ranking is None or not ranking.is_of(nodes):
            ranking = Ranking(nodes, self._queues, domain)
        else:
            ranking.update(with_ratings=not in_turn or domain not in self._read)
        if in_turn:
            if not self._read:
                asyncio.get_running_loop().call_soon(self._read.clear)
            self._read.add(domain)
        self._rankings[domain] = ranking
        if len(self._rankings) > MAX_RANKINGS:
            del self._rankings[next(iter(self._rankings))]
        return ranking

    def _preferred_ids(self, call: CallForBids) -> frozenset[str]:
        """Return the ids of this owner's nodes among those that the call prefers."""
        prefix = qualified(self._owner, "")
        return frozenset(name.removeprefix(prefix) for name in call.prefer if name.startswith(prefix))


class Ranking:
    """The nodes of a host in the order in which they bid in one domain.

    The self-ratings are read at each update, because programs change them in place. The order changes only for nodes
    whose self-rating or load has changed.

    Args:
        nodes: All nodes of the host.
        queues: The run queues of these nodes.
        domain: Token of the domain.
    """

    def __init__(self, nodes: Sequence[Node], queues: RunQueues, domain: str) -> None:
        self._nodes = nodes
        self._queues = queues
        self._domain = domain
        self._ratings = self._read_ratings()
        self._changes_seen = queues.changes
        self._ranks = [self._rank(place) for place in range(len(nodes))]
        self._order = sorted(rank for rank in self._ranks if rank is not None)
        self._places: dict[str, list[int]] = {}
        """Node id -> its places in the list of nodes."""
        for place, node in enumerate(nodes):
            self._places.setdefault(node.id, []).append(place)

    def is_of(self, nodes: Sequence[Node]) -> bool:
        """Return whether the ranking is of this list of nodes."""
        return nodes is self._nodes

    def update(self, *, with_ratings: bool) -> None:
        """Adopt all changes of loads, and `with_ratings` those of self-ratings, since the last call."""
        ratings = self._read_ratings() if with_ratings else self._ratings
        if ratings != self._ratings:
            changed = [place for place, rating in enumerate(ratings) if rating != self._ratings[place]]
            self._ratings = ratings
            self._move(changed)
        if self._queues.changes != self._changes_seen:
            for node_id in self._queues.changed_since(self._changes_seen):
                self._move(self._places.get(node_id, ()))
            self._changes_seen = self._queues.changes

    def nodes(self, preferred: frozenset[str]) -> Iterator[Node]:
        """Yield the nodes that rate the domain above 0, the preferred ones first."""
        if preferred:
            places = [place for node_id in preferred for place in self._places.get(node_id, ())]
            ranks = [rank for place in places if (rank := self._ranks[place]) is not None]
            for *_, place in sorted(ranks):
                yield self._nodes[place]
        for *_, place in self._order:
            node = self._nodes[place]
            if node.id not in preferred:
                yield node

    def _read_ratings(self) -> list[float]:
        """Return the self-rating of each node; 0 for a node without an agent, which does not bid."""
        domain = self._domain
        return [0.0 if node.agent is None else node.claim(domain) for node in self._nodes]

    def _rank(self, place: int) -> Rank | None:
        """Return the sort key of a node; None if it rates the domain 0."""
        rating = self._ratings[place]
        return (-rating, self._queues.get(self._nodes[place].id).load, place) if rating > 0 else None

    def _move(self, places: Sequence[int]) -> None:
        """Put nodes at their present places in the order."""
        for place in places:
            before, rank = self._ranks[place], self._rank(place)
            if rank != before:
                self._ranks[place] = rank
                if before is not None:
                    del self._order[bisect_left(self._order, before)]
                if rank is not None:
                    insort(self._order, rank)
