"""The node host: bids for its nodes, executes the runs they win, and announces itself.

Receives   auction.*, hosts, lifecycle.adapt.learned.<owner>.*, and {call,run,stop}.<owner>.<host>
Publishes  {offer,event}.<owner>.<host>.…, host.<owner>.<host> every 3 s, lifecycle.<owner>.{joined,left}.<owner>.<node>
"""

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from loom.agents.host import run_table
from loom.agents.host.announcement import node_fields
from loom.agents.host.announcer import AnnouncePace, Announcer
from loom.agents.host.bidding import Bidder
from loom.agents.host.node_partition import NodePartition
from loom.agents.host.publishing import log_failures, repeat_every
from loom.agents.host.run_executor import RunExecutor
from loom.agents.host.run_table import RunTable
from loom.agents.host.runs import Run, publish_events, stale_reason
from loom.agents.host.slots import Node, NodeIndex, RunQueues
from loom.agents.host.timings import HostTimings
from loom.agents.host.watchdog import Watchdog
from loom.agents.user_code import error_fields
from loom.bus.bus import Bus
from loom.bus.logs.logger import get_logger
from loom.bus.natsio.connection import Subscription
from loom.bus.natsio.transport.message import Msg
from loom.schemas.auction import CallForBids, HostAnnouncement, Offer
from loom.schemas.base import Undecodable, decode, encode, new_id
from loom.schemas.identity import ADAPT
from loom.schemas.learning.lifecycle import Lifecycle
from loom.schemas.run import RunEvent, RunRequest, Stop

log = get_logger()

SLOTS = 4
BACKLOG = 16
DRAIN_ANNOUNCEMENTS = 3
"""Announcements of a drain: a single one may be lost, and then the host would still get runs."""
FOREIGN_REPLY = "its reply subject is not an event subject of this host"


class Spawner(Protocol):
    """Starts and retires nodes of a host on request."""

    @property
    def is_running(self) -> bool:
        """Whether requests are accepted."""
        ...

    async def start(self, host: "NodeHost") -> None:
        """Accept requests for nodes of a started host."""
        ...

    async def stop(self) -> None:
        """Accept no more requests; safe to call twice or before `start`."""
        ...


class NodeHost:
    """Hosts nodes on the bus; nodes beyond 128 get further hosts in the same process.

    Args:
        nodes: Returns the current nodes; read at every call, so that nodes may join and leave.
        slots: Runs that each node works on at once. Runs share no conversation.
        backlog: Runs that each node queues in addition.
        spawner: Started and stopped with the host; None: nodes are not started on request.
        timings: Intervals and limits.
    """

    def __init__(
        self,
        bus: Bus,
        nodes: Callable[[], Sequence[Node]],
        *,
        slots: int = SLOTS,
        backlog: int = BACKLOG,
        spawner: Spawner | None = None,
        timings: HostTimings = HostTimings(),
    ) -> None:
        self.host_id = new_id()[:12]
        self.bus = bus
        self._timings = timings
        self._event_prefix = bus.subjects.of("event", bus.identity.owner, self.host_id, "*", "*").removesuffix("*.*")
        self._spawner = spawner
        self._partition = NodePartition(nodes)
        self._nodes = self._partition.own
        self._find_node = NodeIndex(self._nodes).get
        self.further: NodeHost | None = None
        """The host of the nodes that do not fit into this one."""
        self._queues = RunQueues(slots, backlog)
        self._runs = RunTable()
        self._bidder = Bidder(self._nodes, self._queues, bus.identity.owner)
        self._pace = AnnouncePace(
            lambda: bus.tasks.spawn(log_failures(self._announce), name="announce on request"), timings
        )
        self._executor = RunExecutor(
            bus,
            self._find_node,
            self._queues,
            self._runs,
            self._announce_free_place,
            cancel_grace_s=timings.cancel_grace_s,
        )
        self._announcer = Announcer(bus, self.host_id, self._working_nodes, self._announcement)
        self._watchdog: Watchdog | None = None
        self._draining = False
        self._subscriptions: list[Subscription] = []
        self._tickers: list[asyncio.Task[None]] = []

    # -- start and stop

    async def start(self) -> None:
        """Subscribe, announce the nodes and start the spawner; returns when the server has processed all of it."""
        subjects, owner = self.bus.subjects, self.bus.identity.owner
        for subject, handler in (
            (subjects.of("run", owner, self.host_id), self._on_run),
            (subjects.of("stop", owner, self.host_id), self._on_stop),
            (subjects.of("lifecycle", ADAPT, "learned", owner, "*"), self._on_learned),
            (subjects.of("auction", "*"), self._on_call),
            (subjects.of("call", owner, self.host_id), self._on_call),
            (subjects.hosts, lambda _msg: self._pace.request()),
        ):
            self._subscriptions.append(await self.bus.connection.subscribe_sync(subject, handler))
        await self.announce()
        await self.bus.requests.flush()
        timings = self._timings
        self._watchdog = Watchdog(self.bus, self._runs.active, self._announcer, timings)
        self._watchdog.start()
        self._tickers = [
            self.bus.tasks.spawn(repeat_every(timings.announce_s, self._announce), name="announce", essential=True),
            self.bus.tasks.spawn(
                repeat_every(timings.heartbeat_s, self._executor.heartbeat), name="heartbeats", essential=True
            ),
        ]
        if self._spawner is not None:
            await self._spawner.start(self)

    async def drain(self, timeout_s: float) -> None:
        """Stop bidding, finish runs for at most `timeout_s`, and give back the other runs.

        Safe to call twice or before `start`. A run that does not end within a second of its cancel is abandoned.
        """
        if self._spawner is not None:
            await self._spawner.stop()
        await asyncio.gather(*(host.drain_own(timeout_s) for host in self.hosts()))

    async def drain_own(self, timeout_s: float) -> None:
        """Drain this host without the further ones."""
        if self._draining or not self._subscriptions:
            return
        self._draining = True
        for _ in range(DRAIN_ANNOUNCEMENTS):
            await log_failures(self._announce)
        self._executor.stop([run for run in self._runs.active() if run.work is None], run_table.STOPPING)
        try:
            await self._wait_until_idle(timeout_s)
        finally:
            self._executor.stop(self._runs.active(), run_table.STOPPING)
        for ticker in self._tickers:
            ticker.cancel()
        for subscription in self._subscriptions:
            self.bus.connection.unsubscribe(subscription)
        self._pace.stop()
        await self._announcer.leave()
        await self._executor.wait_for_cancelled()
        self.abandon()
        await self._executor.close_agents()

    async def _wait_until_idle(self, timeout_s: float) -> None:
        """Wait until no run is active; a stopped run is not active, even if its code still works."""
        end_at = time.monotonic() + timeout_s
        while (left_s := end_at - time.monotonic()) > 0:
            working = [run.work for run in self._runs.active() if run.work is not None]
            if not working:
                return
            wait_s = min(left_s, self._timings.heartbeat_s)
            await asyncio.wait(working, timeout=wait_s, return_when=asyncio.FIRST_COMPLETED)

    def abort(self) -> None:
        """Stop from synchronous code; runs that do not end within a second of their cancel are abandoned."""
        if self.further is not None:
            self.further.abort()
        if self._watchdog is not None:
            self._watchdog.stop()
        self._executor.abort(self.abandon)

    def abandon(self) -> None:
        """Abandon all runs that still work, and stop the watchdog."""
        self._executor.abandon()
        if self._watchdog is not None:
            self._watchdog.stop()

    def give_back(self) -> None:
        """Publish that all active runs are given back; from another thread, as the event loop may be blocked."""
        if self._watchdog is not None:
            self._watchdog.give_back(run_table.STOPPING)
        if self.further is not None:
            self.further.give_back()

    # -- announcements

    def is_new(self, node_id: str) -> bool:
        """Return whether a node can work on this host and has not been announced yet."""
        node = self._find_node(node_id)
        if node is None:
            return self.further is not None and self.further.is_new(node_id)
        return node_id not in self._announcer.announced and node.agent is not None

    @property
    def active_runs(self) -> int:
        """Runs that are queued or in work here and on the further hosts."""
        return len(self._runs.active()) + (self.further.active_runs if self.further is not None else 0)

    def hosts(self) -> "Iterator[NodeHost]":
        """Yield this host and the further ones."""
        host: NodeHost | None = self
        while host is not None:
            yield host
            host = host.further

    async def announce(self) -> None:
        """Announce the nodes of all hosts, and publish a lifecycle message for each node that joined or left."""
        await self._announce()
        if self.further is not None:
            await self.further.announce()

    async def _announce(self) -> None:
        """Announce this host, and start a further one if it cannot hold all nodes."""
        if self.further is None and self._partition.rest() and not self._draining:
            self.further = NodeHost(
                self.bus,
                self._partition.rest,
                slots=self._queues.slots,
                backlog=self._queues.backlog,
                timings=self._timings,
            )
            await self.further.start()
        for node_id in await self._announcer.publish():
            self._executor.start_queued(node_id)

    def _announce_free_place(self) -> None:
        """Announce at once: tasks skip a node that refused them until its next announcement."""
        self._pace.request(at_random=False)

    def _working_nodes(self) -> list[Node]:
        """Return the nodes that accept work: those with an agent that are not retiring."""
        return [node for node in self._nodes() if node.agent is not None and node.status != "dying"]

    def _announcement(self, nodes: Sequence[Node]) -> HostAnnouncement:
        return HostAnnouncement(
            draining=self._draining,
            can_spawn=self._spawner is not None and self._spawner.is_running,
            stuck=len(self._runs.stuck),
            **node_fields(nodes, self._queues),
        )

    # -- bids

    def _on_call(self, msg: Msg) -> None:
        try:
            call = decode(msg.data, CallForBids)
        except Undecodable as error:
            self.bus.discards.add("call_undecodable", reason=error.message)
            return
        try:
            offer = self.offer(call, in_turn=True)
        except BaseException as error:  # noqa: BLE001 - a node may be of a user's class, which may raise anything
            log.error("node_raised", domain_token=call.domain_token, **error_fields(error))
            offer = Offer(decline="unqualified")
        answer_to = call.answer_to.split(".")
        self.bus.connection.publish_nowait(
            self.bus.subjects.of("offer", self.bus.identity.owner, self.host_id, *answer_to), offer
        )

    def offer(self, call: CallForBids, *, in_turn: bool = False) -> Offer:
        """Return the host's bids on a call, or a decline.

        Args:
            in_turn: As for `Bidder.offer`.
        """
        return Offer(decline="draining") if self._draining else self._bidder.offer(call, in_turn=in_turn)

    # -- runs

    def _on_run(self, msg: Msg) -> None:
        """Start a run, or resend the events of a run that is active or has ended."""
        if not self._is_own_event_subject(msg.reply):
            self.bus.discards.add("run_request_refused", reason=FOREIGN_REPLY, reply=msg.reply[:200])
            return
        try:
            request = decode(msg.data, RunRequest)
        except Undecodable as error:
            self.bus.discards.add("run_request_undecodable", reason=error.message)
            publish_events(self.bus, msg.reply, encode(RunEvent(seq=0, kind="rejected", code="unqualified")))
            return
        run = self._runs.get(request)
        if run is not None:
            run.resolve_delegated(request.answers)
            run.reattach(msg.reply, request.from_seq)
            return
        final_event = self._runs.final_event(request)
        if final_event is not None:
            publish_events(self.bus, msg.reply, final_event)
            return
        if (reason := stale_reason(request, self.bus)) is not None:  # EXECUTE has given it up, or will repeat it
            log.warning("run_request_ignored", task_id=request.task_id, attempt=request.attempt, reason=reason)
            return
        self._executor.stop(self._runs.earlier_attempts(request), run_table.CANCELLED)
        self._start_run(Run(self.bus, request, msg.reply))

    def _is_own_event_subject(self, reply: str) -> bool:
        """Return whether a reply subject is for this host's events; another subject might reach other services."""
        return reply.startswith(self._event_prefix) and reply.count(".", len(self._event_prefix)) == 1

    def _start_run(self, run: Run) -> None:
        node = self._find_node(run.request.node_id)
        if node is None or node.agent is None:
            has_left = run.request.node_id in self._announcer.left  # the award was right when it was made
            run.emit("rejected", code="busy" if has_left else "unqualified")
        elif self._draining or not self._executor.enqueue(run, node):
            self._executor.refuse(run)

    def _on_stop(self, msg: Msg) -> None:
        """Stop the run of an attempt that EXECUTE has given up; its request may arrive later."""
        try:
            stop = decode(msg.data, Stop)
        except Undecodable as error:
            self.bus.discards.add("stop_undecodable", reason=error.message)
            return
        self._runs.stop(stop)
        run = self._runs.get(stop)
        if run is not None:
            self._executor.stop([run], run_table.CANCELLED)

    def _on_learned(self, msg: Msg) -> None:
        """Copy a learned profile into its node."""
        node = self._find_node(msg.subject.rsplit(".", 1)[1])
        if node is None:
            return
        try:
            lifecycle = decode(msg.data, Lifecycle)
        except Undecodable as error:
            self.bus.discards.add("lifecycle_undecodable", reason=error.message, node_id=node.id)
            return
        if lifecycle.profile is not None:
            node.mirror(lifecycle.profile)
            self._bidder.forget_ratings()
