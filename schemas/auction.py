"""What is said around an auction: the call, the offers, and who hosts whom."""

from typing import Annotated, Literal

from msgspec import Meta

from loom.schemas.wire import MAX_NODES, Count, Name, Names, Note, Ordinal, Relayed, Seconds, Token, Unit, Wire

BID_LIMIT = 16
"""Most bids one offer carries."""
MAX_BIDS = 64
"""Most bids a call may ask of one host."""
DESCRIPTION_BYTES = 1024
"""How much of a task's description those who could take it are told."""

DeclineCode = Literal["busy", "unqualified", "draining"]
SpawnDecline = Literal["unqualified", "idle", "full"]
RetireDecline = Literal["permanent", "unknown", "busy"]


class CallForBids(Relayed, frozen=True, kw_only=True):
    """MATCH asks who would take a task."""

    auction_id: Token
    task_id: Token
    attempt: Ordinal
    domain_token: Token
    """The domain's token."""
    domain: Name = ""
    """The domain as worded; empty: of a version that does not send it."""
    complexity: Unit
    required_tools: Names = ()
    description: Note = ""
    """The first 1 KiB."""
    remaining_s: Seconds
    excluded: Names = ()
    """Nodes that have failed this task."""
    limit: Annotated[int, Meta(ge=1, le=MAX_BIDS)] = BID_LIMIT
    prefer: Names = ()
    """Nodes MATCH knows to be good: their hosts must offer them if they are free."""


class Bid(Wire, frozen=True, kw_only=True):
    """One node's offer."""

    node_id: Token
    self_rating: Unit = 0.5
    """How well the node says it does this domain."""
    load: Unit = 0.0
    """Taken slots and backlog as a share of all there is room for."""
    tools: Names = ()
    """Those of the required tools it has."""
    expected_tokens: Count = 0
    expected_s: Seconds = 0.0
    backlog: Count = 0
    """Runs queued before this one."""
    free: Count | None = None
    """Places for tasks that are not urgent; absent: not told."""


class Offer(Relayed, frozen=True, kw_only=True):
    """One host's answer to a call: bids, or why there are none."""

    host_id: Token
    bids: Annotated[tuple[Bid, ...], Meta(max_length=MAX_BIDS)] = ()
    decline: DeclineCode | None = None
    unrated: bool = False
    """Whether none of the host's nodes names the domain of the call, by a rating above 0 or among its own domains."""
    near: Name = ""
    """The domain, as worded, that its nodes name and that resembles it most; empty: there is none, or not `unrated`."""


class ChildState(Wire, frozen=True, kw_only=True):
    """How a node fares that its host started on request."""

    node_id: Token
    parent_id: Token
    """The node it is a clone of."""
    age_s: Seconds = 0.0
    """Since it was started."""
    idle_s: Seconds = 0.0
    """Since it last had work in hand, or was started; 0 while it has some."""
    retiring: bool = False
    """Whether it only finishes what it has in hand."""


class HostAnnouncement(Wire, frozen=True, kw_only=True):
    """A host says that it is alive."""

    host_id: Token
    nodes: Annotated[tuple[Token, ...], Meta(max_length=MAX_NODES)] = ()
    slots: Count = 0
    running: Count = 0
    queued: Count = 0
    draining: bool = False
    can_spawn: bool = False
    """Whether it can start nodes on request."""
    busy: Annotated[tuple[Token, ...], Meta(max_length=MAX_NODES)] = ()
    """Those of the nodes that have work in hand."""
    spawned: Annotated[tuple[ChildState, ...], Meta(max_length=MAX_NODES)] = ()
    """Those of the nodes that were started on request."""
    stuck: Count = 0
    """Runs that still work although they were given up: they ignored their cancel. They hold no slot."""


class SpawnRequest(Wire, frozen=True, kw_only=True):
    """SCALE asks for one more node."""

    domain_token: Token
    required_tools: Names = ()
    description: Note = ""
    """The task's first 1 KiB, cut on a character boundary."""
    reason: Literal["no_bids", "saturated"] = "no_bids"
    task_id: Token | None = None


class SpawnReply(Wire, frozen=True, kw_only=True):
    """A host's answer to a request for a node: which one it has started, or why none."""

    host_id: Token
    node_id: Token | None = None
    decline: SpawnDecline | None = None
    """cannot: none of its nodes has the tools; idle: one that could take the work has none; full: at its limit."""


class RetireRequest(Wire, frozen=True, kw_only=True):
    """ADAPT asks a host to retire a node."""

    node_id: Token
    reason: Annotated[str, Meta(max_length=500)] = ""
    when_idle: bool = False
    """Whether the node may stay if it has work in hand."""


class RetireReply(Wire, frozen=True, kw_only=True):
    """A host's answer: the node takes no more work and goes once it has none in hand, or why it stays."""

    host_id: Token
    node_id: Token
    decline: RetireDecline | None = None
    """original: it was not started on request; unknown: it is not here (any more); busy: as `when_idle` asked."""
