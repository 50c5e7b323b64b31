"""Which hosts there are, by what they last announced."""

import time

from msgspec.structs import replace

from loom.bus.client import Bus, Msg, Subscription
from loom.schemas.auction import HostAnnouncement
from loom.schemas.wire import Undecodable, decode

HEARD_S = 10.0  # hosts announce themselves every 3 s


class Census:
    """Listens to announcements. A host that is draining, or has not been heard for 10 s, does not count."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self._said: dict[str, tuple[float, HostAnnouncement]] = {}
        self._subscription: Subscription | None = None

    async def start(self) -> None:
        """Listen, and ask who is there."""
        self._subscription = await self._bus.subscribe(self._bus.subjects.of("host", "*"), self._on_announcement)
        await self._bus.publish(self._bus.subjects.hosts)

    async def stop(self) -> None:
        """Listen no more."""
        if self._subscription is not None:
            await self._bus.unsubscribe(self._subscription)

    def hosts(self) -> list[HostAnnouncement]:
        """Return what the present hosts said last."""
        since = time.monotonic() - HEARD_S
        self._said = {host_id: one for host_id, one in self._said.items() if one[0] >= since}
        return [said for _, said in self._said.values()]

    def note_retiring(self, host_id: str, node_id: str) -> None:
        """Take a child for one on its way out, before its host has said so."""
        if host_id not in self._said:
            return
        at, said = self._said[host_id]
        children = tuple(
            replace(child, retiring=True) if child.node_id == node_id else child for child in said.children
        )
        self._said[host_id] = at, replace(said, children=children)

    async def _on_announcement(self, msg: Msg) -> None:
        try:
            said = decode(msg.data, HostAnnouncement)
        except Undecodable as error:
            self._bus.discards.add("announcement_undecodable", reason=error.message, subject=msg.subject)
            return
        self._said.pop(said.host_id, None)
        if not said.draining:
            self._said[said.host_id] = time.monotonic(), said
