"""The node host: answers calls for bids, runs what its nodes win, and says that it is alive.

Receives   auction.*, hosts, lifecycle.adapt.learned.<owner>.*, and {call,run,stop}.<owner>.<host>
Publishes  {offer,event}.<owner>.<host>.…, host.<owner>.<host> every 3 s, lifecycle.<owner>.{joined,left}.<owner>.<node>
"""

import asyncio
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextvars import copy_context
from functools import partial
from typing import Any

from msgspec.structs import replace

from loom.agents.abandonable import Abandonable
from loom.agents.host import run_errors
from loom.agents.host.announce_pace import AnnouncePace
from loom.agents.host.announcement import facts_of
from loom.agents.host.announcer import Announcer
from loom.agents.host.bidding import make_offer
from loom.agents.host.clone import SpawnedNode
from loom.agents.host.delegation import Delegator
from loom.agents.host.hosted_agents import HostedAgents
from loom.agents.host.node_share import Share
from loom.agents.host.repeating import attempt, every
from loom.agents.host.runs import FinishedRuns, Run, Stopped, send, stale
from loom.agents.host.slots import Node, NodeIndex, RunQueue
from loom.agents.host.watchdog import Watchdog
from loom.agents.protocol import collect, failed, raised
from loom.agents.user_code import ends_task, error_text_fields
from loom.bus.bus import Bus
from loom.bus.logs.logger import get_logger
from loom.bus.natsio.connection import Subscription
from loom.bus.natsio.transport.message import Msg
from loom.schemas.auction import CallForBids, HostAnnouncement, Offer
from loom.schemas.base import Undecodable, decode, encode, new_id
from loom.schemas.errors import LoomError
from loom.schemas.identity import ADAPT
from loom.schemas.learning import Lifecycle
from loom.schemas.run import RunEvent, RunKind, RunRequest, Stop
from loom.schemas.task import RunResult, TaskError

log = get_logger()

ANNOUNCE_S = 3.0
HEARTBEAT_S = 2.0
SLOTS = 4
BACKLOG = 16
CLEAN_UP_S = 1.0
"""For runs a drain has cancelled, before they are abandoned."""
DRAINS = 3
"""How often a host announces that it drains: such a message may be lost, and runs would go on coming."""
FOREIGN_REPLY = "its reply subject is not an event subject of this host"
GIVE_UP_S = 30.0
"""After so long a run that ignores its cancel loses its slot."""


class NodeHost:
    """Hosts nodes on the bus: up to 128, the others by further hosts in the same process.

    Args:
        nodes: Returns the nodes there are now; read at every call, so that nodes may come and go.
        slots: Runs a node works on at once. Runs share no conversation.
        backlog: Runs a node queues besides.
    """

    def __init__(
        self, bus: Bus, nodes: Callable[[], Sequence[Node]], *, slots: int = SLOTS, backlog: int = BACKLOG
    ) -> None:
        self.host_id = new_id()[:12]
        self.can_spawn = False  # whether nodes can be started here on request
        self.bus = bus
        self._share = Share(nodes)
        self._nodes = self._share.own
        self.further: NodeHost | None = None
        """Hosts the nodes that are too many for one host."""
        self._refused: set[str] = set()
        """Nodes that had no room for a run since they last had some."""
        self._slots = slots
        self._backlog = backlog
        self._rooms: dict[str, RunQueue] = {}
        """Of nodes that have had work."""
        self._node = NodeIndex(self._nodes).get
        self._vacant = RunQueue(slots, backlog)
        """That of a node without work."""
        self._runs: dict[str, dict[int, Run]] = {}
        """Task -> attempt -> the run in hand."""
        self._stopping: dict[Run, float] = {}
        """Runs that were cancelled and still work -> when, on the monotonic clock."""
        self._stuck: set[Run] = set()
        """Runs that still work although they were given up."""
        self._finished = FinishedRuns()
        self._stopped = Stopped()
        self._context = copy_context()
        self._agents = HostedAgents(self._context)
        self._pace = AnnouncePace(lambda: bus.tasks.spawn(attempt(self._announce), name="announce on request"))
        self._announcer = Announcer(bus, self.host_id, self._able, self._description)
        self._watchdog: Watchdog | None = None
        self._draining = False
        self._subscriptions: list[Subscription] = []
        self._tickers: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Begin to bid; returns once the server knows of it and everybody has been told."""
        subjects, owner = self.bus.subjects, self.bus.identity.owner
        for subject, take in (
            (subjects.of("run", owner, self.host_id), self._on_run),
            (subjects.of("stop", owner, self.host_id), self._on_stop),
            (subjects.of("lifecycle", ADAPT, "learned", owner, "*"), self._on_learned),
            (subjects.of("auction", "*"), self._on_call),
            (subjects.of("call", owner, self.host_id), self._on_call),
            (subjects.hosts, lambda _msg: self._pace.request()),
        ):
            self._subscriptions.append(await self.bus.connection.subscribe_sync(subject, take))
        await self.announce()
        await self.bus.requests.flush()
        self._watchdog = Watchdog(self.bus, self._in_hand, self._announcer, beat_s=HEARTBEAT_S, announce_s=ANNOUNCE_S)
        self._watchdog.start()
        self._tickers = [
            self.bus.tasks.spawn(every(ANNOUNCE_S, self._announce), name="announce", essential=True),
            self.bus.tasks.spawn(every(HEARTBEAT_S, self._beat), name="heartbeats", essential=True),
        ]

    async def drain(self, timeout_s: float) -> None:
        """Bid no more, finish runs for at most `timeout_s`, give the rest back. Safe to call twice or unstarted.

        A run that does not end within a second of its cancel is abandoned.
        """
        await asyncio.gather(*(host.drain_own(timeout_s) for host in self.hosts()))

    async def drain_own(self, timeout_s: float) -> None:
        """Drain this host alone, not the further ones."""
        if self._draining or not self._subscriptions:
            return
        self._draining = True
        for _ in range(DRAINS):
            await attempt(self._announce)
        self._stop([run for run in self._in_hand() if run.work is None], run_errors.STOPPING)
        try:
            await self._ended(timeout_s)
        finally:
            self._stop(self._in_hand(), run_errors.STOPPING)
        for ticker in self._tickers:
            ticker.cancel()
        for subscription in self._subscriptions:
            self.bus.connection.unsubscribe(subscription)
        self._pace.stop()
        await self._announcer.leave()
        stopping = [run.work for run in self._stopping if run.work is not None]
        if stopping:
            await asyncio.wait(stopping, timeout=CLEAN_UP_S)
        self.abandon()
        await self._agents.close()

    async def _ended(self, timeout_s: float) -> None:
        """Wait until no run is in hand; one that was stopped meanwhile has ended, whatever its code still does."""
        end_at = time.monotonic() + timeout_s
        while (left_s := end_at - time.monotonic()) > 0:
            working = [run.work for run in self._in_hand() if run.work is not None]
            if not working:
                return
            await asyncio.wait(working, timeout=min(left_s, HEARTBEAT_S), return_when=asyncio.FIRST_COMPLETED)

    def abort(self) -> None:
        """Have runs abandoned that do not end within a second of their cancel; from synchronous code."""
        if self.further is not None:
            self.further.abort()
        if self._watchdog is not None:
            self._watchdog.stop()
        self._agents.release()
        loops = {run.work.get_loop() for run in [*self._in_hand(), *self._stopping] if run.work is not None}
        for loop in loops:
            if not loop.is_closed():
                loop.call_later(CLEAN_UP_S, self.abandon)

    def abandon(self) -> None:
        """Resume the code of no run that is left."""
        for run in [*self._in_hand(), *self._stopping, *self._stuck]:
            if run.agent is not None and run.work is not None:
                run.agent.abandon()
                run.work.cancel()
        if self._watchdog is not None:
            self._watchdog.stop()

    def give_back(self) -> None:
        """Publish that all runs in hand are given back, from another thread: the event loop may be blocked."""
        if self._watchdog is not None:
            self._watchdog.give_back(run_errors.STOPPING)
        if self.further is not None:
            self.further.give_back()

    def is_new(self, node_id: str) -> bool:
        """Return whether a node can work here and has not been announced yet."""
        node = self._node(node_id)
        if node is None:
            return self.further is not None and self.further.is_new(node_id)
        return node_id not in self._announcer.known and node.agent is not None

    def hosts(self) -> "Iterator[NodeHost]":
        """Yield this host and the further ones of its nodes."""
        host: NodeHost | None = self
        while host is not None:
            yield host
            host = host.further

    async def announce(self) -> None:
        """Publish which nodes there are, and a lifecycle message for each that has come or gone."""
        await self._announce()
        if self.further is not None:
            await self.further.announce()

    async def _announce(self) -> None:
        """Announce this host alone; start a further one if the nodes are too many for it."""
        if self.further is None and self._share.rest() and not self._draining:
            self.further = NodeHost(self.bus, self._share.rest, slots=self._slots, backlog=self._backlog)
            await self.further.start()
        for node_id in await self._announcer.publish():
            self._fill(node_id)

    def _able(self) -> list[Node]:
        """The nodes that take work: one that retires is not announced any more."""
        return [node for node in self._nodes() if node.agent is not None and node.status != "dying"]

    def _description(self, nodes: Sequence[Node]) -> HostAnnouncement:
        return HostAnnouncement(
            draining=self._draining,
            can_spawn=self.can_spawn,
            stuck=len(self._stuck),
            **facts_of(nodes, self._rooms, self._slots),
        )

    def _room(self, node_id: str) -> RunQueue:
        if node_id not in self._rooms:
            self._rooms[node_id] = RunQueue(self._slots, self._backlog)
        return self._rooms[node_id]

    # -- bidding

    def _on_call(self, msg: Msg) -> None:
        try:
            call = decode(msg.data, CallForBids)
        except Undecodable as error:
            self.bus.discards.add("call_undecodable", reason=error.message)
            return
        try:
            offer = self.offer(call)
        except BaseException as error:  # noqa: BLE001 - a node may be a user's class: its fault is not the host's end
            log.error("node_raised", domain_token=call.domain_token, **error_text_fields(error))
            offer = Offer(decline="unqualified")
        answer_to = call.answer_to.split(".")
        self.bus.connection.publish_nowait(
            self.bus.subjects.of("offer", self.bus.identity.owner, self.host_id, *answer_to), offer
        )

    def offer(self, call: CallForBids) -> Offer:
        """Return this host's answer to a call: bids, or why there are none."""
        if self._draining:
            return Offer(decline="draining")
        owner = self.bus.identity.owner
        return make_offer(call, self._nodes(), lambda node_id: self._rooms.get(node_id, self._vacant), owner)

    # -- running

    def _on_run(self, msg: Msg) -> None:
        if not self._is_own(msg.reply):
            self.bus.discards.add("run_request_refused", reason=FOREIGN_REPLY, reply=msg.reply[:200])
            return
        try:
            request = decode(msg.data, RunRequest)
        except Undecodable as error:
            self.bus.discards.add("run_request_undecodable", reason=error.message)
            send(self.bus, msg.reply, encode(RunEvent(seq=0, kind="rejected", code="unqualified")))
            return
        attempts = self._runs.get(request.task_id, {})
        known = attempts.get(request.attempt)
        if known is not None:
            known.answer(request.answers)
            known.move(msg.reply, request.from_seq)
            return
        last = self._finished.get((request.task_id, request.attempt))
        if last is None and (request.task_id, request.attempt) in self._stopped:
            last = encode(RunEvent(seq=0, kind="error", error=run_errors.CANCELLED))
        if last is not None:
            send(self.bus, msg.reply, last)
            return
        if (reason := stale(request, self.bus)) is not None:  # EXECUTE has given it up, or will repeat it
            log.warning("run_request_ignored", task_id=request.task_id, attempt=request.attempt, reason=reason)
            return
        # An attempt given up elsewhere costs nothing more here.
        self._stop([run for attempt, run in attempts.items() if attempt < request.attempt], run_errors.CANCELLED)
        self._take(Run(self.bus, request, msg.reply))

    def _is_own(self, reply: str) -> bool:
        """Return whether a reply subject is for this host's events; any other subject could be a command."""
        parsed = self.bus.subjects.parse(reply)
        own = {"owner": self.bus.identity.owner, "host_id": self.host_id}
        return parsed is not None and parsed.family == "event" and own.items() <= parsed.tokens.items()

    def _take(self, run: Run) -> None:
        node = self._node(run.request.node_id)
        if node is None or node.agent is None:
            left = run.request.node_id in self._announcer.left  # the award was right when it was made
            run.say("rejected", code="busy" if left else "unqualified")
            return
        room = self._room(node.id)
        if self._draining or node.status == "dying" or not room.takes(run.request.priority):
            self._refused.add(node.id)
            run.say("rejected", code="busy")
            return
        self._runs.setdefault(run.request.task_id, {})[run.request.attempt] = run
        room.enqueue(run)
        run.say("accepted", queued=max(0, room.queued - (room.slots - len(room.running))))
        run.flush()  # its agent may keep the loop to itself
        self._fill(node.id)

    def _fill(self, node_id: str) -> None:
        """Begin what there is a slot for, and show what a node has in hand."""
        room = self._room(node_id)
        while not self.bus.connection.closing and (run := room.next()) is not None:
            if run.left_s <= 0:  # it waited in the backlog past its deadline
                self._stop([run], run_errors.LATE)  # which fills the room again
                return
            # Not in the context of what freed the slot: that is another run, and its variables are its own.
            run.work = self._context.run(self.bus.tasks.spawn, self._work(run), name=f"run {run.request.key}")
            run.work.add_done_callback(partial(self._on_work_done, run, room))
        if node_id in self._refused and room.load < 1:
            self._refused.discard(node_id)
            self._pace.request(at_random=False)  # tasks pass over a node that refused them until it is announced
        node = self._node(node_id)
        if node is None:
            if not room.has_work:
                del self._rooms[node_id]
                self._agents.forget(node_id)
            return
        node.load = room.load
        if node.status != "dying":
            node.status = "busy" if room.busy else "idle"
        if isinstance(node, SpawnedNode):
            node.has_work = room.has_work

    def _on_work_done(self, run: Run, room: RunQueue, work: asyncio.Task[None]) -> None:
        """Free what a run holds. Its task may have been cancelled before its first step: so nothing in it does this."""
        if run.last is None:
            self._end(run, "error", error=run_errors.STOPPING if work.cancelled() else run_errors.NOT_ENDED)
        self._stopping.pop(run, None)
        self._stuck.discard(run)
        room.forget(run)
        self._fill(run.request.node_id)

    async def _work(self, run: Run) -> None:
        """Run to the end, whatever the agent does; the last event says how it went."""
        run.say("started")
        run.agent = Abandonable(self._outcome(run))
        try:
            error, result = await run.agent
        except asyncio.CancelledError:
            if run.agent.cancelled_itself:
                self._end(run, "error", error=run_errors.CANCELLED_ITSELF)
            raise
        self._end(run, "result" if error is None else "error", error=error, result=result)

    async def _outcome(self, run: Run) -> tuple[TaskError | None, RunResult | None]:
        """Run the agent and return its error, if it failed, and its result; only a cancellation is raised."""
        node_id, room = run.request.node_id, self._room(run.request.node_id)
        job = run.request
        try:
            async with self._agents.ready(self._node(node_id)) as agent:
                job = replace(job, remaining_s=run.left_s)
                with Delegator(run, room, partial(self._fill, node_id)) as delegator:
                    result = await collect(agent, job, run.progress)
            room.learn(result)
            return delegator.overspent(result), result
        except LoomError as error:
            return failed(error, job)
        except BaseException as error:  # whatever user code raises is its failure
            if ends_task(error):
                raise
            return failed(raised(error, job), job)

    def _end(self, run: Run, kind: RunKind, **facts: Any) -> None:
        """Say the last event once, and remember it for whoever asks again."""
        if run.last is None:
            run.say(kind, **{**facts, "result": run.charged(facts.get("result"))})
            if run.last is not None:
                self._finished.keep(run.key, run.last, time.monotonic())
        attempts = self._runs.get(run.request.task_id, {})
        if attempts.pop(run.request.attempt, None) is not None and not attempts:
            del self._runs[run.request.task_id]
        if run.work is None:
            self._room(run.request.node_id).forget(run)
            self._fill(run.request.node_id)
        elif run.work is not asyncio.current_task() and not run.work.done():
            self._stopping.setdefault(run, time.monotonic())
            run.work.cancel()

    def _stop(self, runs: Iterable[Run], why: TaskError) -> None:
        for run in runs:
            self._end(run, "error", error=why)

    def _in_hand(self) -> list[Run]:
        # In copies: the watchdog's thread asks, too.
        return [run for attempts in list(self._runs.values()) for run in list(attempts.values())]

    # -- what else is heard

    def _on_stop(self, msg: Msg) -> None:
        """End the run of an attempt that EXECUTE has given up; its request may still be on the way."""
        try:
            stop = decode(msg.data, Stop)
        except Undecodable as error:
            self.bus.discards.add("stop_undecodable", reason=error.message)
            return
        self._stopped.add((stop.task_id, stop.attempt), time.monotonic())
        run = self._runs.get(stop.task_id, {}).get(stop.attempt)
        if run is not None:
            self._stop([run], run_errors.CANCELLED)

    def _on_learned(self, msg: Msg) -> None:
        node = self._node(msg.subject.rsplit(".", 1)[1])
        if node is None:
            return
        try:
            news = decode(msg.data, Lifecycle)
        except Undecodable as error:
            self.bus.discards.add("lifecycle_undecodable", reason=error.message, node_id=node.id)
            return
        if news.profile is not None:
            node.mirror(news.profile)

    async def _beat(self) -> None:
        """Say which runs are still in hand; one past its deadline, queued or deaf to it, is given up."""
        for run in self._in_hand():
            if run.left_s > 0:
                run.say("heartbeat")
            else:
                self._stop([run], run_errors.LATE)
        given_up = time.monotonic() - GIVE_UP_S
        for run in [run for run, at in self._stopping.items() if at <= given_up]:
            self._give_up(run)

    def _give_up(self, run: Run) -> None:
        """Free the slot of a run that has ignored its cancel, and resume its code no more."""
        del self._stopping[run]
        self._stuck.add(run)
        request = run.request
        log.warning("run_ignores_cancel", task_id=request.task_id, node_id=request.node_id, attempt=request.attempt)
        if run.agent is not None and run.work is not None:
            run.agent.abandon()
            run.work.cancel()
        self._room(request.node_id).forget(run)
        self._fill(request.node_id)
