"""Divides the nodes of a process between hosts when there are more than one announcement can hold."""

from collections.abc import Callable, Sequence
from operator import is_

from loom.agents.host.slots import Node
from loom.schemas.auction import ANNOUNCED_NODES


class NodePartition:
    """Divides the nodes of a process between one host and further hosts; a node stays with its first host.

    Args:
        nodes: Returns the current nodes of the process.
        limit: Maximum number of nodes of the first host.
    """

    def __init__(self, nodes: Callable[[], Sequence[Node]], limit: int = ANNOUNCED_NODES) -> None:
        self._nodes = nodes
        self._limit = limit
        self._divided: list[Node] = []
        """The nodes at the last division."""
        self._own: list[Node] = []
        self._rest: list[Node] = []

    def own(self) -> Sequence[Node]:
        """Return the nodes of the first host."""
        self._divide()
        return self._own

    def rest(self) -> Sequence[Node]:
        """Return the nodes of further hosts."""
        self._divide()
        return self._rest

    def _divide(self) -> None:
        nodes = self._nodes()
        if len(nodes) == len(self._divided) and all(map(is_, nodes, self._divided)):
            return
        own_ids = {node.id for node in self._own}
        rest_ids = {node.id for node in self._rest}
        free_places = self._limit - sum(node.id in own_ids for node in nodes)
        own: list[Node] = []
        rest: list[Node] = []
        for node in nodes:
            stays = node.id in own_ids
            if stays or (node.id not in rest_ids and free_places > 0):
                free_places -= not stays
                own.append(node)
            else:
                rest.append(node)
        self._divided, self._own, self._rest = list(nodes), own, rest
