"""Which hosts are there to be waited for, and what is known of their nodes."""

import time
from collections.abc import Callable, Sequence

import structlog

from loom.bus.client import Bus, Msg, Subscription
from loom.bus.kv import Bucket, BucketReader
from loom.schemas.auction import HostAnnouncement, Offer
from loom.schemas.learning import NodeProfile
from loom.schemas.wire import Undecodable, decode

log = structlog.get_logger()

HEARD_S = 10.0
MISSED_WINDOWS = 3


class Roster:
    """Listens to announcements and to what ADAPT learns. It decides how long to wait, never who may bid.

    Args:
        learned: Told of each profile that has changed.
    """

    def __init__(self, bus: Bus, *, learned: Callable[[NodeProfile], None] = lambda _: None) -> None:
        self._bus = bus
        self._learned = learned
        self.profiles: dict[str, NodeProfile] = {}
        """node id -> what has been learned."""
        self._heard: dict[str, float] = {}
        self._missed: dict[str, int] = {}
        self._hosts_of: dict[str, set[str]] = {}
        self._reader: BucketReader[NodeProfile] | None = None
        self._subscription: Subscription | None = None

    async def start(self) -> None:
        """Listen, and ask who is there."""
        self._subscription = await self._bus.subscribe(self._bus.subjects.of("host", "*"), self._on_announcement)
        self._reader = Bucket(self._bus, "nodes", NodeProfile).reader()
        while not self._reader.caught_up:
            await self._learn(self._reader)
        self._bus.spawn(self._follow(self._reader), name="follow profiles")
        await self._bus.publish(self._bus.subjects.hosts)

    async def stop(self) -> None:
        """Listen no more."""
        if self._subscription is not None:
            await self._bus.unsubscribe(self._subscription)
        if self._reader is not None:
            await self._reader.stop()

    def expected(self) -> frozenset[str]:
        """Return the hosts whose offers are worth waiting for."""
        since = time.monotonic() - HEARD_S
        return frozenset(
            host for host, at in self._heard.items() if at >= since and self._missed.get(host, 0) < MISSED_WINDOWS
        )

    def hosts_of(self, node_id: str) -> list[str]:
        """Return the hosts that lately said they have this node, the one heard last first."""
        expected = self.expected()
        hosts = [host for host in self._hosts_of.get(node_id, ()) if host in expected]
        return sorted(hosts, key=lambda host: self._heard[host], reverse=True)

    def answered(self, expected: frozenset[str], offers: Sequence[Offer]) -> None:
        """Note who answered a call and who let its window pass; who is leaving is not waited for again."""
        for offer in offers:
            if offer.decline != "draining":
                self._heard[offer.host_id] = time.monotonic()
            self._missed.pop(offer.host_id, None)
        for host in expected - {offer.host_id for offer in offers}:
            self._missed[host] = self._missed.get(host, 0) + 1

    async def _on_announcement(self, msg: Msg) -> None:
        try:
            said = decode(msg.data, HostAnnouncement)
        except Undecodable as error:
            log.warning("announcement_undecodable", reason=error.message)
            return
        self._forget_nodes(said.host_id)
        if said.draining:
            self._heard.pop(said.host_id, None)
            return
        self._heard[said.host_id] = time.monotonic()
        self._missed.pop(said.host_id, None)
        for node in said.nodes:
            self._hosts_of.setdefault(node, set()).add(said.host_id)
        if len(self._heard) > 2 * len(self.expected()) + 16:
            self._forget_silent()

    def _forget_nodes(self, host_id: str) -> None:
        for node in [node for node, hosts in self._hosts_of.items() if host_id in hosts]:
            self._hosts_of[node].discard(host_id)
            if not self._hosts_of[node]:
                del self._hosts_of[node]

    def _forget_silent(self) -> None:
        for host in set(self._heard) - self.expected():
            self._heard.pop(host)
            self._missed.pop(host, None)
            self._forget_nodes(host)

    async def _follow(self, reader: BucketReader[NodeProfile]) -> None:
        while True:
            await self._learn(reader)

    async def _learn(self, reader: BucketReader[NodeProfile]) -> None:
        for entry in await reader.batch():
            self.profiles[entry.value.node_id] = entry.value
            self._learned(entry.value)
