"""Announces a host at a limited rate, and publishes a lifecycle message for each node that joins or leaves it."""

import asyncio
import random
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from itertools import count

from msgspec.structs import replace

from loom.agents.host.announcement import fit_size
from loom.agents.host.publishing import log_failures, publish_lifecycle
from loom.agents.host.slots import Node
from loom.agents.host.timings import HostTimings
from loom.bus.bus import Bus
from loom.schemas.auction import HostAnnouncement

MAX_LEFT = 256
BURST = 4
"""Announcements on request without delay after a quiet period; then they keep the average interval."""


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


class AnnouncePace:
    """Announces a host on request, at most once a second on average; pending requests share one announcement.

    Args:
        announce: Starts an announcement.
        timings: Times of the host.
        clock: Returns monotonic seconds.
    """

    def __init__(
        self,
        announce: Callable[[], object],
        timings: HostTimings = HostTimings(),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._announce = announce
        self._interval_s, self._max_delay_s = timings.requested_announce_s, timings.max_announce_delay_s
        self._clock = clock
        self._next_at = 0.0
        """Time of the next announcement at the average rate."""
        self._timer: asyncio.TimerHandle | None = None

    def request(self, *, at_random: bool = True) -> None:
        """Schedule an announcement, unless one is scheduled already.

        Args:
            at_random: Whether to add a random delay, because other hosts got the same request.
        """
        if self._timer is not None:
            return
        now = self._clock()
        start_at = max(now, self._next_at - (BURST - 1) * self._interval_s)
        self._next_at = max(self._next_at, now) + self._interval_s
        delay_s = random.uniform(0.0, self._max_delay_s) if at_random else 0.0  # noqa: S311 - not a secret
        self._timer = asyncio.get_running_loop().call_later(start_at - now + delay_s, self._announce_now)

    def stop(self) -> None:
        """Cancel the scheduled announcement."""
        if self._timer is not None:
            self._timer.cancel()

    def _announce_now(self) -> None:
        self._timer = None
        self._announce()
