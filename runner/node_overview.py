"""Overviews of nodes and their domains, from announcements, profiles and recent auctions."""

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from loom.bus.bus import Bus
from loom.bus.host_directory import AnnouncedHost, announced_hosts
from loom.bus.queries import recent_records
from loom.phases.adapt.rebuild import stored_profiles
from loom.phases.adapt.retirement_policy import newest_own
from loom.phases.shared.node_health import Standing, standing
from loom.schemas.config import ClusterConfig
from loom.schemas.identity import qualified
from loom.schemas.learning.profile import DomainEvidence, NodeProfile
from loom.schemas.record import TaskRecord
from loom.schemas.tokens import domain_token

CALL_S = 1.2
"""Seconds for hosts to announce themselves; a host that has just announced itself four times waits up to 1.1 s."""
RECENT_TASKS = 200
"""Newest tasks in whose auctions self-ratings and the wording of domains are looked for."""


@dataclass(frozen=True)
class Auctioned:
    """Self-ratings and domains of recent auctions."""

    self_ratings: Mapping[tuple[str, str], float]
    """(node, qualified by its owner, token of a domain) -> the rating the node last gave itself."""
    domains: Mapping[str, str]
    """Token of a domain -> the domain as worded."""


@dataclass(frozen=True)
class DomainOverview:
    """What is known of a node in one domain."""

    domain: str
    """As worded, where a recent task has it."""
    self_rating: float | None
    """0 to 1, as last given in an auction; None: in no recent one."""
    evidence: DomainEvidence


@dataclass(frozen=True)
class NodeOverview:
    """A node, alive or remembered, and what is known of it."""

    node_id: str
    owner: str
    hosts: tuple[AnnouncedHost, ...]
    """Those it is on now; none: it is not alive."""
    profile: NodeProfile | None
    """None: it has earned no reward yet."""
    standing: Standing
    domains: Mapping[str, DomainOverview]
    """Token of a domain -> what is known of the node there."""

    @property
    def name(self) -> str:
        """The node as people write it."""
        return qualified(self.owner, self.node_id)

    @property
    def alive(self) -> bool:
        """Whether a host has announced it just now."""
        return bool(self.hosts)


async def node_overviews(bus: Bus, config: ClusterConfig) -> list[NodeOverview]:
    """Return every node that is alive or has a profile, those alive first; takes about a second.

    Args:
        config: Its limits decide which node is failing.

    Raises:
        BusUnavailable: The server does not answer.
        Refused: No phase has ever run here.
    """
    here, stored, recent = await asyncio.gather(
        announced_hosts(bus, CALL_S), stored_profiles(bus), recent_records(bus, RECENT_TASKS)
    )
    return overviews(here, [entry.value for entry in stored.values()], auctioned(recent), config)


def auctioned(records: Iterable[TaskRecord]) -> Auctioned:
    """Return what the auctions of these tasks show, of which the newest come first."""
    ratings: dict[tuple[str, str], float] = {}
    domains: dict[str, str] = {}
    for record in records:
        award = record.envelope.award
        domains.setdefault(record.envelope.domain_token, record.envelope.domain)
        for bid in award.bids if award else ():
            ratings.setdefault((bid.node, record.envelope.domain_token), bid.self_rating)
    return Auctioned(ratings, domains)


def overviews(
    here: Sequence[AnnouncedHost], profiles: Iterable[NodeProfile], seen: Auctioned, config: ClusterConfig
) -> list[NodeOverview]:
    """Return every node that is alive or has a profile, those alive first."""
    known = {(profile.owner, profile.node_id): profile for profile in profiles}
    hosts: dict[tuple[str, str], list[AnnouncedHost]] = {}
    for host in here:
        for node_id in dict.fromkeys(host.node_ids):
            hosts.setdefault((host.owner, node_id), []).append(host)
    nodes = [
        NodeOverview(
            node_id=node_id,
            owner=owner,
            hosts=tuple(hosts.get((owner, node_id), ())),
            profile=known.get((owner, node_id)),
            standing=standing_of(known.get((owner, node_id)), config),
            domains=_domains(qualified(owner, node_id), known.get((owner, node_id)), seen),
        )
        for owner, node_id in hosts.keys() | known.keys()
    ]
    return sorted(nodes, key=lambda node: (not node.hosts, node.name))


def standing_of(profile: NodeProfile | None, config: ClusterConfig) -> Standing:
    """Return what is known of a node by its profile."""
    return "new" if profile is None else standing(newest_own(profile), profile.consecutive_losses, config)


def _domains(node: str, profile: NodeProfile | None, seen: Auctioned) -> dict[str, DomainOverview]:
    evidence = profile.domains if profile else {}
    rated = {token: rating for (rated_node, token), rating in seen.self_ratings.items() if rated_node == node}
    return {
        token: DomainOverview(
            domain=worded if domain_token(worded := seen.domains.get(token, token)) == token else token,
            self_rating=rated.get(token),
            evidence=evidence.get(token, DomainEvidence()),
        )
        for token in sorted({*rated, *evidence})
    }
