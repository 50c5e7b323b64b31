"""Bids of plain nodes, which MATCH computes itself from their announcements and its own awards."""

import time
from collections import Counter
from collections.abc import Callable, Iterable
from heapq import heappop, heappush

from loom.bus.host_directory import HostKey
from loom.phases.match.announced_nodes import AnnouncedNodes, NodeLocation, TaskRequirements
from loom.phases.match.calls.offers import HostOffer
from loom.schemas.auction import AnnouncedNode, Bid

DEFAULT_MAX_RUN_S = 60.0
"""Longest run, in seconds, of a plain node that announces no limit."""
REWARD_DELAY_S = 10.0
"""Seconds from the longest end of a run until an award without a reward is dropped."""


class PlainNodes:
    """Computes the load and the bids of plain nodes; the load is the number of this replica's awards without a reward.

    Args:
        nodes: The index of announced nodes.
        clock: Returns monotonic seconds.
    """

    def __init__(self, nodes: AnnouncedNodes, clock: Callable[[], float] = time.monotonic) -> None:
        self._nodes = nodes
        self._clock = clock
        self._awards: dict[str, NodeLocation] = {}
        """Attempt id -> node it was awarded to."""
        self._expiries: list[tuple[float, str]] = []
        """Heap of (monotonic time at which an award is dropped, attempt id)."""
        self._used_slots: Counter[NodeLocation] = Counter()

    def record_award(self, location: NodeLocation, task_id: str, attempt: int) -> AnnouncedNode | None:
        """Count an award to a plain node as load and return the node; None for a node that is not plain."""
        node = self._nodes.get(location)
        if node is None or not node.plain:
            return None
        attempt_id = f"{task_id}:{attempt}"
        self._release(attempt_id)
        self._awards[attempt_id] = location
        self._used_slots[location] += 1
        run_s = DEFAULT_MAX_RUN_S if node.max_run_s is None else node.max_run_s
        heappush(self._expiries, (self._clock() + run_s + REWARD_DELAY_S, attempt_id))
        return node

    def release_rewarded(self, attempt_ids: Iterable[str]) -> None:
        """Free the slots of attempts that have a reward."""
        if self._awards:
            for attempt_id in attempt_ids:
                self._release(attempt_id)

    def release_previous_attempt(self, task_id: str, attempt: int) -> None:
        """Free the slot of the attempt before this one, which has ended."""
        if self._awards:
            self._release(f"{task_id}:{attempt - 1}")

    def offers(self, requirements: TaskRequirements) -> list[HostOffer]:
        """Return one offer for each host with capable plain nodes."""
        self._expire()
        bids_by_host: dict[HostKey, list[Bid]] = {}
        for location, node in self._nodes.capable_nodes(requirements, plain=True):
            host_bids = bids_by_host.setdefault(location[0], [])
            if (free := node.slots - self._used_slots[location]) > 0:
                host_bids.append(_bid(node, free, requirements))
        return [
            HostOffer(owner=host.owner, host_id=host.host_id, bids=tuple(bids), decline=None if bids else "busy")
            for host, bids in bids_by_host.items()
        ]

    def _release(self, attempt_id: str) -> None:
        location = self._awards.pop(attempt_id, None)
        if location is not None:
            self._used_slots[location] -= 1
            if not self._used_slots[location]:
                del self._used_slots[location]

    def _expire(self) -> None:
        now = self._clock()
        while self._expiries and self._expiries[0][0] <= now:
            self._release(heappop(self._expiries)[1])


def _bid(node: AnnouncedNode, free: int, requirements: TaskRequirements) -> Bid:
    return Bid(
        node_id=node.node_id,
        self_rating=node.self_rating(requirements.domain_token),
        load=(node.slots - free) / node.slots,
        tools=tuple(requirements.tools),
        free=free,
    )
