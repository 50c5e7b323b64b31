"""Who wins: claims weighed by evidence. Pure: offers and profiles in, a verdict out."""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b

from loom.schemas.auction import Bid, Offer
from loom.schemas.envelope import AWARD_BIDS, Award, Envelope, ScoredBid
from loom.schemas.learning import NodeProfile

TRUST_WEIGHT = 0.6
AVAILABILITY_WEIGHT = 0.25
TOOLS_WEIGHT = 0.15
URGENT = ("high", "critical")
"""Priorities that may have the places a node at full load has kept for them."""
SPACING_S = 0.25
"""What it takes an award to become a run on a busy machine."""
CLAIM_OBSERVATIONS = 2
"""Observations a claim counts as."""


@dataclass(frozen=True)
class Awarded:
    """There is a winner."""

    award: Award


@dataclass(frozen=True)
class AllBusy:
    """Somebody could, but has no room now."""


@dataclass(frozen=True)
class Exhausted:
    """All who could have failed this task already."""


@dataclass(frozen=True)
class Nobody:
    """No one who could do it is there."""


Verdict = Awarded | AllBusy | Exhausted | Nobody


def judge(
    envelope: Envelope,
    offers: Sequence[Offer],
    profiles: Mapping[str, NodeProfile],
    exploration: float,
    spaced: Collection[tuple[str, str]] = (),
) -> Verdict:
    """Return what follows from the offers to one call.

    Args:
        profiles: node id -> what has been learned.
        exploration: c of the bonus for the little known.
        spaced: (host id, node id) of nodes that were awarded a task a moment ago: urgent ones only.
    """
    required = frozenset(envelope.ad.required_tools)
    able = [
        (offer.host_id, bid)
        for offer in offers
        for bid in offer.bids
        if bid.node_id not in envelope.excluded and required <= set(bid.tools)
    ]
    urgent = envelope.priority in URGENT
    bids = [(host, bid) for host, bid in able if urgent or (bid.load < 1 and (host, bid.node_id) not in spaced)]
    if bids:
        return Awarded(award(envelope, bids, profiles, exploration))
    declines = {offer.decline for offer in offers}
    if able or "busy" in declines:
        return AllBusy()
    if envelope.excluded and offers and "draining" not in declines:
        return Exhausted()
    return Nobody()


def spacing_s(bid: Bid) -> float:
    """Return how long a winner that queues already is left alone: until its next bid can tell of this award.

    Without it one free place is awarded to all who call in that time, and all but one come back. Places come free
    as runs end, so it is never longer than a run.
    """
    return min(SPACING_S, bid.expected_s or SPACING_S) if bid.backlog else 0.0


def award(
    envelope: Envelope, bids: Sequence[tuple[str, Bid]], profiles: Mapping[str, NodeProfile], exploration: float
) -> Award:
    """Return the award to the best of `bids`, (host id, bid) each; there must be one."""
    known = [profiles.get(node_id) for node_id in {bid.node_id for _, bid in bids}]  # one node may be on two hosts
    total = sum(p.domains[envelope.slug].count for p in known if p and envelope.slug in p.domains)
    scored = [score(envelope, host_id, bid, profiles.get(bid.node_id), total, exploration) for host_id, bid in bids]
    ranked = sorted(scored, key=lambda bid: (-bid.score, tie_break(envelope.task_id, bid.node_id), bid.host_id))
    best = ranked[0]
    return Award(
        node_id=best.node_id,
        host_id=best.host_id,
        score=best.score,
        bids=tuple(ranked[:AWARD_BIDS]),
        evidence_seq=max((profile.last_seq for profile in known if profile), default=0),
        backlog=next(bid.backlog for host, bid in bids if (host, bid.node_id) == (best.host_id, best.node_id)),
    )


def score(
    envelope: Envelope, host_id: str, bid: Bid, profile: NodeProfile | None, total: int, exploration: float
) -> ScoredBid:
    """Return `bid` with its score: .6 trust + .25 (1 - load) + .15 tools.

    trust = (sum of rewards + 2 claim) / (count + 2) + c sqrt(ln(total + 1) / (count + 2)), after UCB1 (Auer et
    al. 2002) with the claim as a prior of two observations.

    Args:
        total: Rewards of all bidders in this domain.
    """
    evidence = profile.domains.get(envelope.slug) if profile else None
    count = evidence.count if evidence else 0
    mean = evidence.mean if evidence else None
    seen = count + CLAIM_OBSERVATIONS
    bonus = exploration * math.sqrt(math.log(total + 1) / seen)
    trust = ((mean or 0.0) * count + bid.claim * CLAIM_OBSERVATIONS) / seen + bonus
    required = set(envelope.ad.required_tools)
    tools = len(required & set(bid.tools)) / len(required) if required else 1.0
    return ScoredBid(
        node_id=bid.node_id,
        host_id=host_id,
        score=TRUST_WEIGHT * trust + AVAILABILITY_WEIGHT * (1 - bid.load) + TOOLS_WEIGHT * tools,
        claim=bid.claim,
        evidence=mean if count else None,
        count=count,
        trust=trust,
        bonus=bonus,
        load=bid.load,
        tools=tools,
    )


def tie_break(task_id: str, node_id: str) -> bytes:
    """Return what orders equals: stable for one task, spread over many."""
    return blake2b(f"{task_id}:{node_id}".encode(), digest_size=8).digest()


def best_known(profiles: Mapping[str, NodeProfile], slug: str, limit: int) -> tuple[str, ...]:
    """Return the nodes with the best evidence in a domain, best first."""
    means = {node: p.domains[slug].mean for node, p in profiles.items() if slug in p.domains}
    return tuple(sorted(means, key=lambda node: (-means[node], node))[:limit])
