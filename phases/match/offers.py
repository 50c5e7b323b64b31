"""The offers to a call for bids, as far as they can be read. Of each host the first one counts."""

from typing import Any

import msgspec
from msgspec.structs import replace

from loom.bus.host_directory import HostKey
from loom.bus.logs.discards import Discards
from loom.schemas.auction import Bid, DeclineCode, Offer
from loom.schemas.base import Message, Undecodable, decode
from loom.schemas.identity import LOCAL_OWNER
from loom.schemas.tokens import Token

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


class HostOffer(Message, frozen=True, kw_only=True):
    """An offer and the host that has made it."""

    owner: Token = LOCAL_OWNER
    """Whose host it is, by the subject: its nodes are the owner's."""
    host_id: Token
    bids: tuple[Bid, ...] = ()
    decline: DeclineCode | None = None

    @property
    def host(self) -> HostKey:
        """The host and its owner."""
        return HostKey(self.owner, self.host_id)


class _RawOffer(Message, frozen=True, kw_only=True):
    """An offer whose bids are read one by one."""

    bids: tuple[msgspec.Raw, ...] = ()
    decline: DeclineCode | None = None


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
        self._hosts: set[HostKey] = set()

    def read(self, host: HostKey, raw: bytes) -> HostOffer | None:
        """Return an offer of `host` with the bids that can be read; None for one that is left out.

        That is an offer of which nothing can be read, a second one of its host, and one too many.
        """
        if host in self._hosts:
            reason = "the host has made an offer to this call already, and the first one counts"
            self._leave_out(host, "offer_repeated", reason)
            return None
        if len(self._hosts) >= MAX_OFFERS:
            self._leave_out(host, "offer_beyond_limit", f"{MAX_OFFERS} hosts have made an offer to this call")
            return None
        try:
            offer = self._decoded(host, raw)
        except Undecodable as error:
            self._leave_out(host, "offer_undecodable", error.message)
            return None
        self._hosts.add(host)
        if len(offer.bids) > self._limit:
            reason = f"{len(offer.bids)} bids, at most {self._limit} are asked for"
            self._discards.of_host(str(host), "bids", "bids_discarded", reason=reason)
            offer = replace(offer, bids=offer.bids[: self._limit])
        return HostOffer(owner=host.owner, host_id=host.host_id, bids=offer.bids, decline=offer.decline)

    def _leave_out(self, host: HostKey, event: str, reason: str) -> None:
        self._discards.of_host(str(host), "offers", event, reason=reason)

    def _decoded(self, host: HostKey, raw: bytes) -> ReadOffer:
        try:
            return decode(raw, ReadOffer, limit=MAX_OFFER_BYTES, mend=_clamped)
        except Undecodable:
            parts = decode(raw, _RawOffer, limit=MAX_OFFER_BYTES)
        bids = tuple(bid for part in parts.bids if (bid := self._bid(host, part)) is not None)
        return ReadOffer(bids=bids, decline=parts.decline)

    def _bid(self, host: HostKey, raw: msgspec.Raw) -> ReadBid | None:
        try:
            return decode(bytes(raw), ReadBid, mend=_clamped_bid)
        except Undecodable as error:
            self._discards.of_host(str(host), "bids", "bid_undecodable", reason=error.message)
            return None


def _clamped(offer: Any) -> Any:
    """The plain JSON of an offer with its ratings and loads in range."""
    bids = offer.get("bids") if isinstance(offer, dict) else None
    return {**offer, "bids": [_clamped_bid(bid) for bid in bids]} if isinstance(bids, list) else offer


def _clamped_bid(bid: Any) -> Any:
    if not isinstance(bid, dict):
        return bid
    numbers = {name: bid[name] for name in ("self_rating", "load") if type(bid.get(name)) in (int, float)}
    return {**bid, **{name: min(1.0, max(0.0, number)) for name, number in numbers.items()}}
