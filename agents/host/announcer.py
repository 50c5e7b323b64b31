"""Announces a host and the nodes that come and go on it."""

from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from itertools import count

from msgspec.structs import replace

from loom.agents.host.announcement import fitted
from loom.agents.host.repeating import attempt
from loom.agents.host.slots import Node
from loom.bus.bus import Bus
from loom.schemas.auction import HostAnnouncement
from loom.schemas.learning import Lifecycle, LifecycleKind

LEFT = 256


class Announcer:
    """Publishes announcements of one host under rising numbers, and a lifecycle message for each node.

    Args:
        nodes: Returns the nodes of the host that have an agent.
        describe: Returns the announcement of these nodes.
    """

    def __init__(
        self,
        bus: Bus,
        host_id: str,
        nodes: Callable[[], Sequence[Node]],
        describe: Callable[[Sequence[Node]], HostAnnouncement],
    ) -> None:
        self._bus = bus
        self._host_id = host_id
        self._nodes = nodes
        self._describe = describe
        self._last: HostAnnouncement | None = None
        self._seq = count(1)
        self.known: frozenset[str] = frozenset()
        """Nodes that have been announced."""
        self.left: deque[str] = deque(maxlen=LEFT)
        """Nodes that have gone lately: awards to them may still be on the way."""

    @property
    def subject(self) -> str:
        """The subject of the host's announcements."""
        return self._bus.subjects.of("host", self._bus.identity.owner, self._host_id)

    async def publish(self) -> list[str]:
        """Publish which nodes there are, and a lifecycle message for each that has come or gone.

        Returns:
            The nodes that have gone.
        """
        nodes = self._nodes()
        ids = frozenset(node.id for node in nodes)
        before = self.known
        self.left.extend(before - ids)
        self._last = fitted(replace(self._describe(nodes), seq=next(self._seq)))
        await self._bus.connection.publish(self.subject, self._last)
        self.known = ids
        for node_id in ids - before:
            await self._tell("joined", node_id)
        for node_id in before - ids:
            await self._tell("left", node_id)
        return list(before - ids)

    async def leave(self) -> None:
        """Publish that all nodes have left."""
        for node_id in self.known:
            await attempt(partial(self._tell, "left", node_id))

    def repeated(self) -> HostAnnouncement | None:
        """Return the last announcement under a number of its own; may be called from another thread."""
        return None if self._last is None else replace(self._last, seq=next(self._seq))

    async def _tell(self, kind: LifecycleKind, node_id: str) -> None:
        owner = self._bus.identity.owner
        news = Lifecycle(kind=kind, node_id=node_id, owner=owner, host_id=self._host_id, at=self._bus.clock.now())
        await self._bus.connection.publish(self._bus.subjects.of("lifecycle", owner, kind, owner, node_id), news)
