"""Which hosts there are, by what they last announced."""

import time

from msgspec.structs import replace

from loom.bus.bus import Bus
from loom.bus.host_directory import HEARD_S, MAX_HOSTS, AnnouncedHost, AnnouncementReader, HostKey
from loom.bus.natsio.connection import Subscription
from loom.bus.natsio.transport.message import Msg


class Census:
    """Listens to announcements. A host that is draining, or has not been heard for 10 s, does not count."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self._announcements = AnnouncementReader(bus.discards)
        self._said: dict[HostKey, tuple[float, AnnouncedHost]] = {}
        self._subscription: Subscription | None = None

    async def start(self) -> None:
        """Listen, and ask who is there."""
        self._subscription = await self._bus.connection.subscribe(
            self._bus.subjects.of("host", "*", "*"), self._on_announcement
        )
        await self._bus.connection.publish(self._bus.subjects.hosts)

    async def stop(self) -> None:
        """Listen no more."""
        if self._subscription is not None:
            self._bus.connection.unsubscribe(self._subscription)

    def hosts(self) -> list[AnnouncedHost]:
        """Return what the present hosts said last."""
        since = time.monotonic() - HEARD_S
        self._said = {key: one for key, one in self._said.items() if one[0] >= since}
        return [said for _, said in self._said.values()]

    def note_retiring(self, host: HostKey, node_id: str) -> None:
        """Take a child for one on its way out, before its host has said so."""
        if host not in self._said:
            return
        at, said = self._said[host]
        children = tuple(replace(child, retiring=True) if child.node_id == node_id else child for child in said.spawned)
        self._said[host] = at, replace(said, spawned=children)

    async def _on_announcement(self, msg: Msg) -> None:
        announcement = self._announcements.read(msg)
        if announcement is None:
            return
        self._said.pop(announcement.key, None)
        if not announcement.draining:
            self._said[announcement.key] = time.monotonic(), announcement
        if len(self._said) > MAX_HOSTS:
            del self._said[next(iter(self._said))]
