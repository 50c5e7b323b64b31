"""Who wins: claims weighed by evidence. Pure: offers and profiles in, a verdict out."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b

from msgspec.structs import replace

from loom.phases.match.trust import Known, Policy, ucb
from loom.schemas.auction import Bid, Offer
from loom.schemas.envelope import AWARD_BIDS, Award, Envelope, ScoredBid
from loom.schemas.learning import DomainEvidence, NodeProfile

TRUST_WEIGHT = 0.6
AVAILABILITY_WEIGHT = 0.25
TOOLS_WEIGHT = 0.15
URGENT = ("high", "critical")
"""Priorities that may have the places a node has kept for them."""
TAKEN_S = 0.25
"""What it takes an award to become a run on a busy machine."""


@dataclass(frozen=True)
class Book:
    """What MATCH knows besides the offers."""

    profiles: Mapping[str, NodeProfile] = field(default_factory=dict)
    """node id -> what has been learned."""
    policy: Policy = ucb
    policy_name: str = ""
    """As the setting has it."""
    exploration: float = 0.3
    """c of the bonus for the little known."""
    now: float = 0.0
    """Server time, seconds since the epoch."""
    half_life_s: float = math.inf
    """Idle time after which what is known of a node counts half."""
    taken: Mapping[tuple[str, str], int] = field(default_factory=dict)
    """(host id, node id) -> awards of a moment ago, of which its bid cannot tell yet."""
    pending: Mapping[tuple[str, str], int] = field(default_factory=dict)
    """(node id, slug) -> awards that have not been judged yet."""


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


def judge(envelope: Envelope, offers: Sequence[Offer], book: Book) -> Verdict:
    """Return what follows from the offers to one call."""
    required = frozenset(envelope.ad.required_tools)
    able = [
        (offer.host_id, bid)
        for offer in offers
        for bid in offer.bids
        if bid.node_id not in envelope.excluded and required <= set(bid.tools)
    ]
    bids = [(host, seen) for host, bid in able if (seen := as_taken(host, bid, envelope, book)) is not None]
    if bids:
        return Awarded(award(envelope, bids, book))
    declines = {offer.decline for offer in offers}
    if able or "busy" in declines:
        return AllBusy()
    if envelope.excluded and offers and "draining" not in declines:
        return Exhausted()
    return Nobody()


def as_taken(host_id: str, bid: Bid, envelope: Envelope, book: Book) -> Bid | None:
    """Return the bid with the awards of a moment ago as load; None when they leave no place for this task.

    Without that one free place is awarded to all who call at once, and all but one come back. What is kept for
    urgent tasks is theirs alone.
    """
    taken = book.taken.get((host_id, bid.node_id), 0)
    if bid.free is None or not taken:
        return bid if bid.load < 1 or envelope.priority in URGENT else None
    if taken < bid.free:
        return replace(bid, load=bid.load + taken * (1 - bid.load) / bid.free)
    return replace(bid, load=1.0) if envelope.priority in URGENT else None


def taken_s(bid: Bid) -> float:
    """Return how long an award is held against a bidder: no longer than a run, after which its place is free again."""
    return min(TAKEN_S, bid.expected_s or TAKEN_S)


def award(envelope: Envelope, bids: Sequence[tuple[str, Bid]], book: Book) -> Award:
    """Return the award to the best of `bids`, (host id, bid) each; there must be one."""
    known = [book.profiles.get(node_id) for node_id in {bid.node_id for _, bid in bids}]  # it may be on two hosts
    total = sum(p.domains[envelope.slug].count for p in known if p and envelope.slug in p.domains)
    scored = [score(envelope, host_id, bid, book, total) for host_id, bid in bids]
    ranked = sorted(scored, key=lambda bid: (-bid.score, tie_break(envelope.task_id, bid.node_id), bid.host_id))
    best = ranked[0]
    return Award(
        node_id=best.node_id,
        host_id=best.host_id,
        score=best.score,
        bids=tuple(ranked[:AWARD_BIDS]),
        evidence_seq=max((profile.last_seq for profile in known if profile), default=0),
        backlog=next(bid.backlog for host, bid in bids if (host, bid.node_id) == (best.host_id, best.node_id)),
        policy=book.policy_name,
    )


def score(envelope: Envelope, host_id: str, bid: Bid, book: Book, total: int) -> ScoredBid:
    """Return `bid` with its score: .6 trust + .25 (1 - load) + .15 tools.

    Args:
        total: Rewards of all bidders in this domain.
    """
    profile = book.profiles.get(bid.node_id)
    evidence = (profile.domains.get(envelope.slug) if profile else None) or DomainEvidence()
    count = evidence.count * remembered(evidence, book)
    trust = book.policy(
        Known(
            task_id=envelope.task_id,
            attempt=envelope.attempt,
            node_id=bid.node_id,
            claim=bid.claim,
            mean=evidence.mean if evidence.count else 0.0,
            count=count,
            total=total,
            pending=book.pending.get((bid.node_id, envelope.slug), 0),
            exploration=book.exploration,
        )
    )
    required = set(envelope.ad.required_tools)
    tools = len(required & set(bid.tools)) / len(required) if required else 1.0
    return ScoredBid(
        node_id=bid.node_id,
        host_id=host_id,
        score=TRUST_WEIGHT * trust.value + AVAILABILITY_WEIGHT * (1 - bid.load) + TOOLS_WEIGHT * tools,
        claim=bid.claim,
        evidence=evidence.mean if evidence.count else None,
        count=evidence.count,
        trust=trust.value,
        bonus=trust.bonus,
        load=bid.load,
        tools=tools,
    )


def remembered(evidence: DomainEvidence, book: Book) -> float:
    """Return how much of the evidence still counts: all of it, and half as much after each half-life without news."""
    if not evidence.scores:
        return 1.0
    return float(0.5 ** (max(0.0, book.now - evidence.scores[-1].ended_at) / book.half_life_s))


def tie_break(task_id: str, node_id: str) -> bytes:
    """Return what orders equals: stable for one task, spread over many."""
    return blake2b(f"{task_id}:{node_id}".encode(), digest_size=8).digest()


def best_known(profiles: Mapping[str, NodeProfile], slug: str, limit: int) -> tuple[str, ...]:
    """Return the nodes with the best evidence in a domain, best first."""
    means = {node: p.domains[slug].mean for node, p in profiles.items() if slug in p.domains}
    return tuple(sorted(means, key=lambda node: (-means[node], node))[:limit])
