"""Nodes that had no room for a task they had won: others come first until their host announces itself again."""

from collections import OrderedDict
from collections.abc import Sequence

from msgspec.structs import replace

from loom.phases.match.announced_nodes import AnnouncedNodes, Place
from loom.phases.match.offers import HostOffer

MAX_TASKS = 4096
"""Tasks that are remembered; those longest untouched are forgotten first."""
MAX_PLACES = 64
"""Nodes that are remembered for one task."""


class BusyNodes:
    """Remembers which nodes have rejected which tasks as busy.

    Args:
        nodes: Counts the announcements of each host.
    """

    def __init__(self, nodes: AnnouncedNodes) -> None:
        self._nodes = nodes
        self._tasks: OrderedDict[str, dict[Place, int]] = OrderedDict()
        """Task -> node -> the announcements its host had made when it rejected the task."""

    def rejected(self, task_id: str, place: Place) -> None:
        """Remember that a node was busy; without effect when its host has gone."""
        count = self._nodes.announcements(place[0])
        if count is None:
            return
        places = self._tasks.setdefault(task_id, {})
        self._tasks.move_to_end(task_id)
        if place in places or len(places) < MAX_PLACES:
            places[place] = count
        if len(self._tasks) > MAX_TASKS:
            self._tasks.popitem(last=False)

    def without(self, task_id: str, offers: Sequence[HostOffer]) -> Sequence[HostOffer]:
        """Return the offers without the bids of nodes the task passes over, unless no other node bids.

        Such a node offers again, so it may have room by now. To wait for its announcement takes up to three seconds;
        the pauses of the task, which grow with each rejection, bound how often a full node is tried.
        """
        places = self._passed_over(task_id)
        others = [_without(offer, places) for offer in offers] if places else []
        return others if any(offer.bids for offer in others) else offers

    def _passed_over(self, task_id: str) -> set[Place]:
        places = self._tasks.get(task_id)
        if not places:
            return set()
        still = {place: count for place, count in places.items() if self._nodes.announcements(place[0]) == count}
        if still:
            self._tasks[task_id] = still
        else:
            del self._tasks[task_id]
        return set(still)


def _without(offer: HostOffer, places: set[Place]) -> HostOffer:
    bids = tuple(bid for bid in offer.bids if (offer.host, bid.node_id) not in places)
    return offer if len(bids) == len(offer.bids) else replace(offer, bids=bids)
