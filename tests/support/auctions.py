"""Announcements and offers of made-up hosts, and calls for bids without MATCH."""

from collections.abc import Iterable
from typing import Any

from loom.bus.bus import Bus
from loom.bus.host_directory import AnnouncedHost, HostKey
from loom.bus.natsio.transport.message import Msg
from loom.phases.match.calls.offers import HostOffer
from loom.schemas.auction import AnnouncedNode, Bid, CallForBids, Offer
from loom.schemas.base import decode
from support.wait import until


def key(host_id: str, owner: str = "local") -> HostKey:
    """Return the key of a host."""
    return HostKey(owner, host_id)


def nodes(*node_ids: str, **facts: Any) -> tuple[AnnouncedNode, ...]:
    """Return announced nodes of these ids, alike in all else."""
    return tuple(AnnouncedNode(node_id=node_id, **facts) for node_id in node_ids)


def announced(host_id: str, *node_ids: str, **facts: Any) -> AnnouncedHost:
    """Return the announcement of a host with these nodes."""
    return AnnouncedHost(**{"host_id": host_id, "nodes": nodes(*node_ids), **facts})


def offer(host_id: str, bids: Iterable[Bid] = (), **facts: Any) -> HostOffer:
    """Return an offer of a host."""
    return HostOffer(host_id=host_id, bids=tuple(bids), **facts)


async def offer_to(bus: Bus, call: CallForBids, subject: str = "") -> Offer:
    """Publish a call for bids, on `subject` or to all hosts, and return the first offer that comes."""
    offers: list[Msg] = []
    subscription = await bus.connection.subscribe_sync(
        bus.subjects.of("offer", "*", "*", *call.answer_to.split(".")), offers.append
    )
    await bus.connection.publish(subject or bus.subjects.of("auction", call.domain_token), call)
    await until(lambda: offers, what="an offer")
    bus.connection.unsubscribe(subscription)
    return decode(offers[0].data, Offer)
