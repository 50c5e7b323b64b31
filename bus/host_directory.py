"""Announcements of node hosts, and the hosts that are alive by their announcements.

Owner and id of a host are those of the subject, which the server's permissions pin, not those of the message.
"""

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import NamedTuple

import msgspec
from msgspec import structs
from msgspec.structs import replace

from loom.bus.bus import Bus
from loom.bus.logs.discards import Discards
from loom.bus.natsio.connection import Subscription
from loom.bus.natsio.transport.message import Msg
from loom.schemas.auction import MAX_ANNOUNCEMENT_BYTES, AnnouncedNode, HostAnnouncement
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


class _PartialAnnouncement(HostAnnouncement, frozen=True, kw_only=True):
    """An announcement whose nodes are not decoded, because most announcements repeat them."""

    nodes: msgspec.Raw = msgspec.Raw(b"[]")  # type: ignore[assignment]  # JSON instead of the nodes


class _LastAnnouncement(NamedTuple):
    """What a reader remembers of the last announcement of a host."""

    seq: int
    at: float
    """Monotonic time."""
    nodes_hash: int = 0
    """Hash of the JSON of the nodes."""
    nodes: tuple[AnnouncedNode, ...] | None = None


class AnnouncementReader:
    """Decodes announcements; counts and logs those that cannot be decoded, and ignores those that are outdated.

    Nodes that are the same as in the host's last announcement are not decoded again: the result has the same tuple.

    Args:
        discards: Counts the announcements that are left out.
        clock: Returns monotonic time in seconds.
    """

    def __init__(self, discards: Discards, clock: Callable[[], float] = time.monotonic) -> None:
        self._discards = discards
        self._clock = clock
        self._last: OrderedDict[HostKey, _LastAnnouncement] = OrderedDict()
        """The host with the oldest announcement comes first."""

    def read(self, msg: Msg) -> AnnouncedHost | None:
        """Return the announcement; None for one that is left out."""
        key = host_in(msg.subject)
        last = self._last.get(key)
        try:
            partial, nodes_hash = _without_nodes(msg.data)
            nodes = last.nodes if last is not None and last.nodes_hash == nodes_hash else None
            announcement = partial if nodes is not None else _decoded(msg.data)
        except Undecodable as error:
            self._discards.add_from_host(str(key), "announcements", "announcement_undecodable", reason=error.message)
            return None
        now = self._clock()
        if last is not None and announcement.seq < last.seq and now - last.at < ALIVE_S:
            return None  # outdated; after 10 s without an announcement any `seq` is accepted
        nodes = announcement.nodes if nodes is None else nodes
        self._remember(key, _LastAnnouncement(announcement.seq, now, nodes_hash, nodes))
        return AnnouncedHost(owner=key.owner, host_id=key.host_id, **{**structs.asdict(announcement), "nodes": nodes})

    def forget_nodes(self, key: HostKey) -> None:
        """Free the memory of a host's nodes; the order of its announcements stays known."""
        last = self._last.get(key)
        if last is not None:
            self._last[key] = last._replace(nodes=None)

    def _remember(self, key: HostKey, last: _LastAnnouncement) -> None:
        self._last[key] = last
        self._last.move_to_end(key)
        if len(self._last) > MAX_HOSTS:
            self._last.popitem(last=False)


def _decoded(raw: bytes) -> HostAnnouncement:
    return decode(raw, HostAnnouncement, limit=MAX_ANNOUNCEMENT_BYTES)


def _without_nodes(raw: bytes) -> tuple[HostAnnouncement, int]:
    """Return an announcement whose nodes are not decoded, and the hash of their JSON.

    Raises:
        Undecodable: Another part cannot be decoded.
    """
    announcement = decode(raw, _PartialAnnouncement, limit=MAX_ANNOUNCEMENT_BYTES)
    return announcement, hash(bytes(announcement.nodes))


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
        for key in [key for key, (at, _) in self._announced.items() if at < since]:
            self._remove(key)
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
            self._remove(next(iter(self._announced)))

    def _remove(self, key: HostKey) -> None:
        del self._announced[key]
        self._reader.forget_nodes(key)


async def announced_hosts(bus: Bus, within_s: float) -> list[AnnouncedHost]:
    """Request announcements, and return the hosts that announced themselves within `within_s` seconds, sorted."""
    directory = LiveHosts(bus)
    await directory.start()
    try:
        await asyncio.sleep(within_s)
    finally:
        await directory.stop()
    return sorted(directory.hosts(), key=lambda host: host.key)
