"""Which hosts are there to be waited for, and what is known of their nodes."""

import math
import time
from collections.abc import Callable, Iterable, Sequence
from collections.abc import Set as AbstractSet

from loom.bus.client import Bus, Msg, Subscription
from loom.bus.kv import Bucket, BucketReader
from loom.phases.match.ranking import Ranking
from loom.phases.match.reading import Judged, ReadProfile, known, window
from loom.schemas.auction import HostAnnouncement, Offer
from loom.schemas.learning import NodeProfile
from loom.schemas.wire import Undecodable, decode

HEARD_S = 10.0
MISSED_WINDOWS = 3


class Roster:
    """Listens to announcements and to what ADAPT learns. It decides how long to wait, never who may bid.

    Args:
        judged: Told of every domain of a node that has changed: node id, slug, attempts in its window.
    """

    def __init__(self, bus: Bus, *, judged: Callable[[str, str, Iterable[str]], None] = lambda *_: None) -> None:
        self._bus = bus
        self._judged = judged
        self.profiles: dict[str, NodeProfile] = {}
        """node id -> what has been learned; of each window the newest score alone."""
        self.ranking = Ranking()
        self._read: dict[str, ReadProfile] = {}
        self._heard: dict[str, float] = {}
        self._missed: dict[str, int] = {}
        self._expected: frozenset[str] = frozenset()
        self._expected_until = -math.inf
        self._nodes_of: dict[str, tuple[str, ...]] = {}
        self._hosts_of: dict[str, set[str]] = {}
        self._reader: BucketReader[ReadProfile] | None = None
        self._subscription: Subscription | None = None

    async def start(self) -> None:
        """Listen, and ask who is there."""
        self._subscription = await self._bus.listen(self._bus.subjects.of("host", "*"), self._on_announcement)
        self._reader = Bucket(self._bus, "nodes", ReadProfile).reader()
        while not self._reader.caught_up:
            await self._learn(self._reader)
        self._bus.spawn(self._follow(self._reader), name="follow profiles", essential=True)
        await self._bus.publish(self._bus.subjects.hosts)

    async def stop(self) -> None:
        """Listen no more."""
        if self._subscription is not None:
            await self._bus.unsubscribe(self._subscription)
        if self._reader is not None:
            await self._reader.stop()

    def expected(self) -> frozenset[str]:
        """Return the hosts whose offers are worth waiting for."""
        now = time.monotonic()
        if now >= self._expected_until:
            since = now - HEARD_S
            self._expected = frozenset(
                host for host, at in self._heard.items() if at >= since and self._missed.get(host, 0) < MISSED_WINDOWS
            )
            self._expected_until = min((self._heard[host] for host in self._expected), default=math.inf) + HEARD_S
        return self._expected

    def hosts_of(self, node_id: str) -> list[str]:
        """Return the hosts that lately said they have this node, the one heard last first."""
        expected = self.expected()
        hosts = [host for host in self._hosts_of.get(node_id, ()) if host in expected]
        return sorted(hosts, key=lambda host: self._heard[host], reverse=True)

    def answered(self, offers: Sequence[Offer], missing: AbstractSet[str]) -> None:
        """Note who answered a call and who let its window pass; who is leaving is not waited for again."""
        now = time.monotonic()
        for offer in offers:
            self._here(offer.host_id, self._heard.get(offer.host_id) if offer.decline == "draining" else now)
        for host in missing & self._heard.keys():  # one that has left meanwhile is forgotten
            self._missed[host] = self._missed.get(host, 0) + 1
            if self._missed[host] >= MISSED_WINDOWS:
                self._expected_until = -math.inf

    def _here(self, host_id: str, at: float | None) -> None:
        if at is not None:
            self._heard[host_id] = at
        if self._missed:
            self._missed.pop(host_id, None)
        if host_id not in self._expected:
            self._expected_until = -math.inf

    def _on_announcement(self, msg: Msg) -> None:
        try:
            said = decode(msg.data, HostAnnouncement)
        except Undecodable as error:
            self._bus.discards.add("announcement_undecodable", reason=error.message, subject=msg.subject)
            return
        if said.draining:
            self._forget(said.host_id)
            return
        self._here(said.host_id, time.monotonic())
        if said.nodes != self._nodes_of.get(said.host_id):
            self._forget_nodes(said.host_id)
            self._nodes_of[said.host_id] = said.nodes
            for node in said.nodes:
                self._hosts_of.setdefault(node, set()).add(said.host_id)
        if len(self._heard) > 2 * len(self.expected()) + 16:
            self._forget_silent()

    def _forget_nodes(self, host_id: str) -> None:
        for node in set(self._nodes_of.pop(host_id, ())):
            self._hosts_of[node].discard(host_id)
            if not self._hosts_of[node]:
                del self._hosts_of[node]

    def _forget(self, host_id: str) -> None:
        self._heard.pop(host_id, None)
        self._missed.pop(host_id, None)
        self._expected_until = -math.inf
        self._forget_nodes(host_id)

    def _forget_silent(self) -> None:
        for host in set(self._heard) - self.expected():
            self._forget(host)

    # -- what has been learned

    async def _follow(self, reader: BucketReader[ReadProfile]) -> None:
        while True:
            await self._learn(reader)

    async def _learn(self, reader: BucketReader[ReadProfile]) -> None:
        batch = [entry.value for entry in await reader.batch() if entry.key == entry.value.node_id]
        for node in {read.node_id: read for read in batch}.values():
            try:
                self._take(node)
            except Undecodable as error:
                self._bus.discards.add("profile_undecodable", reason=error.message, node_id=node.node_id)

    def _take(self, read: ReadProfile) -> None:
        """Learn what has changed of a node."""
        before = self._read.get(read.node_id)
        domains = before.domains if before else {}
        windows: dict[str, tuple[Judged, ...]] = {
            slug: window(evidence) for slug, evidence in read.domains.items() if evidence != domains.get(slug)
        }
        self.profiles[read.node_id] = known(read, windows, self.profiles.get(read.node_id))
        self._read[read.node_id] = read
        self.ranking.learn(read.node_id, {slug: evidence.mean for slug, evidence in read.domains.items()})
        for slug, scores in windows.items():
            self._judged(read.node_id, slug, [score.attempt_id for score in scores])
