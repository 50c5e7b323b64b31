"""A host made of plain messages, whose offers and runs a test scripts."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, Self

from loom.bus.bus import Bus
from loom.bus.natsio.transport.message import Msg
from loom.schemas.auction import AnnouncedNode, Bid, CallForBids, HostAnnouncement, Offer
from loom.schemas.base import decode
from loom.schemas.run import RunEvent, RunKind, RunRequest, Stop
from loom.schemas.task import RunResult


@dataclass
class FakeHost:
    """A host whose behaviour the test scripts: every call and run request goes to a function."""

    bus: Bus
    host_id: str = "h1"
    node_ids: tuple[str, ...] = ("n1",)
    owner: str = "local"
    nodes: tuple[AnnouncedNode, ...] = ()
    """As announced; empty: the ids alone."""
    offer: Callable[[CallForBids], Offer | None] | None = None
    run: Callable[["FakeRun"], Awaitable[None]] | None = None
    calls: list[CallForBids] = field(default_factory=list)
    runs: list["FakeRun"] = field(default_factory=list)
    stops: list[Stop] = field(default_factory=list)
    seq: int = 0

    async def start(self) -> Self:
        """Subscribe, then announce the host."""
        subjects = self.bus.subjects
        await self.bus.connection.subscribe(subjects.of("auction", "*"), self._on_call)
        await self.bus.connection.subscribe(subjects.of("call", self.owner, self.host_id), self._on_call)
        await self.bus.connection.subscribe(subjects.of("run", self.owner, self.host_id), self._on_run)
        await self.bus.connection.subscribe(subjects.of("stop", self.owner, self.host_id), self._on_stop)
        await self.bus.connection.subscribe(subjects.hosts, self._on_hosts)
        await self.announce()
        await self.bus.requests.flush()
        return self

    async def announce(self, **facts: Any) -> None:
        """Publish an announcement of the host."""
        self.seq += 1
        nodes = self.nodes or tuple(AnnouncedNode(node_id=node) for node in self.node_ids)
        announcement = HostAnnouncement(**{"seq": self.seq, "nodes": nodes, **facts})
        await self.bus.connection.publish(self.bus.subjects.of("host", self.owner, self.host_id), announcement)

    def bids(self, *bids: Bid) -> Offer:
        """Return an offer of these bids, or of one plain bid per node."""
        return Offer(bids=bids or tuple(Bid(node_id=node) for node in self.node_ids))

    def declines(self, why: Any) -> Offer:
        """Return an offer without bids."""
        return Offer(decline=why)

    async def _on_hosts(self, _msg: Msg) -> None:
        await self.announce()

    async def _on_call(self, msg: Msg) -> None:
        call = decode(msg.data, CallForBids)
        self.calls.append(call)
        offer = self.offer(call) if self.offer else self.bids()
        if offer is not None:
            await self.answer(call, offer)

    async def answer(self, call: CallForBids, offer: Offer | bytes) -> None:
        """Publish an offer to a call."""
        subject = self.bus.subjects.of("offer", self.owner, self.host_id, *call.answer_to.split("."))
        await self.bus.connection.publish(subject, offer)

    async def _on_stop(self, msg: Msg) -> None:
        self.stops.append(decode(msg.data, Stop))

    async def _on_run(self, msg: Msg) -> None:
        run = FakeRun(self.bus, decode(msg.data, RunRequest), msg.reply)
        self.runs.append(run)
        if self.run is not None:
            self.bus.tasks.spawn(self.run(run), name="fake run")


class FakeRun:
    """One run request, and methods that publish its events."""

    def __init__(self, bus: Bus, request: RunRequest, subject: str) -> None:
        self.bus, self.request, self.subject = bus, request, subject
        self.seq = 0

    async def publish(self, kind: RunKind, **facts: Any) -> None:
        """Send the next event."""
        await self.bus.connection.publish(self.subject, RunEvent(seq=self.seq, kind=kind, **facts))
        self.seq += 1

    async def succeed(self, content: str = "done", **facts: Any) -> None:
        """Publish the events of a successful run."""
        await self.publish("accepted")
        await self.publish("started")
        await self.publish("result", result=RunResult(content=content, **facts))
