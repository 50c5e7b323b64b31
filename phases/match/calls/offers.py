"""Decodes the offers to a call for bids. For each host, the first offer counts."""

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
"""Limit of an offer's size; sixteen bids with the most tools a task may require are smaller."""
MAX_OFFERS = 4096
"""Limit of decoded offers per call."""


class UncheckedBid(Bid, frozen=True, kw_only=True):
    """A decoded bid."""

    def __post_init__(self) -> None:
        """Skip the range checks: decoding has made them, and JSON has no infinite number."""


class UncheckedOffer(Offer, frozen=True, kw_only=True):
    """A decoded offer."""

    bids: tuple[UncheckedBid, ...] = ()


class HostOffer(Message, frozen=True, kw_only=True):
    """An offer and its host."""

    owner: Token = LOCAL_OWNER
    """Owner of the host and of its nodes, taken from the subject."""
    host_id: Token
    bids: tuple[Bid, ...] = ()
    decline: DeclineCode | None = None

    @property
    def host(self) -> HostKey:
        """The host, with its owner."""
        return HostKey(self.owner, self.host_id)


class _RawOffer(Message, frozen=True, kw_only=True):
    """An offer whose bids are decoded one by one."""

    bids: tuple[msgspec.Raw, ...] = ()
    decline: DeclineCode | None = None


class OfferReader:
    """Decodes the offers to one call: one offer per host, with at most `limit` bids.

    Self-ratings and loads out of range are clamped.

    Args:
        discards: Counts the offers and bids that are dropped.
        limit: Most bids per offer.
    """

    def __init__(self, discards: Discards, limit: int) -> None:
        self._discards = discards
        self._limit = limit
        self._hosts: set[HostKey] = set()

    def read(self, host: HostKey, raw: bytes) -> HostOffer | None:
        """Return an offer of `host` with its decodable bids; None for an offer that is dropped.

        An undecodable offer is dropped, and so are a host's second offer and all offers beyond MAX_OFFERS hosts.
        """
        if host in self._hosts:
            reason = "the host has already made an offer to this call; the first offer counts"
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
            reason = f"{len(offer.bids)} bids, at most {self._limit} are allowed"
            self._discards.add_from_host(str(host), "bids", "bids_discarded", reason=reason)
            offer = replace(offer, bids=offer.bids[: self._limit])
        return HostOffer(owner=host.owner, host_id=host.host_id, bids=offer.bids, decline=offer.decline)

    def _leave_out(self, host: HostKey, event: str, reason: str) -> None:
        self._discards.add_from_host(str(host), "offers", event, reason=reason)

    def _decoded(self, host: HostKey, raw: bytes) -> UncheckedOffer:
        try:
            return decode(raw, UncheckedOffer, limit=MAX_OFFER_BYTES, mend=_clamped)
        except Undecodable:
            raw_offer = decode(raw, _RawOffer, limit=MAX_OFFER_BYTES)
        bids = tuple(bid for raw_bid in raw_offer.bids if (bid := self._bid(host, raw_bid)) is not None)
        return UncheckedOffer(bids=bids, decline=raw_offer.decline)

    def _bid(self, host: HostKey, raw: msgspec.Raw) -> UncheckedBid | None:
        try:
            return decode(bytes(raw), UncheckedBid, mend=_clamped_bid)
        except Undecodable as error:
            self._discards.add_from_host(str(host), "bids", "bid_undecodable", reason=error.message)
            return None


def _clamped(offer: Any) -> Any:
    """Return the plain JSON of an offer with its self-ratings and loads in range."""
    bids = offer.get("bids") if isinstance(offer, dict) else None
    return {**offer, "bids": [_clamped_bid(bid) for bid in bids]} if isinstance(bids, list) else offer


def _clamped_bid(bid: Any) -> Any:
    if not isinstance(bid, dict):
        return bid
    numbers = {name: bid[name] for name in ("self_rating", "load") if type(bid.get(name)) in (int, float)}
    return {**bid, **{name: min(1.0, max(0.0, number)) for name, number in numbers.items()}}
