"""Bids of plain nodes, which MATCH makes itself: from their announcements and its own awards."""

import time
from collections import Counter
from collections.abc import Callable, Iterable
from heapq import heappop, heappush

from loom.bus.host_directory import HostKey
from loom.phases.match.announced_nodes import AnnouncedNodes, Place, Wanted
from loom.phases.match.offers import HostOffer
from loom.schemas.auction import AnnouncedNode, Bid

RUN_S = 60.0
"""Longest run of a plain node that announces none."""
UNJUDGED_S = 10.0
"""Time from the end of a run until its reward is known; an award that earns none is forgotten then."""


class PlainNodes:
    """The load of plain nodes, by the awards of this replica that have not been judged yet, and their bids.

    Args:
        nodes: What the present hosts have announced.
        clock: Returns seconds that never go back.
    """

    def __init__(self, nodes: AnnouncedNodes, clock: Callable[[], float] = time.monotonic) -> None:
        self._nodes = nodes
        self._clock = clock
        self._awards: dict[str, Place] = {}
        """Attempt -> the node it was awarded to."""
        self._ends: list[tuple[float, str]] = []
        """A heap: when an attempt is forgotten at the latest."""
        self._taken: Counter[Place] = Counter()

    def award(self, place: Place, task_id: str, attempt: int) -> AnnouncedNode | None:
        """Return the plain node of a place, and count an award to it as load; None for any other node."""
        node = self._nodes.get(place)
        if node is None or not node.plain:
            return None
        attempt_id = f"{task_id}:{attempt}"
        self._end(attempt_id)
        self._awards[attempt_id] = place
        self._taken[place] += 1
        run_s = RUN_S if node.max_run_s is None else node.max_run_s
        heappush(self._ends, (self._clock() + run_s + UNJUDGED_S, attempt_id))
        return node

    def judged(self, attempt_ids: Iterable[str]) -> None:
        """Free the places of attempts that have been rewarded."""
        if self._awards:
            for attempt_id in attempt_ids:
                self._end(attempt_id)

    def came_back(self, task_id: str, attempt: int) -> None:
        """Free the place of the attempt before this one: the task has come back from it."""
        if self._awards:
            self._end(f"{task_id}:{attempt - 1}")

    def offers(self, wanted: Wanted) -> list[HostOffer]:
        """Return an offer for each host that has announced plain nodes which could do the task."""
        self._expire()
        bids: dict[HostKey, list[Bid]] = {}
        for place, node in self._nodes.able(wanted, plain=True):
            host_bids = bids.setdefault(place[0], [])
            if (free := node.slots - self._taken[place]) > 0:
                host_bids.append(_bid(node, free, wanted))
        return [
            HostOffer(owner=host.owner, host_id=host.host_id, bids=tuple(each), decline=None if each else "busy")
            for host, each in bids.items()
        ]

    def _end(self, attempt_id: str) -> None:
        place = self._awards.pop(attempt_id, None)
        if place is not None:
            self._taken[place] -= 1
            if not self._taken[place]:
                del self._taken[place]

    def _expire(self) -> None:
        now = self._clock()
        while self._ends and self._ends[0][0] <= now:
            self._end(heappop(self._ends)[1])


def _bid(node: AnnouncedNode, free: int, wanted: Wanted) -> Bid:
    return Bid(
        node_id=node.node_id,
        self_rating=node.self_rating(wanted.domain_token),
        load=(node.slots - free) / node.slots,
        tools=tuple(wanted.tools),
        free=free,
    )
