"""The nursery: starts nodes on request, clones of a host's own or new ones, and lets them go when it is told to.

Hears      spawn (one host of the queue group), retire.<host>
Says       a reply to each, lifecycle.spawned, lifecycle.changed when a child takes no more work, lifecycle.retired
"""

from collections.abc import Callable, Sequence
from typing import cast

from loom.agents.host.clone import SpawnedNode, child_id
from loom.agents.host.node_host import NodeHost
from loom.agents.host.slots import Node
from loom.bus.bus import Bus
from loom.bus.logs.logger import get_logger
from loom.bus.natsio.connection import Subscription
from loom.bus.natsio.transport.message import Msg
from loom.schemas.auction import RetireDecline, RetireReply, RetireRequest, SpawnDecline, SpawnReply, SpawnRequest
from loom.schemas.base import Undecodable, decode
from loom.schemas.errors import BusUnavailable
from loom.schemas.learning import Lifecycle, LifecycleKind

log = get_logger()

QUEUE = "nursery"

Skills = Callable[[SpawnRequest], Node | None]
"""Returns a node that can take the task wanted, to be started at once, or None where no skill is called for."""


class NodeAutoscaler:
    """The nodes of one host: those it was given, and those it has started.

    Args:
        originals: Returns the nodes that were given, read at every call. Any of them may be cloned; none is let go.
        max_nodes: Most nodes there are, originals and children together; no child is started beyond.
        skills: Asked where none of the nodes could be cloned; what it returns is a child, and may be cloned itself.
    """

    def __init__(
        self, bus: Bus, originals: Callable[[], Sequence[Node]], *, max_nodes: int, skills: Skills | None = None
    ) -> None:
        self._bus = bus
        self._originals = originals
        self._max_nodes = max_nodes
        self._skills = skills
        self._children: dict[str, SpawnedNode] = {}
        self._host: NodeHost | None = None
        self._hosts: set[str] = set()
        """Hosts whose nodes can be retired."""
        self._subscriptions: list[Subscription] = []

    def nodes(self) -> list[Node]:
        """Return originals and children, as they are now: what a NodeHost is to be given."""
        return [*self._originals(), *cast("list[Node]", list(self._children.values()))]

    async def start(self, host: NodeHost) -> None:
        """Begin to take requests, for a started host of these `nodes`."""
        self._host = host
        self._subscriptions = [
            await self._bus.connection.subscribe(self._bus.subjects.spawn, self._on_spawn, queue=QUEUE)
        ]
        host.can_spawn = True
        await self._announce(host)
        await self._bus.requests.flush()

    async def _announce(self, host: NodeHost) -> None:
        """Announce the nodes, and take requests to retire those of each host."""
        await host.announce()
        for each in host.hosts():
            if each.host_id not in self._hosts:
                self._hosts.add(each.host_id)
                subject = self._bus.subjects.of("retire", self._bus.identity.owner, each.host_id)
                self._subscriptions.append(await self._bus.connection.subscribe(subject, self._on_retire))

    async def stop(self) -> None:
        """Take no more requests; the children stay until their host goes. Safe to call twice or unstarted."""
        subscriptions, self._subscriptions = self._subscriptions, []
        self._hosts.clear()
        for subscription in subscriptions:
            self._bus.connection.unsubscribe(subscription)

    # -- growing

    async def _on_spawn(self, msg: Msg) -> None:
        host = self._running()
        try:
            wanted = decode(msg.data, SpawnRequest)
        except Undecodable as error:
            self._bus.discards.add("spawn_request_undecodable", reason=error.message)
            return
        made = self.spawn(wanted)
        if isinstance(made, SpawnedNode):
            log.info("node_spawned", node_id=made.id, domain_token=wanted.domain_token, reason=wanted.reason)
            await self._announce(host)
            await self._tell("spawned", made, f"{made.origin}: {wanted.reason} in {wanted.domain_token}")
            reply = SpawnReply(host_id=host.host_id, node_id=made.id)
        else:
            log.debug("spawn_declined", domain_token=wanted.domain_token, decline=made)
            reply = SpawnReply(host_id=host.host_id, decline=made)
        if msg.reply:
            await self._bus.connection.publish(msg.reply, reply)

    def spawn(self, wanted: SpawnRequest) -> "SpawnedNode | SpawnDecline":
        """Return a new child, which is among `nodes` from now on, or why there is none."""
        nodes = self.nodes()
        template = choose_template(wanted, nodes, self._max_nodes)
        if isinstance(template, str):
            template = self._skilled(wanted, len(nodes)) if template == "unqualified" else template
            if isinstance(template, str):
                return template
        taken = {node.id for node in nodes}
        name = child_id(template.id, taken) if template.id in taken else template.id
        child = SpawnedNode(name, template, wanted.domain_token)
        self._children[child.id] = child
        return child

    def _skilled(self, wanted: SpawnRequest, size: int) -> Node | SpawnDecline:
        """Return the node of a skill the task calls for; asked only with room for it, since it counts as started."""
        if self._skills is None:
            return "unqualified"
        if size >= self._max_nodes:
            return "full"
        node = self._skills(wanted)
        return node if node is not None and node.has_tools(wanted.required_tools) else "unqualified"

    # -- shrinking

    async def _on_retire(self, msg: Msg) -> None:
        host = self._running()
        try:
            order = decode(msg.data, RetireRequest)
        except Undecodable as error:
            self._bus.discards.add("retire_request_undecodable", reason=error.message)
            return
        decline = self._refusal(order)
        child = self._children.get(order.node_id)
        if decline is None and child is not None and child.status != "dying":
            child.status = "dying"
            log.info("node_retiring", node_id=child.id, reason=order.reason)
            self._bus.tasks.spawn(self._let_go(child, order.reason), name=f"retire {child.id}")
            await host.announce()
            await self._tell("changed", child, f"takes no more work: {order.reason}")
        if msg.reply:
            await self._bus.connection.publish(
                msg.reply, RetireReply(host_id=host.host_id, node_id=order.node_id, decline=decline)
            )

    def _refusal(self, order: RetireRequest) -> RetireDecline | None:
        child = self._children.get(order.node_id)
        if child is None:
            return "permanent" if any(node.id == order.node_id for node in self._originals()) else "unknown"
        return "busy" if order.when_idle and child.has_work and child.status != "dying" else None

    async def _let_go(self, child: SpawnedNode, reason: str) -> None:
        """Wait until it has nothing in hand; it bids no more and takes nothing new."""
        await child.free.wait()
        del self._children[child.id]
        try:
            await self._running().announce()
            await self._tell("retired", child, reason)
        except BusUnavailable as error:  # who missed it hears the next announcement
            log.warning("retirement_untold", node_id=child.id, reason=error.message)
        log.info("node_retired", node_id=child.id)

    async def _tell(self, kind: LifecycleKind, child: SpawnedNode, reason: str) -> None:
        host_id, owner = self._running().host_id, self._bus.identity.owner
        news = Lifecycle(
            kind=kind, node_id=child.id, owner=owner, host_id=host_id, at=self._bus.clock.now(), reason=reason
        )
        await self._bus.connection.publish(self._bus.subjects.of("lifecycle", owner, kind, owner, child.id), news)

    def _running(self) -> NodeHost:
        if self._host is None:
            raise RuntimeError("the nursery has not been started")
        return self._host


def choose_template(wanted: SpawnRequest, nodes: Sequence[Node], max_nodes: int) -> Node | SpawnDecline:
    """Return the node to clone, or why there is to be none more.

    It is the one with the tools that claims most in the domain; clones are not cloned. While one of those that could
    take the work has nothing in hand, it bids, and another would only stand beside it.
    """
    able = [
        node
        for node in nodes
        if node.agent is not None
        and node.status != "dying"
        and node.has_tools(wanted.required_tools)
        and node.claim(wanted.domain_token) > 0
    ]
    if any(not node.load for node in able):
        return "idle"
    templates = [node for node in able if not (isinstance(node, SpawnedNode) and node.is_clone)]
    if not templates:
        return "unqualified"
    if len(nodes) >= max_nodes:
        return "full"
    return max(templates, key=lambda node: node.claim(wanted.domain_token))
