"""The present hosts, their nodes, and the learned profiles of the nodes."""

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
from loom.phases.match.announced_nodes import AnnouncedNodes, TaskRequirements
from loom.phases.match.calls.offers import HostOffer
from loom.phases.match.calls.presence import HostPresence
from loom.phases.match.newcomers import Newcomers
from loom.phases.match.node_ownership import NodeOwnership
from loom.phases.match.partial_decoding import to_profile
from loom.phases.match.ranking import Ranking
from loom.phases.match.timings import MatchTimings
from loom.schemas.identity import qualified
from loom.schemas.learning.profile import NodeProfile
from loom.schemas.learning.summary import SUMMARY_KEYS, ProfileSummary

log = get_logger()

MAX_NODES = 100_000
"""Limit of node ids kept for pinned tasks; an id counts once per host."""
MAX_NAMES = 300_000
"""Limit of nodes, domain names and tool names in the index."""


def _now() -> float:
    return time.monotonic()


class HostDirectory:
    """Follows host announcements and node profiles; decides how long auctions wait, never who may bid.

    Args:
        bus: A connected bus.
        timings: Times of MATCH.
        on_rewarded: Called for each changed domain of a profile, with the qualified node, the domain_token and the
            attempt ids of its rewards.
    """

    def __init__(
        self,
        bus: Bus,
        timings: MatchTimings = MatchTimings(),
        *,
        on_rewarded: Callable[[str, str, Iterable[str]], None] = lambda *_: None,
    ) -> None:
        self._bus = bus
        self._on_rewarded = on_rewarded
        self.profiles: dict[str, NodeProfile] = {}
        """Qualified node -> learned profile, without its scores."""
        self.newcomers = Newcomers()
        self.ranking = Ranking()
        self.nodes = AnnouncedNodes()
        self.announcements_requested_at = 0.0
        """Monotonic time of the request for announcements."""
        self._node_added = asyncio.Event()
        self._spawners: set[HostKey] = set()
        """Hosts that can start nodes on request."""
        self._summaries: dict[str, ProfileSummary] = {}
        self._announcements = AnnouncementReader(bus.discards, _now)
        self._presence = HostPresence(_now, MAX_HOSTS, self._remove_nodes, unproven_every_s=timings.unproven_every_s)
        self._ownership = NodeOwnership(_now, self._presence.last_seen_at)
        self._reader: BucketReader[ProfileSummary] | None = None
        self._subscription: Subscription | None = None

    async def start(self) -> None:
        """Subscribe, request announcements from all hosts, and read the summaries of all profiles."""
        self._subscription = await self._bus.connection.subscribe_sync(
            self._bus.subjects.of("host", "*", "*"), self._on_announcement
        )
        await self._bus.connection.publish(self._bus.subjects.hosts)
        self.announcements_requested_at = _now()
        self._reader = self._bus.bucket("nodes", ProfileSummary).reader(SUMMARY_KEYS)
        while not self._reader.caught_up:
            await self._read_batch(self._reader)
        self._bus.tasks.spawn(self._follow_profiles(self._reader), name="follow profiles", essential=True)

    async def stop(self) -> None:
        """End the subscriptions."""
        if self._subscription is not None:
            self._bus.connection.unsubscribe(self._subscription)
        if self._reader is not None:
            await self._reader.stop()

    def awaited_hosts(self) -> set[HostKey]:
        """Return the hosts whose offers the next auction waits for."""
        return self._presence.awaited_hosts()

    @property
    def only_plain(self) -> bool:
        """Whether hosts are present, but none of them answers calls."""
        return self.has_hosts and not self.bidding_hosts

    @property
    def bidding_hosts(self) -> int:
        """Number of present hosts that answer calls."""
        return self._presence.bidding_hosts

    @property
    def has_hosts(self) -> bool:
        """Whether any host is present."""
        return len(self._presence) > 0

    @property
    def has_nodes(self) -> bool:
        """Whether any present host announces a node."""
        return self._ownership.size > 0

    @property
    def can_spawn(self) -> bool:
        """Whether any present host can start nodes on request."""
        return bool(self._spawners)

    @property
    def node_added(self) -> asyncio.Event:
        """An event that is set by the next announcement of a new node."""
        return self._node_added

    def host_of(self, node: str) -> HostKey | None:
        """Return the host of a qualified node; None when none of its hosts is alive."""
        return self._ownership.host_of(node)

    def is_contested(self, node: str) -> bool:
        """Return whether a second host has just announced a node whose first host may be alive."""
        return self._ownership.is_contested(node)

    def record_answers(self, offers: Sequence[HostOffer], missing: AbstractSet[HostKey]) -> None:
        """Record which hosts answered a call and which did not; a draining host does not become awaited."""
        self._presence.record_answers([offer.host for offer in offers if offer.decline != "draining"], missing)

    def record_late_answer(self, host: HostKey) -> None:
        """Record that a present host answered a call after all awaited hosts; a host that has left stays away."""
        if self._presence.last_seen_at(host) is not None:
            self._presence.record_answers([host], frozenset())

    def may_yet_bid(self, requirements: TaskRequirements, answered: AbstractSet[HostKey]) -> bool:
        """Return whether a capable node is announced on a host that may answer the next call.

        Args:
            answered: Hosts that answered this call.
        """
        return any(
            not self._presence.is_dropped(location[0])
            for location, _ in self.nodes.capable_nodes(requirements, plain=False, except_hosts=answered)
        )

    def have_plain_nodes_failed(self, requirements: TaskRequirements) -> bool:
        """Return whether capable plain nodes are announced that have failed the task."""
        return bool(requirements.excluded) and any(
            self.nodes.capable_nodes(requirements._replace(excluded=()), plain=True)
        )

    def _remove_nodes(self, host: HostKey) -> None:
        self._ownership.remove_host(host)
        self.nodes.remove_host(host)
        self._spawners.discard(host)
        self._announcements.forget_nodes(host)

    def _on_announcement(self, msg: Msg) -> None:
        announced = self._announcements.read(msg)
        if announced is None:
            return
        if announced.draining:
            self._presence.remove(announced.key)
            return
        nodes = announced.nodes
        self._presence.record_announcement(announced.key, plain=bool(nodes) and all(node.plain for node in nodes))
        if self._presence.last_seen_at(announced.key) is not None:  # None: the limit of hosts is reached
            self._record_nodes(announced)

    def _record_nodes(self, host: AnnouncedHost) -> None:
        (self._spawners.add if host.can_spawn else self._spawners.discard)(host.key)
        if not self.nodes.update(host):
            return
        nodes = tuple(qualified(host.owner, node_id) for node_id in host.node_ids)
        unknown = any(self._ownership.host_of(node) is None for node in nodes)
        if self._ownership.record_announcement(host.key, nodes):
            self._bus.connection.publish_nowait(self._bus.subjects.hosts)  # live hosts announce themselves at once
        if unknown:
            self._node_added.set()
            self._node_added = asyncio.Event()
        while self._is_full() and self._presence.remove_oldest_unproven():
            pass

    def _is_full(self) -> bool:
        return self._ownership.size > MAX_NODES or self.nodes.size > MAX_NAMES

    # -- profiles

    async def _follow_profiles(self, reader: BucketReader[ProfileSummary]) -> None:
        while True:
            await self._read_batch(reader)

    async def _read_batch(self, reader: BucketReader[ProfileSummary]) -> None:
        batch = [entry.value for entry in await reader.batch() if entry.key == entry.value.key]
        for summary in {summary.name: summary for summary in batch}.values():
            self._update_profile(summary)

    def _update_profile(self, summary: ProfileSummary) -> None:
        """Apply the changes of a node's summary."""
        node = summary.name
        before = self._summaries.get(node)
        known = before.domains if before else {}
        changed = {token: domain for token, domain in summary.domains.items() if domain != known.get(token)}
        self.profiles[node] = profile = to_profile(summary, changed, self.profiles.get(node))
        self._summaries[node] = summary
        self.newcomers.update(node, profile.domains)
        self.ranking.update(node, {token: domain.mean for token, domain in summary.domains.items()})
        for token, domain in changed.items():
            self._on_rewarded(node, token, domain.rewarded)
