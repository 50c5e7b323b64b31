"""Calls for bids and the offers to them; one subscription serves all calls of a replica."""

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from secrets import token_hex

from loom.bus.bus import Bus
from loom.bus.host_directory import HostKey
from loom.bus.natsio.connection import Subscription
from loom.bus.natsio.transport.message import Msg
from loom.phases.match.calls.offers import HostOffer, OfferReader
from loom.schemas.auction import BID_LIMIT, CallForBids
from loom.schemas.base import encode

MAX_CLOSED_CALLS = 1024
"""Limit of remembered closed calls, which distinguish late offers from offers to unknown calls."""


class OpenCall:
    """A call for bids that is collecting offers.

    Args:
        awaited: Hosts whose offers complete the call; without any, the whole bid window passes.
    """

    def __init__(self, reader: OfferReader, awaited: Iterable[HostKey]) -> None:
        self.offers: list[HostOffer] = []
        self.answered: set[HostKey] = set()
        """Hosts that have sent an offer, readable or not."""
        self.missing = set(awaited)
        """Awaited hosts whose offers have not arrived."""
        self.complete = asyncio.Event()
        self._awaits = bool(self.missing)
        self._reader = reader

    def add_offer(self, host: HostKey, raw: bytes) -> None:
        """Decode and add an offer; set `complete` with the last awaited one."""
        self.answered.add(host)
        offer = self._reader.read(host, raw)
        if offer is None:
            return
        self.offers.append(offer)
        self.missing.discard(host)
        if self._awaits and not self.missing:
            self.complete.set()


class OpenCalls:
    """Publishes calls for bids and collects the offers.

    Args:
        on_late_offer: Called with the host of an offer that arrives after those of all awaited hosts.
    """

    def __init__(self, bus: Bus, on_late_offer: Callable[[HostKey], None]) -> None:
        self._bus = bus
        self._on_late_offer = on_late_offer
        self._open: dict[str, OpenCall] = {}
        self._closed: OrderedDict[str, bool] = OrderedDict()
        """Call id -> whether its bid window ran out; False: all awaited hosts had answered before."""
        self._subscription: Subscription | None = None

    async def start(self) -> None:
        """Subscribe to the offers to this replica."""
        subject = self._bus.subjects.of("offer", "*", "*", self._bus.instance, "*")
        self._subscription = await self._bus.connection.subscribe_sync(subject, self._on_offer)

    async def stop(self) -> None:
        """Unsubscribe."""
        if self._subscription is not None:
            self._bus.connection.unsubscribe(self._subscription)

    def new_call_id(self) -> tuple[str, str]:
        """Return (call id, `answer_to` token pair) for a new call."""
        call_id = token_hex(8)
        return call_id, f"{self._bus.instance}.{call_id}"

    def empty_call(self) -> OpenCall:
        """Return a call that is not published."""
        return OpenCall(OfferReader(self._bus.discards, BID_LIMIT), ())

    async def publish(
        self,
        call: CallForBids,
        awaited: Iterable[HostKey],
        *,
        window_s: float,
        hosts: Sequence[HostKey] | None = None,
    ) -> OpenCall:
        """Publish a call; return it once the awaited hosts have answered, or after `window_s` seconds.

        Args:
            awaited: Hosts to wait for; without any, the whole window passes.
            hosts: The hosts that receive the call; None: all hosts.
        """
        opened = self._open[call.call_id] = OpenCall(OfferReader(self._bus.discards, BID_LIMIT), awaited)
        timed_out = True
        try:
            await self._send(call, hosts)
            async with asyncio.timeout(window_s):
                await opened.complete.wait()
            timed_out = False
        except TimeoutError:
            pass  # the window is timed_out
        finally:
            self._close(call.call_id, timed_out=timed_out)
        return opened

    async def _send(self, call: CallForBids, hosts: Sequence[HostKey] | None) -> None:
        connection, subjects = self._bus.connection, self._bus.subjects
        if hosts is None:
            await connection.publish(subjects.of("auction", call.domain_token), call)
            return
        encoded = encode(call)
        for host in hosts:
            await connection.publish(subjects.of("call", host.owner, host.host_id), encoded)

    def _close(self, call_id: str, *, timed_out: bool) -> None:
        del self._open[call_id]
        self._closed[call_id] = timed_out
        if len(self._closed) > MAX_CLOSED_CALLS:
            self._closed.popitem(last=False)

    def _on_offer(self, msg: Msg) -> None:
        _, owner, host_id, _, call_id = msg.subject.rsplit(".", 4)
        host, call = HostKey(owner, host_id), self._open.get(call_id)
        if call is not None:
            call.add_offer(host, msg.data)
            return
        timed_out = self._closed.get(call_id)
        if timed_out is None:
            reason = "this replica of MATCH has not published such a call recently"
        elif timed_out:
            reason = "it arrived after the bid window of the call (LOOM_BID_WINDOW_MS)"
        else:
            self._on_late_offer(host)  # all awaited hosts had answered before
            return
        self._bus.discards.add_from_host(str(host), "offers", "offer_late", reason=reason)
