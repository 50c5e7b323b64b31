"""Who works here: `loom nodes`, `loom hosts`."""

import asyncio
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Any

from rich.table import Table
from rich.text import Text

from loom.bus.announcements import announced_hosts
from loom.bus.history import recent_records
from loom.phases.adapt.apoptosis import newest_own
from loom.phases.adapt.rebuild import stored_profiles
from loom.runner.cli.looking import AsLines, add_row, clock, looking, print_json, sparkline
from loom.runner.cli.render import console, table_of
from loom.runner.cli.running import prepare, run_to_end
from loom.runner.settings import Settings
from loom.schemas.auction import HostAnnouncement
from loom.schemas.config import ClusterConfig
from loom.schemas.envelope import TaskRecord
from loom.schemas.health import Health, health
from loom.schemas.learning import WINDOW, DomainEvidence, NodeProfile

CALL_S = 0.4
"""How long hosts have to say that they are here."""
CLAIMS_FROM = 200
"""Recent tasks in whose auctions claims are looked for."""
NEWEST = 10
"""Scores the trend is told by."""
STYLES: dict[Health, str] = {"healthy": "green", "warning": "yellow", "dying": "red"}
Z, PRIOR = 1.96, 4
"""Of 95 %, and the trials, half of them won, that an interval of few trials is to be widened by."""

Claims = dict[tuple[str, str], float]
"""(node id, slug) -> what the node last said of itself."""


@dataclass(frozen=True)
class Known:
    """A node, alive or remembered."""

    node_id: str
    hosts: tuple[HostAnnouncement, ...]
    """Those it is on now; none: it is not alive."""
    profile: NodeProfile | None
    claims: dict[str, float]
    """slug -> claim, from recent auctions."""

    @property
    def domains(self) -> list[str]:
        """Slugs something is known about."""
        return sorted({*self.claims, *(self.profile.domains if self.profile else ())})


def nodes(as_json: AsLines = False) -> None:
    """Show the nodes that are alive or remembered, and what is known of each."""
    run_to_end(_nodes(prepare("warning"), as_json=as_json))


def hosts(as_json: AsLines = False) -> None:
    """Show the node hosts that are alive."""
    run_to_end(_hosts(prepare("warning"), as_json=as_json))


async def _nodes(settings: Settings, *, as_json: bool) -> None:
    async with looking(settings) as bus:
        here, stored, records = await asyncio.gather(
            announced_hosts(bus, CALL_S), stored_profiles(bus), recent_records(bus, CLAIMS_FROM)
        )
    known = known_nodes(here, [entry.value for entry in stored.values()], claims_in(records))
    if as_json:
        for one in known:
            print_json(as_object(one, settings.cluster))
        return
    screen = console()
    if not known:
        screen.print("no nodes are alive or remembered: start some with `loom node FILE.py`")
        return
    screen.print(_who(known, settings.cluster))
    evidence = _what(known)
    if evidence.row_count:
        screen.print()
        screen.print(evidence)


async def _hosts(settings: Settings, *, as_json: bool) -> None:
    async with looking(settings) as bus:
        here = await announced_hosts(bus, CALL_S)
    if as_json:
        for host in here:
            print_json(host)
        return
    screen = console()
    if not here:
        screen.print("no hosts answer: start one with `loom node FILE.py`")
        return
    numbers = ("slots", "running", "queued")
    table = table_of(("host", *numbers, "state", "nodes"), right=numbers, ratios={"nodes": 1})
    table.columns[-1].no_wrap = False
    for host in here:
        state = "draining" if host.draining else "takes work"
        state += ", can start nodes" if host.templates else ""
        state += f", {host.stuck} stuck" if host.stuck else ""
        counts = (str(host.slots), str(host.running), str(host.queued))
        add_row(table, host.host_id, *counts, state, ", ".join(host.nodes))
    screen.print(table)


def claims_in(records: Iterable[TaskRecord]) -> Claims:
    """Return what nodes said of themselves in the auctions of these tasks, of which the newest come first."""
    claims: Claims = {}
    for record in records:
        award = record.envelope.award
        for bid in award.bids if award else ():
            claims.setdefault((bid.node_id, record.envelope.slug), bid.claim)
    return claims


def known_nodes(here: Sequence[HostAnnouncement], profiles: Sequence[NodeProfile], claims: Claims) -> list[Known]:
    """Return every node that is alive or has a profile, those alive first."""
    by_id = {profile.node_id: profile for profile in profiles}
    alive = {node_id for host in here for node_id in host.nodes}
    known = [
        Known(
            node_id=node_id,
            hosts=tuple(host for host in here if node_id in host.nodes),
            profile=by_id.get(node_id),
            claims={slug: claim for (node, slug), claim in claims.items() if node == node_id},
        )
        for node_id in alive | by_id.keys()
    ]
    return sorted(known, key=lambda one: (not one.hosts, one.node_id))


def as_object(one: Known, config: ClusterConfig) -> dict[str, Any]:
    """Return what is known of a node as free JSON."""
    known = one.profile.domains.items() if one.profile else ()
    return {
        "node_id": one.node_id,
        "alive": bool(one.hosts),
        "hosts": [host.host_id for host in one.hosts],
        "health": health_of(one.profile, config),
        "claims": one.claims,
        "uncertainty": {slug: uncertainty(evidence) for slug, evidence in known if evidence.count},
        "trend": {slug: trend(evidence) for slug, evidence in known if evidence.count},
        "changed_at": {slug: at for slug, evidence in known if (at := changed_at(evidence)) is not None},
        "profile": one.profile,
    }


def health_of(profile: NodeProfile | None, config: ClusterConfig) -> Health:
    """Return how a node fares; one nothing is known of is healthy."""
    return "healthy" if profile is None else health(newest_own(profile), profile.consecutive_losses, config)


def uncertainty(evidence: DomainEvidence) -> float:
    """Return half the width of the 95 % interval of the mean, as of outcomes won or lost.

    With two wins and two losses added (Agresti and Coull 1998), so that few equal outcomes do not look certain.
    """
    trials = evidence.count + PRIOR
    mean = (evidence.mean * evidence.count + PRIOR / 2) / trials
    return Z * sqrt(mean * (1 - mean) / trials)


def trend(evidence: DomainEvidence) -> float:
    """Return how much the mean of the newest ten scores is above that of the window."""
    newest = [score.score for score in evidence.scores[-NEWEST:]]
    return sum(newest) / len(newest) - evidence.mean


def changed_at(evidence: DomainEvidence) -> float | None:
    """Return when the node was found to have changed, server time: what it did before is forgotten.

    A window that has filled up since tells no more of it.
    """
    return evidence.since if evidence.since and evidence.count < WINDOW else None


def _who(known: Sequence[Known], config: ClusterConfig) -> Table:
    numbers = ("load", "tasks", "losses", "tokens")
    columns = ("node", "host", "health", *numbers, "last worked")
    table = table_of(columns, title="Nodes", right=numbers, ratios={"node": 1})
    for one in known:
        profile = one.profile or NodeProfile(node_id=one.node_id)
        host = ", ".join(host.host_id for host in one.hosts) or "not alive"
        load = " ".join(load_of(host) for host in one.hosts)
        counts = (str(profile.total_tasks), str(profile.consecutive_losses), str(profile.tokens))
        last = clock(profile.updated_at) if profile.updated_at else ""
        fares = health_of(one.profile, config)
        add_row(table, one.node_id, host, Text(fares, STYLES[fares]), load, *counts, last)
    table.caption = "load: runs of the host's slots, + queued. losses: failures in a row."
    return table


def load_of(host: HostAnnouncement) -> str:
    """Return how busy a host is: runs of slots, and what is queued besides."""
    return f"{host.running}/{host.slots}" + (f"+{host.queued}" if host.queued else "")


def _what(known: Sequence[Known]) -> Table:
    numbers = ("claim", "evidence", "count", "trend")
    changes = any(changed_at(known) for one in known if one.profile for known in one.profile.domains.values())
    columns = ("node", "domain", *numbers, "newest", *(("changed",) if changes else ()))
    table = table_of(columns, title="What they are good at", right=numbers, ratios={"node": 2, "domain": 1})
    for one in known:
        for slug in one.domains:
            evidence = one.profile.domains.get(slug, DomainEvidence()) if one.profile else DomainEvidence()
            claim = f"{one.claims[slug]:.2f}" if slug in one.claims else "-"
            add_row(table, one.node_id, slug, claim, *_shown(evidence)[: len(columns) - 3])
    table.caption = (
        f"claim: as last said in the {CLAIMS_FROM} newest tasks. evidence: mean reward over count, in 19 of 20 cases "
        f"within ±. trend: the newest {NEWEST} against the mean."
        + (" changed: what came before is forgotten." if changes else "")
    )
    return table


def _shown(evidence: DomainEvidence) -> tuple[str, str, str, str, str]:
    """Evidence, count, trend, newest scores and change of a node in a domain."""
    if not evidence.count:
        return "-", "0", "-", "", ""
    mean = f"{evidence.mean:.2f} ±{uncertainty(evidence):.2f}"
    at = changed_at(evidence)
    newest = sparkline(score.score for score in evidence.scores[-NEWEST:])
    return mean, str(evidence.count), f"{trend(evidence):+.2f}", newest, "" if at is None else clock(at)
