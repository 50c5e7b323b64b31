"""Announcements of node hosts, and the hosts that are alive by their announcements.

Owner and id of a host are those of the subject, which the server's permissions pin, not those of the message.
"""

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import NamedTuple

from msgspec import structs
from msgspec.structs import replace

from loom.bus.bus import Bus
from loom.bus.logs.discards import Discards
from loom.bus.natsio.connection import Subscription
from loom.bus.natsio.transport.message import Msg
from loom.schemas.auction import MAX_ANNOUNCEMENT_BYTES, HostAnnouncement
from loom.schemas.base import Undecodable, decode
from loom.schemas.identity import LOCAL_OWNER, qualified
from loom.schemas.tokens import Token

MAX_HOSTS = 10_000
"""Hosts that a reader of announcements remembers at most."""
ALIVE_S = 10.0
"""Seconds without an announcement after which a host is considered gone."""


class HostKey(NamedTuple):
    """Identifies a host: its owner, and its id among the owner's hosts."""

    owner: str
    host_id: str

    def __str__(self) -> str:
        return qualified(self.owner, self.host_id)


class AnnouncedHost(HostAnnouncement, frozen=True, kw_only=True):
    """An announcement and the host that published it."""

    owner: Token = LOCAL_OWNER
    host_id: Token

    @property
    def key(self) -> HostKey:
        """Owner and id of the host."""
        return HostKey(self.owner, self.host_id)

    @property
    def name(self) -> str:
        """The host as commands print it: `host_id`, or `owner.host_id` if the owner is not `local`."""
        return qualified(self.owner, self.host_id)


def host_in(subject: str) -> HostKey:
    """Return the host in a subject of the form `….<owner>.<host_id>`."""
    _, owner, host_id = subject.rsplit(".", 2)
    return HostKey(owner, host_id)


class AnnouncementReader:
    """Decodes announcements; counts and logs those that cannot be decoded, and ignores those that are outdated.

    Args:
        discards: Counts the announcements that are left out.
        clock: Returns monotonic time in seconds.
    """

    def __init__(self, discards: Discards, clock: Callable[[], float] = time.monotonic) -> None:
        self._discards = discards
        self._clock = clock
        self._last: OrderedDict[HostKey, tuple[int, float]] = OrderedDict()
        """Host -> `seq` and time of its last announcement; the host with the oldest one first."""

    def read(self, msg: Msg) -> AnnouncedHost | None:
        """Return the announcement; None for one that is left out."""
        key = host_in(msg.subject)
        try:
            announcement = decode(msg.data, HostAnnouncement, limit=MAX_ANNOUNCEMENT_BYTES)
        except Undecodable as error:
            self._discards.add_from_host(str(key), "announcements", "announcement_undecodable", reason=error.message)
            return None
        if self._is_outdated(key, announcement.seq):
            return None
        return AnnouncedHost(owner=key.owner, host_id=key.host_id, **structs.asdict(announcement))

    def _is_outdated(self, key: HostKey, seq: int) -> bool:
        """Return whether a later announcement of the host has arrived; after 10 s without one any `seq` is accepted."""
        now = self._clock()
        last, at = self._last.get(key, (0, now))
        if seq < last and now - at < ALIVE_S:
            return True
        self._last[key] = (seq, now)
        self._last.move_to_end(key)
        if len(self._last) > MAX_HOSTS:
            self._last.popitem(last=False)
        return False


class LiveHosts:
    """The hosts that announced themselves within the last 10 s; at most 10,000, those with the newest announcements."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self._reader = AnnouncementReader(bus.discards)
        self._announced: dict[HostKey, tuple[float, AnnouncedHost]] = {}
        """Host -> monotonic time of its last announcement, and the announcement; oldest first."""
        self._subscription: Subscription | None = None

    async def start(self) -> None:
        """Subscribe to announcements, and request one from every host."""
        self._subscription = await self._bus.connection.subscribe(
            self._bus.subjects.of("host", "*", "*"), self._on_announcement
        )
        await self._bus.connection.publish(self._bus.subjects.hosts)

    async def stop(self) -> None:
        """Unsubscribe; safe to call twice or before `start`."""
        subscription, self._subscription = self._subscription, None
        if subscription is not None:
            self._bus.connection.unsubscribe(subscription)

    def hosts(self) -> list[AnnouncedHost]:
        """Return the last announcement of each live host."""
        since = time.monotonic() - ALIVE_S
        self._announced = {key: entry for key, entry in self._announced.items() if entry[0] >= since}
        return [host for _, host in self._announced.values()]

    def mark_retiring(self, key: HostKey, node_id: str) -> None:
        """Mark a spawned node as retiring, until the next announcement of its host."""
        if key not in self._announced:
            return
        at, host = self._announced[key]
        spawned = tuple(replace(node, retiring=True) if node.node_id == node_id else node for node in host.spawned)
        self._announced[key] = at, replace(host, spawned=spawned)

    async def _on_announcement(self, msg: Msg) -> None:
        host = self._reader.read(msg)
        if host is None:
            return
        self._announced.pop(host.key, None)
        self._announced[host.key] = time.monotonic(), host
        if len(self._announced) > MAX_HOSTS:
            del self._announced[next(iter(self._announced))]


async def announced_hosts(bus: Bus, within_s: float) -> list[AnnouncedHost]:
    """Request announcements, and return the hosts that announced themselves within `within_s` seconds, sorted."""
    directory = LiveHosts(bus)
    await directory.start()
    try:
        await asyncio.sleep(within_s)
    finally:
        await directory.stop()
    return sorted(directory.hosts(), key=lambda host: host.key)
