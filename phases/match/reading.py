"""What MATCH reads of offers, profiles and records: what no award needs is passed over; nothing is checked twice."""

from collections.abc import Mapping
from typing import Annotated

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


class OfferReader:
    """Reads the offers to one call: one of each host, with as many bids as were asked for.

    Args:
        discards: Counts the bids that are left out.
        limit: Most bids of one offer.
    """

    def __init__(self, discards: Discards, limit: int) -> None:
        self._discards = discards
        self._limit = limit
        self._hosts: set[str] = set()

    def __call__(self, raw: bytes) -> ReadOffer:
        """Return an offer with the bids that can be read.

        Raises:
            Undecodable: Nothing of it can be read, its host has made one, or there are too many.
        """
        offer = self._read(raw)
        if offer.host_id in self._hosts:
            raise Undecodable(f"host {offer.host_id} has made an offer already")
        if len(self._hosts) >= MAX_OFFERS:
            raise Undecodable(f"{MAX_OFFERS} hosts have made an offer already")
        self._hosts.add(offer.host_id)
        return offer

    def _read(self, raw: bytes) -> ReadOffer:
        try:
            offer = decode(raw, ReadOffer, limit=MAX_OFFER_BYTES)
        except Undecodable:
            parts = decode(raw, _RawOffer, limit=MAX_OFFER_BYTES)
            bids = tuple(bid for part in parts.bids if (bid := self._bid(parts.host_id, part)) is not None)
            offer = ReadOffer(
                host_id=parts.host_id, bids=bids, decline=parts.decline, unrated=parts.unrated, near=parts.near
            )
        if len(offer.bids) > self._limit:
            reason = f"{len(offer.bids)} bids, at most {self._limit} are asked for"
            self._discards.add("bids_discarded", reason=reason, host_id=offer.host_id)
            offer = replace(offer, bids=offer.bids[: self._limit])
        return offer

    def _bid(self, host_id: str, raw: msgspec.Raw) -> ReadBid | None:
        try:
            return decode(bytes(raw), ReadBid)
        except Undecodable as error:
            self._discards.add("bid_undecodable", reason=error.message, host_id=host_id)
            return None


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
        windows: slug -> scores, of the domains that have changed.
        before: Where the others are.
    """
    domains = before.domains if before else {}
    return NodeProfile(
        node_id=read.node_id,
        last_seq=read.last_seq,
        domains={
            slug: _newest(evidence, windows[slug]) if slug in windows else domains[slug]
            for slug, evidence in read.domains.items()
        },
    )


def _newest(evidence: ReadEvidence, scores: tuple[Judged, ...]) -> DomainEvidence:
    last = tuple(Score(attempt_id=one.attempt_id, score=one.score, ended_at=one.ended_at) for one in scores[-1:])
    return DomainEvidence(scores=last, count=evidence.count, mean=evidence.mean)
