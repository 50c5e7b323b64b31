"""Who wins: claims weighed by evidence. Pure: offers and profiles in, a verdict out."""

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
from loom.phases.match.newcomers import Newcomers, Shared, failing_owners, is_newcomer, shared_by
from loom.phases.match.offers import HostOffer
from loom.schemas.auction import AWARD_BIDS, MAX_TRUST, Award, Bid, ScoredBid
from loom.schemas.envelope import Envelope
from loom.schemas.identity import LOCAL_OWNER, qualified, split_qualified
from loom.schemas.learning import DomainEvidence, NodeProfile

TRUST_WEIGHT = 0.6
AVAILABILITY_WEIGHT = 0.25
TOOLS_WEIGHT = 0.15
URGENT = ("high", "critical")
"""Priorities that may have the places a node has kept for them."""
TAKEN_S = 0.25
"""What it takes an award to become a run on a busy machine."""
_NONE = DomainEvidence()


class AuctionContext(msgspec.Struct, frozen=True):
    """What MATCH knows besides the offers."""

    profiles: Mapping[str, NodeProfile] = {}
    """Node, qualified by its owner -> what has been learned."""
    policy: Policy = ucb
    policy_name: str = ""
    """As the setting has it."""
    exploration: float = 0.3
    """c of the bonus for the little known."""
    now: float = 0.0
    """Server time, seconds since the epoch."""
    half_life_s: float = math.inf
    """Idle time after which what is known of a node counts half."""
    taken: Mapping[tuple[str, str, str], int] = {}
    """(owner, host id, node id) -> awards of a moment ago, of which its bid cannot tell yet."""
    pending: Mapping[tuple[str, str], int] = {}
    """(node, qualified by its owner, domain_token) -> awards that have not been judged yet."""
    newcomers: Newcomers = Newcomers()
    """Those of the profiles that share, by their owners."""


@dataclass(frozen=True)
class Awarded:
    """There is a winner."""

    award: Award
    bid: Bid
    """The winner's."""
    warning: str = ""
    """For the submitter; empty: there is none."""


@dataclass(frozen=True)
class AllBusy:
    """Somebody could, but has no room now."""


@dataclass(frozen=True)
class Exhausted:
    """All who could have failed this task already."""


@dataclass(frozen=True)
class Nobody:
    """No one who could do it is there."""

    warning: str = ""
    """For the submitter; empty: there is none."""


Verdict = Awarded | AllBusy | Exhausted | Nobody


def decide(envelope: Envelope, offers: Sequence[HostOffer], book: AuctionContext) -> Verdict:
    """Return what follows from the offers to one call."""
    required = frozenset(envelope.ad.required_tools)
    able = [
        (offer.host, bid)
        for offer in offers
        for bid in offer.bids
        if qualified(offer.owner, bid.node_id) not in envelope.excluded
        and (not required or required.issubset(bid.tools))
    ]
    bids = [(host, seen) for host, bid in able if (seen := as_taken(host, bid, envelope, book)) is not None]
    if bids:
        won = award(envelope, bids, book)
        winner = (HostKey(won.owner, won.host_id), won.node_id)
        return Awarded(won, next(bid for host, bid in bids if (host, bid.node_id) == winner))
    declines = {offer.decline for offer in offers}
    if able or "busy" in declines:
        return AllBusy()
    if envelope.excluded and offers and "draining" not in declines:
        return Exhausted()
    return Nobody()


def as_taken(host: HostKey, bid: Bid, envelope: Envelope, book: AuctionContext) -> Bid | None:
    """Return the bid with the awards of a moment ago as load; None when they leave no place for this task.

    Without that one free place is awarded to all who call at once, and all but one come back. What is kept for
    urgent tasks is theirs alone.
    """
    taken = book.taken.get((*host, bid.node_id), 0)
    if bid.free is None or not taken:
        return bid if bid.load < 1 or envelope.priority in URGENT else None
    if taken < bid.free:
        return replace(bid, load=min(1.0, bid.load + taken / bid.free * (1 - bid.load)))
    return replace(bid, load=1.0) if envelope.priority in URGENT else None


def taken_s(bid: Bid) -> float:
    """Return how long an award is held against a bidder: no longer than a run, after which its place is free again."""
    return min(TAKEN_S, bid.expected_s or TAKEN_S)


def award(envelope: Envelope, bids: Sequence[tuple[HostKey, Bid]], book: AuctionContext) -> Award:
    """Return the award to the best of `bids`, (host, bid) each; there must be one."""
    nodes = [qualified(host.owner, bid.node_id) for host, bid in bids]
    known = [profile for node in set(nodes) if (profile := book.profiles.get(node))]  # one may be on two hosts
    token = envelope.domain_token
    total = sum(profile.domains[token].count for profile in known if token in profile.domains)
    owners = {host.owner for host, _ in bids}
    # Names are an advantage over other owners only: among the nodes of a single one each has its own chance.
    shared = _shared(owners, token, book) if len(owners) > 1 else {}
    auction = _Auction(envelope, token, book, total, shared, failing_owners(envelope, partial(_evidence, book, token)))
    weighed = [_weigh(auction, node, host, bid) for node, (host, bid) in zip(nodes, bids, strict=True)]
    ranked = _best_first(envelope, weighed)
    best = ranked[0]
    return Award(
        node_id=best.bid.node_id,
        owner=best.host.owner,
        host_id=best.host.host_id,
        score=best.score,
        bids=tuple(map(_to_scored_bid, ranked)),
        evidence_seq=max((profile.last_seq for profile in known), default=0),
        backlog=best.bid.backlog,
        policy=book.policy_name,
    )


def score(envelope: Envelope, host: HostKey, bid: Bid, book: AuctionContext, total: int) -> ScoredBid:
    """Return `bid` with its score against those of other owners: .6 trust + .25 (1 - load) + .15 tools.

    Args:
        total: Rewards of all bidders in this domain.
    """
    token = envelope.domain_token
    shared = _shared({host.owner}, token, book)
    auction = _Auction(envelope, token, book, total, shared, failing_owners(envelope, partial(_evidence, book, token)))
    return _to_scored_bid(_weigh(auction, qualified(host.owner, bid.node_id), host, bid))


class _Auction(NamedTuple):
    """What all bids of an auction are weighed by."""

    envelope: Envelope
    domain_token: str
    book: AuctionContext
    total: int
    shared: Mapping[str, Shared]
    """Owner -> what its newcomers share."""
    failed: frozenset[str]
    """Owners of newcomers that have failed the task."""


class _Weighed(NamedTuple):
    """A bid and what its score is made of."""

    score: float
    comes_last: bool
    name: str
    """What distinguishes equal bids: the node, or the owner whose newcomer it is."""
    node: str
    """Qualified by its owner."""
    host: HostKey
    bid: Bid
    evidence: DomainEvidence
    trust: Trust
    tools: float
    shared: Shared | None


def _evidence(book: AuctionContext, domain_token: str, node: str) -> DomainEvidence:
    profile = book.profiles.get(node)
    return (profile.domains.get(domain_token) if profile else None) or _NONE


def _shared(owners: Iterable[str], domain_token: str, book: AuctionContext) -> dict[str, Shared]:
    """Return owner -> what its newcomers share, of the owners other than `local`."""
    groups = {owner: book.newcomers.of(owner, domain_token) for owner in owners if owner != LOCAL_OWNER}
    if not groups:
        return {}
    pending: Counter[str] = Counter()
    for (node, token), count in book.pending.items():
        if token == domain_token:
            owner, _ = split_qualified(node)
            if owner in groups and is_newcomer(owner, _evidence(book, token, node)):
                pending[owner] += count
    weight = partial(remembered, book=book)
    return {owner: shared_by(known, pending[owner], weight) for owner, known in groups.items()}


def _weigh(auction: _Auction, node: str, host: HostKey, bid: Bid) -> _Weighed:
    envelope, token, book, total, groups, failed = auction
    profile, owner, name, shared = book.profiles.get(node), host.owner, node, None
    evidence = (profile.domains.get(token) if profile else None) or _NONE
    newcomer = owner != LOCAL_OWNER and is_newcomer(owner, evidence)
    if newcomer and (shared := groups.get(owner)) is not None:
        name = f"{owner}."
        count, mean, pending = shared.attempts, shared.mean, shared.pending
    else:
        count, mean = evidence.count * remembered(evidence, book), evidence.mean if evidence.count else 0.0
        pending = book.pending.get((node, token), 0)
    trust = book.policy(
        BidderStats(
            task_id=envelope.ad.task_id,
            attempt=envelope.attempt,
            node_id=bid.node_id,
            claim=bid.self_rating,
            mean=mean,
            count=count,
            total=total,
            pending=pending,
            exploration=book.exploration,
            name=name,
        )
    )
    if not 0 <= trust.value < math.inf:
        raise ValueError(f"policy {book.policy_name} trusts {node} with {trust.value}: no finite number from 0")
    required = envelope.ad.required_tools
    tools = len(set(required).intersection(bid.tools)) / len(set(required)) if required else 1.0
    value = TRUST_WEIGHT * min(trust.value, MAX_TRUST) + AVAILABILITY_WEIGHT * (1 - bid.load) + TOOLS_WEIGHT * tools
    comes_last = newcomer and owner in failed
    return _Weighed(value, comes_last, name, node, host, bid, evidence, trust, tools, shared)


def _best_first(envelope: Envelope, weighed: Sequence[_Weighed]) -> list[_Weighed]:
    """The bids an award remembers, in order; those that come last are behind all others."""
    last = [one for one in weighed if one.comes_last]
    if not last:
        return _by_score(envelope, weighed)
    others = _by_score(envelope, [one for one in weighed if not one.comes_last])
    return [*others, *_by_score(envelope, last)][:AWARD_BIDS]


def _by_score(envelope: Envelope, weighed: Sequence[_Weighed]) -> list[_Weighed]:
    """The best bids; of equals the tie-break decides, which only they need."""
    ranked: list[_Weighed] = []
    for _, group in groupby(sorted(weighed, key=_score, reverse=True), key=_score):
        equals = list(group)
        if len(equals) > 1:
            equals.sort(key=partial(_among_equals, envelope.task_id))
        ranked += equals
        if len(ranked) >= AWARD_BIDS:
            break
    return ranked[:AWARD_BIDS]


_score = itemgetter(0)


def _among_equals(task_id: str, weighed: _Weighed) -> tuple[bytes, bytes, HostKey]:
    """What orders equals: newcomers who share have one place among the others, and each its own in that."""
    own = tie_break(task_id, weighed.node)
    return own if weighed.shared is None else tie_break(task_id, weighed.name), own, weighed.host


def _to_scored_bid(weighed: _Weighed) -> ScoredBid:
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
        shared_count=weighed.shared.judged if weighed.shared else 0,
        comes_last=weighed.comes_last,
    )


def remembered(evidence: DomainEvidence, book: AuctionContext) -> float:
    """Return how much of the evidence still counts: all of it, and half as much after each half-life without news."""
    if not evidence.scores:
        return 1.0
    return float(0.5 ** (max(0.0, book.now - evidence.scores[-1].ended_at) / book.half_life_s))


def tie_break(task_id: str, node: str) -> bytes:
    """Return what orders equals: stable for one task, spread over many."""
    return blake2b(f"{task_id}:{node}".encode(), digest_size=8).digest()
