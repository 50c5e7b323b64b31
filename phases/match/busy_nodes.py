"""Nodes that rejected an award as busy: other nodes come first until their host announces itself again."""

from collections import OrderedDict
from collections.abc import Sequence

from msgspec.structs import replace

from loom.phases.match.announced_nodes import AnnouncedNodes, NodeLocation
from loom.phases.match.calls.offers import HostOffer

MAX_TASKS = 4096
"""Limit of remembered tasks; the least recently used ones are removed first."""
MAX_NODES_PER_TASK = 64
"""Limit of remembered nodes per task."""


class BusyNodes:
    """Remembers which nodes have rejected which tasks as busy.

    Args:
        nodes: The index that counts the announcements of each host.
    """

    def __init__(self, nodes: AnnouncedNodes) -> None:
        self._nodes = nodes
        self._tasks: OrderedDict[str, dict[NodeLocation, int]] = OrderedDict()
        """Task id -> node -> announcement count of its host at the rejection."""

    def record_rejection(self, task_id: str, location: NodeLocation) -> None:
        """Record that a node was busy; does nothing when its host is not present."""
        count = self._nodes.announcement_count(location[0])
        if count is None:
            return
        locations = self._tasks.setdefault(task_id, {})
        self._tasks.move_to_end(task_id)
        if location in locations or len(locations) < MAX_NODES_PER_TASK:
            locations[location] = count
        if len(self._tasks) > MAX_TASKS:
            self._tasks.popitem(last=False)

    def without_busy(self, task_id: str, offers: Sequence[HostOffer]) -> Sequence[HostOffer]:
        """Return the offers without the bids of busy nodes, unless no other node bids.

        A busy node that bids again may have a free slot, and its next announcement may take three seconds. The pauses
        of the task grow with each rejection, which bounds how often a full node is tried.
        """
        locations = self._busy_nodes_of(task_id)
        others = [_without_nodes(offer, locations) for offer in offers] if locations else []
        return others if any(offer.bids for offer in others) else offers

    def _busy_nodes_of(self, task_id: str) -> set[NodeLocation]:
        locations = self._tasks.get(task_id)
        if not locations:
            return set()
        still = {
            location: count
            for location, count in locations.items()
            if self._nodes.announcement_count(location[0]) == count
        }
        if still:
            self._tasks[task_id] = still
        else:
            del self._tasks[task_id]
        return set(still)


def _without_nodes(offer: HostOffer, locations: set[NodeLocation]) -> HostOffer:
    bids = tuple(bid for bid in offer.bids if (offer.host, bid.node_id) not in locations)
    return offer if len(bids) == len(offer.bids) else replace(offer, bids=bids)
