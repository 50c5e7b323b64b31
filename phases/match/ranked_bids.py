"""Ranks the bids of a call and decides its tasks. Pure: offers and profiles in, results out."""

from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b
from itertools import groupby
from operator import itemgetter

from loom.bus.host_directory import HostKey
from loom.phases.match.award_policies import SAME_FOR_ALL_TASKS
from loom.phases.match.calls.offers import HostOffer
from loom.phases.match.scoring import (
    AuctionContext,
    WeighedBid,
    new_auction,
    to_scored_bid,
    weigh_bid,
    with_recent_awards,
)
from loom.schemas.auction import AWARD_BIDS, Award, Bid, bids_json
from loom.schemas.base import encode
from loom.schemas.envelope import Envelope
from loom.schemas.identity import qualified

HostBid = tuple[HostKey, Bid]


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


class RankedBids:
    """The bids of one call, weighed once for all of its tasks, best first.

    The tasks have the same domain, tools, urgency and failed nodes. An award changes the load and the exploration
    bonus of its node, so that only the bids of that node are weighed again.

    Args:
        envelope: The first task.
        bids: Bids of nodes that are capable of the tasks, with their hosts.
        context: Its counts of awards may change between two awards.
    """

    def __init__(self, envelope: Envelope, bids: Sequence[HostBid], context: AuctionContext) -> None:
        self._envelope = envelope
        self._bids = bids
        self._context = context
        self._indexes: dict[str, list[int]] = {}
        """Qualified node -> indexes of its bids: a node may be on two hosts."""
        for index, (host, bid) in enumerate(bids):
            self._indexes.setdefault(qualified(host.owner, bid.node_id), []).append(index)
        profiles = [profile for node in self._indexes if (profile := context.profiles.get(node))]
        token = envelope.domain_token
        self._total = sum(profile.domains[token].count for profile in profiles if token in profile.domains)
        self._evidence_seq = max((profile.last_seq for profile in profiles), default=0)
        self._weigh_all()

    def _weigh_all(self) -> None:
        owners = {host.owner for host, _ in self._bids}
        # Many names are an advantage only over other owners. With a single owner, every node has its own chance.
        sharing = owners if len(owners) > 1 else ()
        self._auction = new_auction(self._envelope, sharing, self._context, self._total)
        self._weighed: dict[int, WeighedBid] = {}
        """Index of a bid with a free slot -> the bid with its score."""
        self._encoded: dict[int, bytes] = {}
        """Index -> the bid as an award has it."""
        self._order: list[tuple[bool, float, int]] = []
        """(comes last, -score, index) of each bid with a free slot, best first."""
        for index in range(len(self._bids)):
            self._weigh(index)
        self._order.sort()

    def _weigh(self, index: int) -> tuple[bool, float, int] | None:
        host, bid = self._bids[index]
        adjusted = with_recent_awards(host, bid, self._envelope, self._context)
        if adjusted is None:
            return None
        weighed = self._weighed[index] = weigh_bid(self._auction, host, adjusted)
        position = _position(weighed, index)
        self._order.append(position)
        return position

    def award(self, envelope: Envelope) -> Awarded | None:
        """Return the award of a task to the best bid; None while no bid has a free slot."""
        best = self._best(envelope.task_id)
        if not best:
            return None
        winner = self._weighed[best[0]]
        won = Award(
            node_id=winner.bid.node_id,
            owner=winner.host.owner,
            host_id=winner.host.host_id,
            score=winner.score,
            bids_json=bids_json(map(self._encode, best)),
            evidence_seq=self._evidence_seq,
            backlog=winner.bid.backlog,
            policy=self._context.policy_name,
        )
        return Awarded(won, winner.bid)

    def reweigh(self, node: str) -> None:
        """Weigh the bids of a node again, after an award to it."""
        indexes = [index for index in self._indexes.get(node, ()) if index in self._weighed]
        if any(self._weighed[index].shared is not None for index in indexes):
            self._weigh_all()  # the award counts for all newcomers of the owner
            return
        for index in indexes:
            position = _position(self._weighed.pop(index), index)
            del self._order[bisect_left(self._order, position)]
            self._encoded.pop(index, None)
            if self._weigh(index) is not None:
                insort(self._order, self._order.pop())

    def _best(self, task_id: str) -> list[int]:
        """Return the indexes of the best bids; the tie-break is computed only for bids with equal scores."""
        best: list[int] = []
        for _, positions in groupby(self._order, key=itemgetter(0, 1)):
            equals = [index for _, _, index in positions]
            if len(equals) > 1:
                equals.sort(key=partial(self._tie_break, task_id))
            best += equals
            if len(best) >= AWARD_BIDS:
                break
        return best[:AWARD_BIDS]

    def _tie_break(self, task_id: str, index: int) -> tuple[bytes, bytes, HostKey]:
        """Return the sort key of bids with equal scores: newcomers that share stay together."""
        weighed = self._weighed[index]
        own = tie_break(task_id, weighed.node)
        return own if weighed.shared is None else tie_break(task_id, weighed.name), own, weighed.host

    def _encode(self, index: int) -> bytes:
        encoded = self._encoded.get(index)
        if encoded is None:
            encoded = self._encoded[index] = encode(to_scored_bid(self._weighed[index]))
        return encoded


class JointAuction:
    """Decides the tasks of one call one after another, each with the awards before it.

    Args:
        offers: The offers to the call.
        context: Its counts of awards have to contain each award before the next task is decided.
    """

    def __init__(self, offers: Sequence[HostOffer], context: AuctionContext) -> None:
        self.offers = offers
        self._context = context
        self._ranked: RankedBids | None = None
        self._is_alike = context.policy in SAME_FOR_ALL_TASKS and all(
            bid.tasks is None for offer in offers for bid in offer.bids
        )
        """Whether the bids have the same weights for tasks without failed attempts."""

    def decide(self, envelope: Envelope, offers: Sequence[HostOffer]) -> AuctionResult:
        """Return the result of a task's auction.

        Args:
            offers: Those of the call, or others for this task alone.
        """
        if not self._is_alike or offers is not self.offers or envelope.failed_attempts:
            return decide(envelope, list(_for_task(envelope.task_id, offers)), self._context)
        if self._ranked is None:
            self._ranked = RankedBids(envelope, capable_bids(envelope, offers), self._context)
        return self._ranked.award(envelope) or without_winner(envelope, offers)

    def record(self, award: Award) -> None:
        """Weigh the bids of a winner again."""
        if self._ranked is not None:
            self._ranked.reweigh(award.node)


def decide(envelope: Envelope, offers: Sequence[HostOffer], context: AuctionContext) -> AuctionResult:
    """Return the result of the auction of a single task."""
    ranked = RankedBids(envelope, capable_bids(envelope, offers), context)
    return ranked.award(envelope) or without_winner(envelope, offers)


def without_winner(envelope: Envelope, offers: Sequence[HostOffer]) -> AuctionResult:
    """Return the result of an auction in which no bid has a free slot."""
    declines = {offer.decline for offer in offers}
    if "busy" in declines or capable_bids(envelope, offers):
        return AllBusy()
    if envelope.excluded and offers and "draining" not in declines:
        return Exhausted()
    return NoOffers()


def capable_bids(envelope: Envelope, offers: Sequence[HostOffer]) -> list[HostBid]:
    """Return the bids of nodes that have the tools of a task and have not failed it."""
    required = frozenset(envelope.ad.required_tools)
    return [
        (offer.host, bid)
        for offer in offers
        for bid in offer.bids
        if (not envelope.excluded or qualified(offer.owner, bid.node_id) not in envelope.excluded)
        and (not required or required.issubset(bid.tools))
    ]


def award(envelope: Envelope, bids: Sequence[HostBid], context: AuctionContext) -> Award:
    """Return the award to the best of several bids.

    Raises:
        ValueError: No bid has a free slot.
    """
    awarded = RankedBids(envelope, bids, context).award(envelope)
    if awarded is None:
        raise ValueError("an award needs a bid with a free slot")
    return awarded.award


def tie_break(task_id: str, node: str) -> bytes:
    """Return the tie-break key of a node: stable for one task, spread over many."""
    return blake2b(f"{task_id}:{node}".encode(), digest_size=8).digest()


def _position(weighed: WeighedBid, index: int) -> tuple[bool, float, int]:
    return weighed.comes_last, -weighed.score, index


def _for_task(task_id: str, offers: Sequence[HostOffer]) -> Iterator[HostOffer]:
    """Yield the offers with only the bids for this task."""
    for offer in offers:
        if all(bid.tasks is None for bid in offer.bids):
            yield offer
        else:
            yield HostOffer(
                owner=offer.owner,
                host_id=offer.host_id,
                bids=tuple(bid for bid in offer.bids if bid.is_for(task_id)),
                decline=offer.decline,
            )
