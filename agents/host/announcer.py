"""Announces a host, and publishes a lifecycle message for each node that joins or leaves it."""

from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from itertools import count

from msgspec.structs import replace

from loom.agents.host.announcement import fit_size
from loom.agents.host.publishing import log_failures, publish_lifecycle
from loom.agents.host.slots import Node
from loom.bus.bus import Bus
from loom.schemas.auction import HostAnnouncement

MAX_LEFT = 256


class Announcer:
    """Publishes the announcements of one host with increasing sequence numbers, and its lifecycle messages.

    Args:
        nodes: Returns the nodes of the host that accept work.
        announcement: Returns the announcement of these nodes.
    """

    def __init__(
        self,
        bus: Bus,
        host_id: str,
        nodes: Callable[[], Sequence[Node]],
        announcement: Callable[[Sequence[Node]], HostAnnouncement],
    ) -> None:
        self._bus = bus
        self._host_id = host_id
        self._nodes = nodes
        self._announcement = announcement
        self._last: HostAnnouncement | None = None
        self._seq = count(1)
        self.announced: frozenset[str] = frozenset()
        """Ids of the nodes in the last announcement."""
        self.left: deque[str] = deque(maxlen=MAX_LEFT)
        """Ids of nodes that left recently; awards to them may still arrive."""

    @property
    def subject(self) -> str:
        """The subject of the host's announcements."""
        return self._bus.subjects.of("host", self._bus.identity.owner, self._host_id)

    async def publish(self) -> list[str]:
        """Publish an announcement, and a lifecycle message for each node that joined or left since the last one.

        Returns:
            The ids of the nodes that left.
        """
        nodes = self._nodes()
        ids = frozenset(node.id for node in nodes)
        before = self.announced
        self.left.extend(before - ids)
        self._last = fit_size(replace(self._announcement(nodes), seq=next(self._seq)))
        await self._bus.connection.publish(self.subject, self._last)
        self.announced = ids
        for node_id in ids - before:
            await publish_lifecycle(self._bus, "joined", node_id, self._host_id)
        for node_id in before - ids:
            await publish_lifecycle(self._bus, "left", node_id, self._host_id)
        return list(before - ids)

    async def leave(self) -> None:
        """Publish that all nodes have left; failures are logged."""
        for node_id in self.announced:
            await log_failures(partial(publish_lifecycle, self._bus, "left", node_id, self._host_id))

    def repeat(self) -> HostAnnouncement | None:
        """Return the last announcement with a new sequence number; may be called from another thread."""
        return None if self._last is None else replace(self._last, seq=next(self._seq))
