"""Weighs bids by self-rating and evidence. Pure: bids and profiles in, scores out."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from functools import partial
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
from loom.schemas.auction import MAX_TRUST, Bid, ScoredBid
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


def score(envelope: Envelope, host: HostKey, bid: Bid, context: AuctionContext, total: int) -> ScoredBid:
    """Return `bid` with its score in an auction of several owners: .6 trust + .25 (1 - load) + .15 tools.

    Args:
        total: Number of rewards of all bidders in this domain.
    """
    return to_scored_bid(weigh_bid(new_auction(envelope, {host.owner}, context, total), host, bid))


def new_auction(envelope: Envelope, sharing_owners: Iterable[str], context: AuctionContext, total: int) -> "Auction":
    """Return the inputs that all bids of an auction share.

    Args:
        sharing_owners: Owners whose newcomers share their evidence.
        total: Number of rewards of all bidders in this domain.
    """
    token = envelope.domain_token
    failed = owners_with_failed_newcomers(envelope, partial(_evidence, context, token))
    return Auction(envelope, token, context, total, _shared(sharing_owners, token, context), failed)


class Auction(NamedTuple):
    """The inputs that all bids of one auction share."""

    envelope: Envelope
    domain_token: str
    context: AuctionContext
    total: int
    shared: Mapping[str, SharedEvidence]
    """Owner -> evidence shared by its newcomers."""
    failed: frozenset[str]
    """Owners with newcomers that have failed the task."""


class WeighedBid(NamedTuple):
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


def weigh_bid(auction: Auction, host: HostKey, bid: Bid) -> WeighedBid:
    """Return the bid with its score.

    Raises:
        ValueError: The award policy returned a value that is not a finite number from 0.
    """
    node = qualified(host.owner, bid.node_id)
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
    return WeighedBid(value, comes_last, name, node, host, bid, evidence, trust, tools, shared)


def to_scored_bid(weighed: WeighedBid) -> ScoredBid:
    """Return the form of a weighed bid in an award."""
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
