"""Scores bids by self-rating and evidence, and picks the winner. Pure: offers and profiles in, a result out."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b
from itertools import groupby
from operator import itemgetter
from typing import NamedTuple

import msgspec
from msgspec.structs import replace

from loom.bus.host_directory import HostKey
from loom.phases.match.award_policies import BidderStats, Policy, Trust, ucb
from loom.phases.match.newcomers import (
    Newcomers,
    SharedEvidence,
    is_newcomer,
    owners_with_failed_newcomers,
)
from loom.phases.match.offers import HostOffer
from loom.schemas.auction import AWARD_BIDS, MAX_TRUST, Award, Bid, ScoredBid
from loom.schemas.envelope import Envelope
from loom.schemas.identity import LOCAL_OWNER, qualified, split_qualified
from loom.schemas.learning.profile import DomainEvidence, NodeProfile

TRUST_WEIGHT = 0.6
AVAILABILITY_WEIGHT = 0.25
TOOLS_WEIGHT = 0.15
URGENT = ("high", "critical")
"""Priorities that may use the slots a node reserves for them."""
AWARD_TO_RUN_S = 0.25
"""Seconds from an award to the start of its run on a busy machine."""
_NO_EVIDENCE = DomainEvidence()


class AuctionContext(msgspec.Struct, frozen=True):
    """What MATCH knows in addition to the offers."""

    profiles: Mapping[str, NodeProfile] = {}
    """Qualified node -> learned profile."""
    policy: Policy = ucb
    policy_name: str = ""
    """Value of the setting."""
    exploration: float = 0.3
    """Factor c of the exploration bonus."""
    now: float = 0.0
    """Server time, seconds since the epoch."""
    half_life_s: float = math.inf
    """Seconds without a reward after which evidence counts half."""
    recent_awards: Mapping[tuple[str, str, str], int] = {}
    """(owner, host id, node id) -> number of awards too recent to show in the load of its bid."""
    pending_awards: Mapping[tuple[str, str], int] = {}
    """(qualified node, domain_token) -> number of awards without a reward."""
    newcomers: Newcomers = Newcomers()
    """Evidence of the newcomers among the profiles, by owner."""


@dataclass(frozen=True)
class Awarded:
    """The auction has a winner."""

    award: Award
    bid: Bid
    """Bid of the winner."""
    warning: str = ""
    """Warning for the submitter; may be empty."""


@dataclass(frozen=True)
class AllBusy:
    """At least one node is capable of the task, but none has a free slot."""


@dataclass(frozen=True)
class Exhausted:
    """Every capable node has already failed the task."""


@dataclass(frozen=True)
class NoOffers:
    """No capable node made an offer."""

    warning: str = ""
    """Warning for the submitter; may be empty."""


AuctionResult = Awarded | AllBusy | Exhausted | NoOffers


def decide(envelope: Envelope, offers: Sequence[HostOffer], context: AuctionContext) -> AuctionResult:
    """Return the result of the auction of one call for bids."""
    required = frozenset(envelope.ad.required_tools)
    capable = [
        (offer.host, bid)
        for offer in offers
        for bid in offer.bids
        if qualified(offer.owner, bid.node_id) not in envelope.excluded
        and (not required or required.issubset(bid.tools))
    ]
    bids = [
        (host, adjusted)
        for host, bid in capable
        if (adjusted := with_recent_awards(host, bid, envelope, context)) is not None
    ]
    if bids:
        won = award(envelope, bids, context)
        winner = (HostKey(won.owner, won.host_id), won.node_id)
        return Awarded(won, next(bid for host, bid in bids if (host, bid.node_id) == winner))
    declines = {offer.decline for offer in offers}
    if capable or "busy" in declines:
        return AllBusy()
    if envelope.excluded and offers and "draining" not in declines:
        return Exhausted()
    return NoOffers()


def with_recent_awards(host: HostKey, bid: Bid, envelope: Envelope, context: AuctionContext) -> Bid | None:
    """Return the bid with recent awards added to its load; None when no slot is left for this task.

    Otherwise concurrent auctions would award one free slot several times, and all tasks but one would come back.
    Slots reserved for urgent tasks are used by urgent tasks only.
    """
    recent_awards = context.recent_awards.get((*host, bid.node_id), 0)
    if bid.free is None or not recent_awards:
        return bid if bid.load < 1 or envelope.priority in URGENT else None
    if recent_awards < bid.free:
        return replace(bid, load=min(1.0, bid.load + recent_awards / bid.free * (1 - bid.load)))
    return replace(bid, load=1.0) if envelope.priority in URGENT else None


def award_hold_s(bid: Bid) -> float:
    """Return for how many seconds an award counts as load: at most as long as its run, which frees the slot."""
    return min(AWARD_TO_RUN_S, bid.expected_s or AWARD_TO_RUN_S)


def award(envelope: Envelope, bids: Sequence[tuple[HostKey, Bid]], context: AuctionContext) -> Award:
    """Return the award to the best bid.

    Args:
        bids: (host, bid) pairs, at least one.
    """
    nodes = [qualified(host.owner, bid.node_id) for host, bid in bids]
    profiles = [profile for node in set(nodes) if (profile := context.profiles.get(node))]  # a node may be on two hosts
    token = envelope.domain_token
    total = sum(profile.domains[token].count for profile in profiles if token in profile.domains)
    owners = {host.owner for host, _ in bids}
    # Many names are an advantage only over other owners. With a single owner, every node has its own chance.
    shared = _shared(owners, token, context) if len(owners) > 1 else {}
    auction = _Auction(
        envelope,
        token,
        context,
        total,
        shared,
        owners_with_failed_newcomers(envelope, partial(_evidence, context, token)),
    )
    weighed = [_weigh_bid(auction, node, host, bid) for node, (host, bid) in zip(nodes, bids, strict=True)]
    ranked = _best_first(envelope, weighed)
    best = ranked[0]
    return Award(
        node_id=best.bid.node_id,
        owner=best.host.owner,
        host_id=best.host.host_id,
        score=best.score,
        bids=tuple(map(_to_scored_bid, ranked)),
        evidence_seq=max((profile.last_seq for profile in profiles), default=0),
        backlog=best.bid.backlog,
        policy=context.policy_name,
    )


def score(envelope: Envelope, host: HostKey, bid: Bid, context: AuctionContext, total: int) -> ScoredBid:
    """Return `bid` with its score in an auction of several owners: .6 trust + .25 (1 - load) + .15 tools.

    Args:
        total: Number of rewards of all bidders in this domain.
    """
    token = envelope.domain_token
    shared = _shared({host.owner}, token, context)
    auction = _Auction(
        envelope,
        token,
        context,
        total,
        shared,
        owners_with_failed_newcomers(envelope, partial(_evidence, context, token)),
    )
    return _to_scored_bid(_weigh_bid(auction, qualified(host.owner, bid.node_id), host, bid))


class _Auction(NamedTuple):
    """The inputs that all bids of one auction share."""

    envelope: Envelope
    domain_token: str
    context: AuctionContext
    total: int
    shared: Mapping[str, SharedEvidence]
    """Owner -> evidence shared by its newcomers."""
    failed: frozenset[str]
    """Owners with newcomers that have failed the task."""


class _WeighedBid(NamedTuple):
    """A bid, its score and the parts of the score."""

    score: float
    comes_last: bool
    name: str
    """Key of the tie-break and the randomness: the node, or the owner of a newcomer."""
    node: str
    """Node, qualified by its owner."""
    host: HostKey
    bid: Bid
    evidence: DomainEvidence
    trust: Trust
    tools: float
    shared: SharedEvidence | None


def _evidence(context: AuctionContext, domain_token: str, node: str) -> DomainEvidence:
    profile = context.profiles.get(node)
    return (profile.domains.get(domain_token) if profile else None) or _NO_EVIDENCE


def _shared(owners: Iterable[str], domain_token: str, context: AuctionContext) -> dict[str, SharedEvidence]:
    """Return owner -> evidence shared by its newcomers, for all owners other than `local`."""
    sharing = {owner for owner in owners if owner != LOCAL_OWNER}
    if not sharing:
        return {}
    pending: Counter[str] = Counter()
    for (node, token), count in context.pending_awards.items():
        if token == domain_token:
            owner, _ = split_qualified(node)
            if owner in sharing and is_newcomer(owner, _evidence(context, token, node)):
                pending[owner] += count
    weight = partial(decay_weight, context=context)
    shared = context.newcomers.shared_evidence
    return {owner: shared(owner, domain_token, pending[owner], weight, context.now) for owner in sharing}


def _weigh_bid(auction: _Auction, node: str, host: HostKey, bid: Bid) -> _WeighedBid:
    envelope, token, context, total, groups, failed = auction
    profile, owner, name, shared = context.profiles.get(node), host.owner, node, None
    evidence = (profile.domains.get(token) if profile else None) or _NO_EVIDENCE
    newcomer = owner != LOCAL_OWNER and is_newcomer(owner, evidence)
    if newcomer and (shared := groups.get(owner)) is not None:
        name = f"{owner}."
        count, mean, pending = shared.attempts, shared.mean, shared.pending
    else:
        count, mean = evidence.count * decay_weight(evidence, context), evidence.mean if evidence.count else 0.0
        pending = context.pending_awards.get((node, token), 0)
    trust = context.policy(
        BidderStats(
            task_id=envelope.ad.task_id,
            attempt=envelope.attempt,
            node_id=bid.node_id,
            self_rating=bid.self_rating,
            mean_reward=mean,
            reward_count=count,
            domain_reward_count=total,
            pending_count=pending,
            exploration=context.exploration,
            rng_key=name,
        )
    )
    if not 0 <= trust.value < math.inf:
        name = context.policy_name
        raise ValueError(f"award policy {name} returned {trust.value} for node {node}; expected a finite number >= 0")
    required = envelope.ad.required_tools
    tools = len(set(required).intersection(bid.tools)) / len(set(required)) if required else 1.0
    value = TRUST_WEIGHT * min(trust.value, MAX_TRUST) + AVAILABILITY_WEIGHT * (1 - bid.load) + TOOLS_WEIGHT * tools
    comes_last = newcomer and owner in failed
    return _WeighedBid(value, comes_last, name, node, host, bid, evidence, trust, tools, shared)


def _best_first(envelope: Envelope, weighed: Sequence[_WeighedBid]) -> list[_WeighedBid]:
    """Return the bids to record in the award, best first; bids marked `comes_last` follow all others."""
    last = [bid for bid in weighed if bid.comes_last]
    if not last:
        return _by_score(envelope, weighed)
    others = _by_score(envelope, [bid for bid in weighed if not bid.comes_last])
    return [*others, *_by_score(envelope, last)][:AWARD_BIDS]


def _by_score(envelope: Envelope, weighed: Sequence[_WeighedBid]) -> list[_WeighedBid]:
    """Return the best bids; the tie-break is computed only for bids with equal scores."""
    ranked: list[_WeighedBid] = []
    for _, group in groupby(sorted(weighed, key=_score, reverse=True), key=_score):
        equals = list(group)
        if len(equals) > 1:
            equals.sort(key=partial(_equal_bids_key, envelope.task_id))
        ranked += equals
        if len(ranked) >= AWARD_BIDS:
            break
    return ranked[:AWARD_BIDS]


_score = itemgetter(0)


def _equal_bids_key(task_id: str, weighed: _WeighedBid) -> tuple[bytes, bytes, HostKey]:
    """Return the sort key of bids with equal scores: newcomers that share stay together."""
    own = tie_break(task_id, weighed.node)
    return own if weighed.shared is None else tie_break(task_id, weighed.name), own, weighed.host


def _to_scored_bid(weighed: _WeighedBid) -> ScoredBid:
    host, bid, evidence, trust = weighed.host, weighed.bid, weighed.evidence, weighed.trust
    return ScoredBid(
        node_id=bid.node_id,
        owner=host.owner,
        host_id=host.host_id,
        score=weighed.score,
        self_rating=bid.self_rating,
        evidence=evidence.mean if evidence.count else None,
        count=evidence.count,
        trust=min(trust.value, MAX_TRUST),
        bonus=min(trust.bonus, MAX_TRUST),
        load=bid.load,
        tools=weighed.tools,
        shared_count=weighed.shared.rewarded if weighed.shared else 0,
        comes_last=weighed.comes_last,
    )


def decay_weight(evidence: DomainEvidence, context: AuctionContext) -> float:
    """Return the weight of the evidence, 0 to 1: halved for each half-life since its last reward."""
    if not evidence.scores:
        return 1.0
    return float(0.5 ** (max(0.0, context.now - evidence.scores[-1].ended_at) / context.half_life_s))


def tie_break(task_id: str, node: str) -> bytes:
    """Return the tie-break key of a node: stable for one task, spread over many."""
    return blake2b(f"{task_id}:{node}".encode(), digest_size=8).digest()
