"""The node host: answers calls for bids, runs what its nodes win, and says that it is alive.

Hears      auction.*, run.<host>, cancel.*, hosts, lifecycle.learned.*
Says       offers, run events, host.<host> every 3 s, lifecycle.joined and lifecycle.left
"""

import asyncio
import time
from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextvars import copy_context
from functools import partial
from heapq import nsmallest
from typing import Any

from msgspec.structs import replace

from loom.agents.child import Child
from loom.agents.delegate import Delegator
from loom.agents.function_agent import as_agent
from loom.agents.node import Node, Room
from loom.agents.port import StreamingAgent, collect, failure_of, spent_by
from loom.agents.runs import Finished, Run, send
from loom.bus.client import Bus, Msg, Subscription
from loom.bus.faults import describe
from loom.bus.log import get_logger
from loom.schemas.auction import CallForBids, HostAnnouncement, Offer
from loom.schemas.errors import AgentFailed, LoomError
from loom.schemas.learning import Lifecycle, LifecycleKind
from loom.schemas.run import RunEvent, RunKind, RunRequest
from loom.schemas.task import TaskError
from loom.schemas.wire import Undecodable, decode, encode, new_id

log = get_logger()

ANNOUNCE_S = 3.0
HEARTBEAT_S = 2.0
SLOTS = 4
BACKLOG = 16
REMEMBER_CANCEL_S = 60.0
CANCELS = 10_000
LEFT = 256
CANCELLED = TaskError(code="cancelled", message="the run was stopped")
LATE = TaskError(code="deadline_exceeded", message="the deadline passed before the run was over")
UNTOLD = TaskError(code="agent_failed", message="the agent failed, and its error cannot be told")
STOPPING = TaskError(code="node_busy", message="the host is stopping")


class NodeHost:
    """Hosts nodes on the bus.

    Args:
        nodes: Returns the nodes there are now; read at every call, so that nodes may come and go.
        slots: Runs a node works on at once. Runs share no conversation.
        backlog: Runs a node queues besides.
    """

    def __init__(
        self, bus: Bus, nodes: Callable[[], Sequence[Node]], *, slots: int = SLOTS, backlog: int = BACKLOG
    ) -> None:
        self.host_id = new_id()[:12]
        self.templates = False
        """Whether nodes can be started here on request."""
        self.bus = bus
        self._nodes = nodes
        self._slots = slots
        self._backlog = backlog
        self._rooms: dict[str, Room] = {}
        """Of nodes that have had work."""
        self._places: dict[str, int] = {}
        """Where among the nodes one was when last looked for."""
        self._vacant = Room(slots, backlog)
        """That of a node without work."""
        self._agents: dict[str, tuple[Any, StreamingAgent]] = {}
        """Node -> what it has for an agent, and the agent made of it."""
        self._runs: dict[str, dict[int, Run]] = {}
        """Task -> attempt -> the run in hand."""
        self._finished = Finished()
        self._cancelled: OrderedDict[str, float] = OrderedDict()
        """Tasks cancelled lately -> when: their run requests may still be on the way."""
        self._known: frozenset[str] = frozenset()
        self._left: deque[str] = deque(maxlen=LEFT)
        """Nodes that have gone lately: awards to them may still be on the way."""
        self._context = copy_context()
        self._draining = False
        self._subscriptions: list[Subscription] = []
        self._tickers: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Begin to bid; returns once the server knows of it and everybody has been told."""
        subjects = self.bus.subjects
        for subject, take in (
            (subjects.of("run", self.host_id), self._on_run),
            (subjects.of("cancel", "*"), self._on_cancel),
            (subjects.of("lifecycle", "learned", "*"), self._on_learned),
            (subjects.of("auction", "*"), self._on_call),
        ):
            self._subscriptions.append(await self.bus.listen(subject, take))
        self._subscriptions.append(await self.bus.subscribe(subjects.hosts, self._on_hosts))
        await self.announce()
        await self.bus.echo()
        self._tickers = [
            self.bus.spawn(self._every(ANNOUNCE_S, self.announce), name="announce"),
            self.bus.spawn(self._every(HEARTBEAT_S, self._beat), name="heartbeats"),
        ]

    async def drain(self, timeout_s: float) -> None:
        """Bid no more, finish runs for at most `timeout_s`, give the rest back. Safe to call twice or unstarted."""
        if self._draining or not self._subscriptions:
            return
        self._draining = True
        await self._attempt(self.announce)
        self._stop([run for run in self._in_hand() if run.work is None], STOPPING)
        working = [run.work for run in self._in_hand() if run.work is not None]
        if working:
            await asyncio.wait(working, timeout=timeout_s)
        self._stop(self._in_hand(), STOPPING)
        for ticker in self._tickers:
            ticker.cancel()
        for subscription in self._subscriptions:
            await self.bus.unsubscribe(subscription)
        for node_id in self._known:
            await self._attempt(partial(self._tell, "left", node_id))

    async def announce(self) -> None:
        """Say who is here, and tell of nodes that have come or gone."""
        here = [node for node in self._nodes() if node.agent is not None]
        nodes = frozenset(node.id for node in here)
        self._left.extend(self._known - nodes)
        rooms = {node_id: room for node_id, room in self._rooms.items() if node_id in nodes}
        said = HostAnnouncement(
            host_id=self.host_id,
            nodes=tuple(sorted(nodes)),
            slots=self._slots * len(nodes),
            running=sum(len(room.running) for room in rooms.values()),
            queued=sum(room.queued for room in rooms.values()),
            draining=self._draining,
            templates=self.templates,
            busy=tuple(sorted(node_id for node_id, room in rooms.items() if room.has_work)),
            children=tuple(node.state() for node in here if isinstance(node, Child)),
        )
        await self.bus.publish(self.bus.subjects.of("host", self.host_id), said)
        for node_id in nodes - self._known:
            await self._tell("joined", node_id)
        for node_id in self._known - nodes:
            await self._tell("left", node_id)
            self._fill(node_id)
        self._known = nodes

    async def _tell(self, kind: LifecycleKind, node_id: str) -> None:
        news = Lifecycle(kind=kind, node_id=node_id, host_id=self.host_id, at=self.bus.now())
        await self.bus.publish(self.bus.subjects.of("lifecycle", kind, node_id), news)

    def _room(self, node_id: str) -> Room:
        if node_id not in self._rooms:
            self._rooms[node_id] = Room(self._slots, self._backlog)
        return self._rooms[node_id]

    def _node(self, node_id: str) -> Node | None:
        nodes = self._nodes()
        place = self._places.get(node_id, 0)
        if place < len(nodes) and nodes[place].id == node_id:
            return nodes[place]
        for place, node in enumerate(nodes):
            if node.id == node_id:
                self._places[node_id] = place
                return node
        self._places.pop(node_id, None)
        return None

    # -- bidding

    def _on_call(self, msg: Msg) -> None:
        try:
            call = decode(msg.data, CallForBids)
        except Undecodable as error:
            log.warning("call_undecodable", reason=error.message)
            return
        self.bus.send(msg.reply, self.offer(call))

    def offer(self, call: CallForBids) -> Offer:
        """Return this host's answer to a call: bids, or why there are none.

        The nodes that are preferred come first, then the highest claims, then the least loaded.
        """
        if self._draining:
            return Offer(host_id=self.host_id, decline="draining")
        excluded = set(call.excluded)
        able = [
            node
            for node in self._nodes()
            if node.agent is not None and node.id not in excluded and node.has_tools(call.required_tools)
        ]
        best = [able[place] for *_, place in nsmallest(call.limit, self._ranks(able, call))]
        if not best:
            return Offer(host_id=self.host_id, decline="busy" if able else "cannot")
        rooms = [self._rooms.get(node.id, self._vacant) for node in best]
        bids = [room.bid(node, call.slug, call.required_tools) for node, room in zip(best, rooms, strict=True)]
        return Offer(host_id=self.host_id, bids=tuple(bids))

    def _ranks(self, nodes: Sequence[Node], call: CallForBids) -> list[tuple[bool, float, float, int]]:
        """What orders the nodes that take work, the first one least; last comes a node's place among `nodes`."""
        ranks = []
        preferred = set(call.prefer)
        for place, node in enumerate(nodes):
            if node.status == "dying":
                continue
            room = self._rooms.get(node.id)
            if room is None:
                ranks.append((node.id not in preferred, -node.claim(call.slug), 0.0, place))
            elif not room.full:
                ranks.append((node.id not in preferred, -node.claim(call.slug), room.load, place))
        return ranks

    # -- running

    def _on_run(self, msg: Msg) -> None:
        try:
            request = decode(msg.data, RunRequest)
        except Undecodable as error:
            log.warning("run_request_undecodable", reason=error.message)
            send(self.bus, msg.reply, encode(RunEvent(n=0, kind="rejected", code="cannot")))
            return
        attempts = self._runs.get(request.task_id, {})
        known = attempts.get(request.attempt)
        if known is not None:
            known.answer(request.answers)
            known.move(msg.reply, request.from_n)
            return
        last = self._finished.get((request.task_id, request.attempt))
        if last is None and request.task_id in self._cancelled:
            last = encode(RunEvent(n=0, kind="error", error=CANCELLED))
        if last is not None:
            send(self.bus, msg.reply, last)
            return
        # An attempt given up elsewhere costs nothing more here.
        self._stop([run for attempt, run in attempts.items() if attempt < request.attempt], CANCELLED)
        self._take(Run(self.bus, request, msg.reply))

    def _take(self, run: Run) -> None:
        node = self._node(run.request.node_id)
        if node is None or node.agent is None:
            left = run.request.node_id in self._left  # nobody's fault: it was there when it won
            run.say("rejected", code="busy" if left else "cannot")
            return
        room = self._room(node.id)
        if self._draining or node.status == "dying" or not room.takes(run.request.priority):
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
        while (run := room.next()) is not None:
            # Not in the context of whoever freed the slot: that is another run, and its variables are its own.
            run.work = self._context.run(self.bus.spawn, self._work(run, room), name=f"run {run.request.key}")
        node = self._node(node_id)
        if node is None:
            if not room.has_work:
                del self._rooms[node_id]
                self._agents.pop(node_id, None)
            return
        node.load = room.load
        if node.status != "dying":
            node.status = "busy" if room.busy else "idle"
        if isinstance(node, Child):
            node.has_work = room.has_work

    async def _work(self, run: Run, room: Room) -> None:
        """Run to the end, whatever the agent does; the last event says how it went."""
        request = run.request
        try:
            run.say("started")
            job = replace(request, remaining_s=run.left_s)
            with Delegator(run, room, partial(self._fill, request.node_id)) as delegator:
                result = await collect(self._agent(request.node_id), job, run.progress)
            room.learn(result)
            too_dear = delegator.overspent(result)
            self._end(run, "error" if too_dear else "result", error=too_dear, result=result)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            stopped = task is not None and task.cancelling()
            failed = TaskError(code="agent_failed", message="the agent was cancelled from within")
            self._end(run, "error", error=STOPPING if stopped else failed)
        except LoomError as error:
            self._end(run, "error", error=failure_of(error, request.node_id), result=spent_by(error))
        except Exception as error:  # noqa: BLE001 - an agent is user code: whatever it raises is its failure
            log.warning("agent_raised", task_id=request.task_id, node_id=request.node_id, **describe(error))
            failed = TaskError(code="agent_failed", message=f"the agent raised {type(error).__name__}")
            self._end(run, "error", error=failed)
        finally:
            if run.last is None:  # an error made by user code may itself raise when it is looked at
                self._end(run, "error", error=UNTOLD)
            room.forget(run)
            self._fill(request.node_id)

    def _agent(self, node_id: str) -> StreamingAgent:
        """The agent of a node, made once of what it has for one."""
        node = self._node(node_id)
        if node is None:
            raise AgentFailed("the node left before the run began")
        given, agent = self._agents.get(node_id, (None, None))
        if agent is None or given is not node.agent:
            agent = as_agent(node.agent)
            self._agents[node_id] = (node.agent, agent)
        return agent

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
        elif run.work is not asyncio.current_task():
            run.work.cancel()

    def _stop(self, runs: Iterable[Run], why: TaskError) -> None:
        for run in runs:
            self._end(run, "error", error=why)

    def _in_hand(self) -> list[Run]:
        return [run for attempts in self._runs.values() for run in attempts.values()]

    # -- what else is heard

    def _on_cancel(self, msg: Msg) -> None:
        task_id = msg.subject.rsplit(".", 1)[1]
        now = time.monotonic()
        self._cancelled[task_id] = now
        while now - next(iter(self._cancelled.values())) > REMEMBER_CANCEL_S or len(self._cancelled) > CANCELS:
            self._cancelled.popitem(last=False)
        self._stop(list(self._runs.get(task_id, {}).values()), CANCELLED)

    async def _on_hosts(self, _msg: Msg) -> None:
        await self.announce()

    def _on_learned(self, msg: Msg) -> None:
        node = self._node(msg.subject.rsplit(".", 1)[1])
        if node is None:
            return
        news = decode(msg.data, Lifecycle)
        if news.profile is not None:
            node.mirror(news.profile)

    async def _beat(self) -> None:
        """Say which runs are still in hand; one past its deadline, queued or deaf to it, is given up."""
        for run in self._in_hand():
            if run.left_s > 0:
                run.say("heartbeat")
            else:
                self._stop([run], LATE)

    async def _every(self, seconds: float, act: Callable[[], Awaitable[None]]) -> None:
        while True:
            await asyncio.sleep(seconds)
            await self._attempt(act)

    async def _attempt(self, act: Callable[[], Awaitable[None]]) -> None:
        """Say something; a connection that is gone must not end the host's other work."""
        try:
            await act()
        except LoomError as error:
            log.warning("host_silenced", reason=error.message)
