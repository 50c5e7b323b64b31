"""Calls for bids and the offers to them, by one subscription for all calls of a replica."""

import asyncio
from collections import OrderedDict
from collections.abc import Iterable
from secrets import token_hex

from loom.bus.bus import Bus
from loom.bus.host_directory import HostKey
from loom.bus.natsio.connection import Subscription
from loom.bus.natsio.transport.message import Msg
from loom.phases.match.offers import HostOffer, OfferReader
from loom.schemas.auction import BID_LIMIT, CallForBids

REMEMBERED = 1024
"""Closed calls that are remembered, so that late offers differ from offers to calls that were never made."""


class OpenCall:
    """A call that offers are awaited for.

    Args:
        awaited: Hosts whose offers end the wait once all of them have come; none: the whole window is waited.
    """

    def __init__(self, reader: OfferReader, awaited: Iterable[HostKey]) -> None:
        self.offers: list[HostOffer] = []
        self.answered: set[HostKey] = set()
        """Hosts that have sent an offer, readable or not."""
        self.missing = set(awaited)
        """Hosts whose offers have not come."""
        self.complete = asyncio.Event()
        self._awaits = bool(self.missing)
        self._reader = reader

    def take(self, host: HostKey, raw: bytes) -> None:
        """Read an offer."""
        self.answered.add(host)
        offer = self._reader.read(host, raw)
        if offer is None:
            return
        self.offers.append(offer)
        self.missing.discard(host)
        if self._awaits and not self.missing:
            self.complete.set()


class OpenCalls:
    """Publishes calls for bids and collects the offers."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self._open: dict[str, OpenCall] = {}
        self._closed: OrderedDict[str, bool] = OrderedDict()
        """Call -> whether its window was over; else all awaited hosts had answered before."""
        self._subscription: Subscription | None = None

    async def start(self) -> None:
        """Subscribe to the offers for this replica."""
        subject = self._bus.subjects.of("offer", "*", "*", self._bus.instance, "*")
        self._subscription = await self._bus.connection.subscribe_sync(subject, self._on_offer)

    async def stop(self) -> None:
        """Unsubscribe."""
        if self._subscription is not None:
            self._bus.connection.unsubscribe(self._subscription)

    def new_call(self) -> tuple[str, str]:
        """Return the id of a new call and its `answer_to`."""
        call_id = token_hex(8)
        return call_id, f"{self._bus.instance}.{call_id}"

    def unanswered(self) -> OpenCall:
        """Return a call that was not published."""
        return OpenCall(OfferReader(self._bus.discards, BID_LIMIT), ())

    async def publish(self, call: CallForBids, awaited: Iterable[HostKey], *, window_s: float) -> OpenCall:
        """Publish a call to all hosts; return once those awaited have answered, at the latest after `window_s`.

        Args:
            awaited: Hosts to wait for; none: the whole window is waited.
        """
        opened = self._open[call.call_id] = OpenCall(OfferReader(self._bus.discards, BID_LIMIT), awaited)
        over = True
        try:
            await self._bus.connection.publish(self._bus.subjects.of("auction", call.domain_token), call)
            async with asyncio.timeout(window_s):
                await opened.complete.wait()
            over = False
        except TimeoutError:
            pass  # the window is over
        finally:
            self._close(call.call_id, over=over)
        return opened

    def _close(self, call_id: str, *, over: bool) -> None:
        del self._open[call_id]
        self._closed[call_id] = over
        if len(self._closed) > REMEMBERED:
            self._closed.popitem(last=False)

    def _on_offer(self, msg: Msg) -> None:
        _, owner, host_id, _, call_id = msg.subject.rsplit(".", 4)
        host, call = HostKey(owner, host_id), self._open.get(call_id)
        if call is not None:
            call.take(host, msg.data)
            return
        over = self._closed.get(call_id)
        if over is None:
            reason = "this replica of MATCH has made no such call lately"
        elif over:
            reason = "it came after the time in which offers to the call are read (LOOM_BID_WINDOW_MS)"
        else:
            return  # the host was not waited for, and all that were had answered
        self._bus.discards.of_host(str(host), "offers", "offer_late", reason=reason)
