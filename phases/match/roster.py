"""Which hosts are there to be waited for, and what is known of their nodes."""

import time
from collections.abc import Callable, Iterable, Sequence
from collections.abc import Set as AbstractSet

from loom.bus.announcements import MAX_HOSTS, AnnouncementReader
from loom.bus.client import Bus, Msg, Subscription
from loom.bus.kv import Bucket, BucketReader
from loom.bus.log import get_logger
from loom.phases.match.claims import Claims
from loom.phases.match.presence import Presence
from loom.phases.match.ranking import Ranking
from loom.phases.match.reading import Judged, ReadProfile, known, window
from loom.schemas.auction import Offer
from loom.schemas.learning import NodeProfile
from loom.schemas.wire import Undecodable

log = get_logger()

MAX_NODES = 100_000
"""Names of nodes that are kept for pinned tasks, those of each host counted."""


def _now() -> float:
    return time.monotonic()


class Roster:
    """Listens to announcements and to what ADAPT learns. It decides how long to wait, never who may bid.

    Args:
        judged: Told of every domain of a node that has changed: node id, domain_token, attempts in its window.
    """

    def __init__(self, bus: Bus, *, judged: Callable[[str, str, Iterable[str]], None] = lambda *_: None) -> None:
        self._bus = bus
        self._judged = judged
        self.profiles: dict[str, NodeProfile] = {}
        """node id -> what has been learned; of each window the newest score alone."""
        self.ranking = Ranking()
        self._read: dict[str, ReadProfile] = {}
        self._announcements = AnnouncementReader(bus.discards)
        self._presence = Presence(_now, MAX_HOSTS, self._forget_nodes)
        self._claims = Claims(_now, self._presence.seen_at)
        self._reader: BucketReader[ReadProfile] | None = None
        self._subscription: Subscription | None = None

    async def start(self) -> None:
        """Listen, and ask who is there."""
        self._subscription = await self._bus.listen(self._bus.subjects.of("host", "*", "*"), self._on_announcement)
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

    def awaited(self) -> set[str]:
        """Return the hosts whose offers the next auction waits for."""
        return self._presence.awaited()

    @property
    def has_hosts(self) -> bool:
        """Whether any host is present."""
        return len(self._presence) > 0

    @property
    def has_nodes(self) -> bool:
        """Whether any host that is present announces a node."""
        return self._claims.size > 0

    def host_of(self, node_id: str) -> str | None:
        """Return the host a node belongs to; None when no host that announces it is alive."""
        return self._claims.host_of(node_id)

    def is_contested(self, node_id: str) -> bool:
        """Return whether a second host has just announced a node, and the first may be alive."""
        return self._claims.is_open(node_id)

    def answered(self, offers: Sequence[Offer], missing: AbstractSet[str]) -> None:
        """Record who answered a call and who let its window pass; a host that is leaving is not waited for again."""
        self._presence.answered([offer.host_id for offer in offers if offer.decline != "draining"], missing)

    def _forget_nodes(self, host_id: str) -> None:
        self._claims.forget(host_id)

    def _on_announcement(self, msg: Msg) -> None:
        announcement = self._announcements.read(msg)
        if announcement is None:
            return
        host_id = announcement.host_id
        if announcement.draining:
            self._presence.forget(host_id)
            return
        self._presence.announced(host_id)
        if self._presence.seen_at(host_id) is None:
            return  # there are too many hosts
        if self._claims.announce(host_id, announcement.nodes):
            self._bus.send(self._bus.subjects.hosts)  # those that are alive announce themselves at once
        while self._claims.size > MAX_NODES and self._presence.forget_newcomer():
            pass

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
            domain_token: window(evidence)
            for domain_token, evidence in read.domains.items()
            if evidence != domains.get(domain_token)
        }
        self.profiles[read.node_id] = known(read, windows, self.profiles.get(read.node_id))
        self._read[read.node_id] = read
        self.ranking.learn(
            read.node_id, {domain_token: evidence.mean for domain_token, evidence in read.domains.items()}
        )
        for domain_token, scores in windows.items():
            self._judged(read.node_id, domain_token, [score.attempt_id for score in scores])
