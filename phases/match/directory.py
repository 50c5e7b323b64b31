"""Which hosts and nodes there are, and what is known of the nodes."""

import asyncio
import time
from collections.abc import Callable, Iterable, Sequence
from collections.abc import Set as AbstractSet

from loom.bus.bus import Bus
from loom.bus.host_directory import MAX_HOSTS, AnnouncedHost, AnnouncementReader, HostKey
from loom.bus.logs.logger import get_logger
from loom.bus.natsio.connection import Subscription
from loom.bus.natsio.kv import BucketReader
from loom.bus.natsio.transport.message import Msg
from loom.phases.match.announced_nodes import AnnouncedNodes, Wanted
from loom.phases.match.newcomers import Newcomers
from loom.phases.match.node_ownership import Claims
from loom.phases.match.offers import HostOffer
from loom.phases.match.partial_decoding import Judged, ReadProfile, known, window
from loom.phases.match.presence import Presence
from loom.phases.match.ranking import Ranking
from loom.schemas.base import Undecodable
from loom.schemas.identity import qualified
from loom.schemas.learning import NodeProfile

log = get_logger()

MAX_NODES = 100_000
"""Ids of nodes that are kept for pinned tasks, those of each host counted."""
MAX_NAMES = 300_000
"""Nodes, domains and tools that are kept."""


def _now() -> float:
    return time.monotonic()


class HostDirectory:
    """Listens to announcements and to what ADAPT learns. It decides how long to wait, never who may bid.

    Args:
        judged: Called for every domain of a node that has changed, with the node, qualified by its owner, the
            domain_token and the attempts in its window.
    """

    def __init__(self, bus: Bus, *, judged: Callable[[str, str, Iterable[str]], None] = lambda *_: None) -> None:
        self._bus = bus
        self._judged = judged
        self.profiles: dict[str, NodeProfile] = {}
        """Node, qualified by its owner -> what has been learned; of each window the newest score alone."""
        self.newcomers = Newcomers()
        self.ranking = Ranking()
        self.nodes = AnnouncedNodes()
        self.asked_at = 0.0
        """Monotonic time at which the hosts were asked to announce themselves."""
        self._new_nodes = asyncio.Event()
        self._read: dict[str, ReadProfile] = {}
        self._announcements = AnnouncementReader(bus.discards, _now)
        self._presence = Presence(_now, MAX_HOSTS, self._forget_nodes)
        self._claims = Claims(_now, self._presence.seen_at)
        self._reader: BucketReader[ReadProfile] | None = None
        self._subscription: Subscription | None = None

    async def start(self) -> None:
        """Listen, ask the hosts to announce themselves, and read what has been learned."""
        self._subscription = await self._bus.connection.subscribe_sync(
            self._bus.subjects.of("host", "*", "*"), self._on_announcement
        )
        await self._bus.connection.publish(self._bus.subjects.hosts)
        self.asked_at = _now()
        self._reader = self._bus.bucket("nodes", ReadProfile).reader()
        while not self._reader.caught_up:
            await self._learn(self._reader)
        self._bus.tasks.spawn(self._follow(self._reader), name="follow profiles", essential=True)

    async def stop(self) -> None:
        """Listen no more."""
        if self._subscription is not None:
            self._bus.connection.unsubscribe(self._subscription)
        if self._reader is not None:
            await self._reader.stop()

    def awaited(self) -> set[HostKey]:
        """Return the hosts whose offers the next auction waits for."""
        return self._presence.awaited()

    @property
    def only_plain(self) -> bool:
        """Whether hosts are present, and none of them answers calls."""
        return self.has_hosts and not self._presence.has_bidders

    @property
    def has_hosts(self) -> bool:
        """Whether any host is present."""
        return len(self._presence) > 0

    @property
    def has_nodes(self) -> bool:
        """Whether any host that is present announces a node."""
        return self._claims.size > 0

    @property
    def new_nodes(self) -> asyncio.Event:
        """Set when the next node is announced that was not known."""
        return self._new_nodes

    def host_of(self, node: str) -> HostKey | None:
        """Return the host of a node, qualified by its owner; None when no host that announces it is alive."""
        return self._claims.host_of(node)

    def is_contested(self, node: str) -> bool:
        """Return whether a second host has just announced a node, and the first may be alive."""
        return self._claims.is_open(node)

    def answered(self, offers: Sequence[HostOffer], missing: AbstractSet[HostKey]) -> None:
        """Record who answered a call and who let its window pass; a host that is leaving is not waited for again."""
        self._presence.answered([offer.host for offer in offers if offer.decline != "draining"], missing)

    def may_yet_bid(self, wanted: Wanted, answered: AbstractSet[HostKey]) -> bool:
        """Return whether a node is announced that could do a task, on a host that may answer the next call.

        Args:
            answered: Hosts that have answered this call.
        """
        return any(
            place[0] not in answered and not self._presence.is_dropped(place[0])
            for place, _ in self.nodes.able(wanted, plain=False)
        )

    def have_failed(self, wanted: Wanted) -> bool:
        """Return whether plain nodes are announced that could do a task and have failed it."""
        return bool(wanted.excluded) and any(self.nodes.able(wanted._replace(excluded=()), plain=True))

    def _forget_nodes(self, host: HostKey) -> None:
        self._claims.forget(host)
        self.nodes.forget(host)

    def _on_announcement(self, msg: Msg) -> None:
        announced = self._announcements.read(msg)
        if announced is None:
            return
        if announced.draining:
            self._presence.forget(announced.key)
            return
        nodes = announced.nodes
        self._presence.announced(announced.key, plain=bool(nodes) and all(node.plain for node in nodes))
        if self._presence.seen_at(announced.key) is not None:  # else there are too many hosts
            self._take_nodes(announced)

    def _take_nodes(self, host: AnnouncedHost) -> None:
        self.nodes.announce(host)
        nodes = tuple(qualified(host.owner, node_id) for node_id in host.node_ids)
        unknown = any(self._claims.host_of(node) is None for node in nodes)
        if self._claims.announce(host.key, nodes):
            self._bus.connection.publish_nowait(
                self._bus.subjects.hosts
            )  # those that are alive announce themselves at once
        if unknown:
            self._new_nodes.set()
            self._new_nodes = asyncio.Event()
        while self._is_full() and self._presence.forget_newcomer():
            pass

    def _is_full(self) -> bool:
        return self._claims.size > MAX_NODES or self.nodes.size > MAX_NAMES

    # -- what has been learned

    async def _follow(self, reader: BucketReader[ReadProfile]) -> None:
        while True:
            await self._learn(reader)

    async def _learn(self, reader: BucketReader[ReadProfile]) -> None:
        batch = [entry.value for entry in await reader.batch() if entry.key == entry.value.key]
        for node in {read.name: read for read in batch}.values():
            try:
                self._take(node)
            except Undecodable as error:
                self._bus.discards.add("profile_undecodable", reason=error.message, node=node.name)

    def _take(self, read: ReadProfile) -> None:
        """Learn what has changed of a node."""
        node = read.name
        before = self._read.get(node)
        domains = before.domains if before else {}
        windows: dict[str, tuple[Judged, ...]] = {
            domain_token: window(evidence)
            for domain_token, evidence in read.domains.items()
            if evidence != domains.get(domain_token)
        }
        self.profiles[node] = profile = known(read, windows, self.profiles.get(node))
        self._read[node] = read
        self.newcomers.learn(node, profile.domains)
        self.ranking.learn(node, {domain_token: evidence.mean for domain_token, evidence in read.domains.items()})
        for domain_token, scores in windows.items():
            self._judged(node, domain_token, [score.attempt_id for score in scores])
