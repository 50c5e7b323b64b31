"""What MATCH reads of offers, profiles and records: what no award needs is passed over; nothing is checked twice."""

from collections.abc import Mapping
from typing import Annotated, Any

import msgspec
from msgspec import Meta
from msgspec.structs import replace

from loom.bus.discards import Discards
from loom.schemas.auction import Bid, DeclineCode, Offer
from loom.schemas.envelope import ENDED
from loom.schemas.learning import MAX_DOMAINS, WINDOW, DomainEvidence, NodeProfile, Score
from loom.schemas.wire import Count, Name, Relayed, Timestamp, Token, Undecodable, Unit, decode

MAX_OFFER_BYTES = 128 * 1024
"""Sixteen bids with all the tools a task may require take less."""
MAX_OFFERS = 4096
"""Offers to one call that are read."""


class ReadBid(Bid, frozen=True, kw_only=True):
    """A bid as it came."""

    def __post_init__(self) -> None:
        """Check nothing: decoding has checked every range, and JSON has no number that is not finite."""


class ReadOffer(Offer, frozen=True, kw_only=True):
    """An offer as it came."""

    bids: tuple[ReadBid, ...] = ()

    def __post_init__(self) -> None:
        """Check nothing, as with a bid."""


class _RawOffer(Relayed, frozen=True, kw_only=True):
    """An offer whose bids are read one by one."""

    host_id: Token
    bids: tuple[msgspec.Raw, ...] = ()
    decline: DeclineCode | None = None
    unrated: bool = False
    near: Name = ""


class _Sender(Relayed, frozen=True, kw_only=True):
    """Whose offer it is."""

    host_id: Token


class OfferReader:
    """Reads the offers to one call: one of each host, with as many bids as were asked for.

    Ratings and loads out of range are taken as the nearest ones within.

    Args:
        discards: Counts the offers and the bids that are left out.
        limit: Most bids of one offer.
    """

    def __init__(self, discards: Discards, limit: int) -> None:
        self._discards = discards
        self._limit = limit
        self._hosts: set[str] = set()

    def __call__(self, raw: bytes) -> ReadOffer | None:
        """Return an offer with the bids that can be read; None for one that is left out.

        That is an offer of which nothing can be read, a second one of its host, and one too many.
        """
        try:
            offer = self._read(raw)
        except Undecodable as error:
            self._leave_out(raw, error.message)
            return None
        if offer.host_id in self._hosts:
            reason = "the host has made an offer to this call already, and the first one counts"
            self._discards.of_host(offer.host_id, "offers", "offer_repeated", reason=reason)
            return None
        if len(self._hosts) >= MAX_OFFERS:
            reason = f"{MAX_OFFERS} hosts have made an offer to this call already"
            self._discards.of_host(offer.host_id, "offers", "offer_beyond_limit", reason=reason)
            return None
        self._hosts.add(offer.host_id)
        if len(offer.bids) > self._limit:
            reason = f"{len(offer.bids)} bids, at most {self._limit} are asked for"
            self._discards.of_host(offer.host_id, "bids", "bids_discarded", reason=reason)
            offer = replace(offer, bids=offer.bids[: self._limit])
        return offer

    def _leave_out(self, raw: bytes, reason: str) -> None:
        """Count an offer that cannot be read, for its host as far as that can be."""
        try:
            host_id = decode(raw, _Sender).host_id
        except Undecodable:
            self._discards.add("offer_undecodable", reason=reason)
        else:
            self._discards.of_host(host_id, "offers", "offer_undecodable", reason=reason)

    def _read(self, raw: bytes) -> ReadOffer:
        try:
            return decode(raw, ReadOffer, limit=MAX_OFFER_BYTES, mend=_clamped)
        except Undecodable:
            parts = decode(raw, _RawOffer, limit=MAX_OFFER_BYTES)
        bids = tuple(bid for part in parts.bids if (bid := self._bid(parts.host_id, part)) is not None)
        return ReadOffer(
            host_id=parts.host_id, bids=bids, decline=parts.decline, unrated=parts.unrated, near=parts.near
        )

    def _bid(self, host_id: str, raw: msgspec.Raw) -> ReadBid | None:
        try:
            return decode(bytes(raw), ReadBid, mend=_clamped_bid)
        except Undecodable as error:
            self._discards.of_host(host_id, "bids", "bid_undecodable", reason=error.message)
            return None


def _clamped(offer: Any) -> Any:
    """The plain JSON of an offer with its ratings and loads in range."""
    bids = offer.get("bids") if isinstance(offer, dict) else None
    return {**offer, "bids": [_clamped_bid(bid) for bid in bids]} if isinstance(bids, list) else offer


def _clamped_bid(bid: Any) -> Any:
    if not isinstance(bid, dict):
        return bid
    numbers = {name: bid[name] for name in ("claim", "load") if type(bid.get(name)) in (int, float)}
    return {**bid, **{name: min(1.0, max(0.0, number)) for name, number in numbers.items()}}


class ReadRecord(msgspec.Struct, frozen=True):
    """The part of a TaskRecord that decides whether a waiting task goes on."""

    state: str

    @property
    def ended(self) -> bool:
        """Whether the state is terminal."""
        return self.state in ENDED


class ReadEvidence(msgspec.Struct, frozen=True):
    """A DomainEvidence whose window is opened only if it has changed."""

    scores: msgspec.Raw = msgspec.Raw(b"[]")
    count: Count = 0
    mean: Unit = 0.0


class ReadProfile(msgspec.Struct, frozen=True):
    """The part of a NodeProfile awards rest on."""

    node_id: Token
    last_seq: Count = 0
    domains: Annotated[dict[Name, ReadEvidence], Meta(max_length=MAX_DOMAINS)] = {}


class Judged(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """The first fields of a Score."""

    attempt_id: Name
    score: Unit
    ended_at: Timestamp


_Window = Annotated[tuple[Judged, ...], Meta(max_length=WINDOW)]


def window(evidence: ReadEvidence) -> tuple[Judged, ...]:
    """Return the scores of a domain, oldest first.

    Raises:
        Undecodable: They are none.
    """
    scores: tuple[Judged, ...] = decode(bytes(evidence.scores), _Window)
    return scores


def known(read: ReadProfile, windows: Mapping[str, tuple[Judged, ...]], before: NodeProfile | None) -> NodeProfile:
    """Return the profile with the newest score of each domain alone: awards ask for no other.

    Args:
        windows: domain_token -> scores, of the domains that have changed.
        before: Where the others are.
    """
    domains = before.domains if before else {}
    return NodeProfile(
        node_id=read.node_id,
        last_seq=read.last_seq,
        domains={
            domain_token: _newest(evidence, windows[domain_token]) if domain_token in windows else domains[domain_token]
            for domain_token, evidence in read.domains.items()
        },
    )


def _newest(evidence: ReadEvidence, scores: tuple[Judged, ...]) -> DomainEvidence:
    last = tuple(Score(attempt_id=one.attempt_id, score=one.score, ended_at=one.ended_at) for one in scores[-1:])
    return DomainEvidence(scores=last, count=evidence.count, mean=evidence.mean)
