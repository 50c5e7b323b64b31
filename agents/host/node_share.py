"""Which nodes of a process one of its hosts announces, where they are more than an announcement holds."""

from collections.abc import Callable, Sequence
from operator import is_

from loom.agents.host.slots import Node
from loom.schemas.auction import ANNOUNCED_NODES


class Share:
    """Divides the nodes of a process between one host and further hosts. A node stays where it was first.

    Args:
        nodes: Returns the nodes there are now.
        most: Most nodes of the host.
    """

    def __init__(self, nodes: Callable[[], Sequence[Node]], most: int = ANNOUNCED_NODES) -> None:
        self._nodes = nodes
        self._most = most
        self._divided: list[Node] = []
        """The nodes there were when they were last divided."""
        self._own: list[Node] = []
        self._rest: list[Node] = []

    def own(self) -> Sequence[Node]:
        """Return the nodes of the host."""
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
        before = {node.id for node in self._own}
        elsewhere = {node.id for node in self._rest}
        room = self._most - sum(node.id in before for node in nodes)
        own: list[Node] = []
        rest: list[Node] = []
        for node in nodes:
            stays = node.id in before
            if stays or (node.id not in elsewhere and room > 0):
                room -= not stays
                own.append(node)
            else:
                rest.append(node)
        self._divided, self._own, self._rest = list(nodes), own, rest
