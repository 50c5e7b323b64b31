"""The node autoscaler: starts nodes of a host on request, and retires them on request.

Receives   spawn (one host of the queue group), retire.<owner>.<host>
Publishes  a reply to each, and lifecycle.<owner>.{spawned,changed,retired}.<owner>.<node>
"""

from collections.abc import Callable, Sequence
from typing import Literal, cast

from loom.agents.host.clone import SpawnedNode, clone_id
from loom.agents.host.node_host import NodeHost
from loom.agents.host.publishing import publish_lifecycle
from loom.agents.host.slots import Node
from loom.bus.bus import Bus
from loom.bus.logs.logger import get_logger
from loom.bus.natsio.connection import Subscription
from loom.bus.natsio.transport.message import Msg
from loom.schemas.auction import RetireDecline, RetireReply, RetireRequest, SpawnDecline, SpawnReply, SpawnRequest
from loom.schemas.base import Undecodable, decode
from loom.schemas.errors import BusUnavailable

log = get_logger()

QUEUE = "nursery"

Skills = Callable[[SpawnRequest], Node | None]
"""Returns a node with a skill that fits the request, to be started at once, or None if no skill fits."""


class NodeAutoscaler:
    """Starts and retires nodes of one host; the permanent nodes can be cloned but not retired.

    Args:
        permanent: Returns the nodes given by the user; read at every call.
        max_nodes: Maximum number of permanent and spawned nodes together.
        skills: Called when no node can be cloned. The node it returns is spawned, and may be cloned itself.
    """

    def __init__(
        self, bus: Bus, permanent: Callable[[], Sequence[Node]], *, max_nodes: int, skills: Skills | None = None
    ) -> None:
        self._bus = bus
        self._permanent = permanent
        self._max_nodes = max_nodes
        self._skills = skills
        self._spawned: dict[str, SpawnedNode] = {}
        self._host: NodeHost | None = None
        self._host_ids: set[str] = set()
        """Hosts whose `retire` subject is subscribed."""
        self._subscriptions: list[Subscription] = []

    def nodes(self) -> list[Node]:
        """Return the permanent and the spawned nodes, for a NodeHost."""
        return [*self._permanent(), *cast("list[Node]", list(self._spawned.values()))]

    @property
    def is_running(self) -> bool:
        """Whether requests are accepted."""
        return bool(self._subscriptions)

    async def start(self, host: NodeHost) -> None:
        """Subscribe to requests, for a started host of these `nodes`."""
        self._host = host
        self._subscriptions = [
            await self._bus.connection.subscribe(self._bus.subjects.spawn, self._on_spawn, queue=QUEUE)
        ]
        await self._announce(host)
        await self._bus.requests.flush()

    async def _announce(self, host: NodeHost) -> None:
        """Announce the nodes, and subscribe to the `retire` subjects of new hosts."""
        await host.announce()
        for member in host.hosts():
            if member.host_id not in self._host_ids:
                self._host_ids.add(member.host_id)
                subject = self._bus.subjects.of("retire", self._bus.identity.owner, member.host_id)
                self._subscriptions.append(await self._bus.connection.subscribe(subject, self._on_retire))

    async def stop(self) -> None:
        """Unsubscribe from requests; spawned nodes stay until their host stops. Safe to call twice or unstarted."""
        subscriptions, self._subscriptions = self._subscriptions, []
        self._host_ids.clear()
        for subscription in subscriptions:
            self._bus.connection.unsubscribe(subscription)

    # -- spawning

    async def _on_spawn(self, msg: Msg) -> None:
        host = self._started_host()
        try:
            request = decode(msg.data, SpawnRequest)
        except Undecodable as error:
            self._bus.discards.add("spawn_request_undecodable", reason=error.message)
            return
        spawned = self.spawn(request)
        if isinstance(spawned, SpawnedNode):
            log.info("node_spawned", node_id=spawned.id, domain_token=request.domain_token, reason=request.reason)
            await self._announce(host)
            await self._publish_lifecycle(
                "spawned", spawned, f"{spawned.origin}: {request.reason} in {request.domain_token}"
            )
            reply = SpawnReply(host_id=host.host_id, node_id=spawned.id)
        else:
            log.debug("spawn_declined", domain_token=request.domain_token, decline=spawned)
            reply = SpawnReply(host_id=host.host_id, decline=spawned)
        if msg.reply:
            await self._bus.connection.publish(msg.reply, reply)

    def spawn(self, request: SpawnRequest) -> "SpawnedNode | SpawnDecline":
        """Add a spawned node to `nodes` and return it, or return why none is spawned."""
        nodes = self.nodes()
        template = choose_template(request, nodes, self._max_nodes)
        if isinstance(template, str):
            template = self._node_with_skill(request, len(nodes)) if template == "unqualified" else template
            if isinstance(template, str):
                return template
        taken = {node.id for node in nodes}
        node_id = clone_id(template.id, taken) if template.id in taken else template.id
        spawned = SpawnedNode(node_id, template, request.domain_token)
        self._spawned[spawned.id] = spawned
        return spawned

    def _node_with_skill(self, request: SpawnRequest, size: int) -> Node | SpawnDecline:
        """Return a node with a fitting skill; the limit comes first, as `skills` counts every node it returns."""
        if self._skills is None:
            return "unqualified"
        if size >= self._max_nodes:
            return "full"
        node = self._skills(request)
        return node if node is not None and node.has_tools(request.required_tools) else "unqualified"

    # -- retiring

    async def _on_retire(self, msg: Msg) -> None:
        host = self._started_host()
        try:
            request = decode(msg.data, RetireRequest)
        except Undecodable as error:
            self._bus.discards.add("retire_request_undecodable", reason=error.message)
            return
        decline = self._decline(request)
        node = self._spawned.get(request.node_id)
        if decline is None and node is not None and node.status != "dying":
            node.status = "dying"
            log.info("node_retiring", node_id=node.id, reason=request.reason)
            self._bus.tasks.spawn(self._remove_when_idle(node, request.reason), name=f"retire {node.id}")
            await host.announce()
            await self._publish_lifecycle("changed", node, f"takes no more work: {request.reason}")
        if msg.reply:
            await self._bus.connection.publish(
                msg.reply, RetireReply(host_id=host.host_id, node_id=request.node_id, decline=decline)
            )

    def _decline(self, request: RetireRequest) -> RetireDecline | None:
        """Return why a node cannot be retired, or None."""
        node = self._spawned.get(request.node_id)
        if node is None:
            is_permanent = any(permanent.id == request.node_id for permanent in self._permanent())
            return "permanent" if is_permanent else "unknown"
        return "busy" if request.when_idle and node.has_work and node.status != "dying" else None

    async def _remove_when_idle(self, node: SpawnedNode, reason: str) -> None:
        """Wait until the node has no work, remove it and publish that it has retired."""
        await node.idle.wait()
        del self._spawned[node.id]
        try:
            await self._started_host().announce()
            await self._publish_lifecycle("retired", node, reason)
        except BusUnavailable as error:  # the next announcement no longer names the node
            log.warning("retirement_not_published", node_id=node.id, reason=error.message)
        log.info("node_retired", node_id=node.id)

    async def _publish_lifecycle(
        self, kind: Literal["spawned", "changed", "retired"], node: SpawnedNode, reason: str
    ) -> None:
        await publish_lifecycle(self._bus, kind, node.id, self._started_host().host_id, reason)

    def _started_host(self) -> NodeHost:
        if self._host is None:
            raise RuntimeError("the autoscaler has not been started")
        return self._host


def choose_template(request: SpawnRequest, nodes: Sequence[Node], max_nodes: int) -> Node | SpawnDecline:
    """Return the node to clone, or why no node is cloned.

    The template is the node with the required tools and the highest self-rating in the domain. Clones are not cloned.
    While a node that qualifies is idle, nothing is cloned, because that node bids itself.
    """
    able = [
        node
        for node in nodes
        if node.agent is not None
        and node.status != "dying"
        and node.has_tools(request.required_tools)
        and node.claim(request.domain_token) > 0
    ]
    if any(not node.load for node in able):
        return "idle"
    templates = [node for node in able if not (isinstance(node, SpawnedNode) and node.is_clone)]
    if not templates:
        return "unqualified"
    if len(nodes) >= max_nodes:
        return "full"
    return max(templates, key=lambda node: node.claim(request.domain_token))
