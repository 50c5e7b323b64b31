"""What is said around an auction: the call, the offers, and who hosts whom."""

from typing import Annotated, Literal

from msgspec import Meta

from loom.schemas.wire import Count, Seconds, Token, Unit, Wire

BID_LIMIT = 16
"""Most bids one offer carries."""

DeclineCode = Literal["busy", "cannot", "draining"]


class CallForBids(Wire, frozen=True, kw_only=True):
    """MATCH asks who would take a task."""

    auction_id: Token
    task_id: Token
    attempt: Annotated[int, Meta(ge=1)]
    slug: Token
    """The domain's token."""
    complexity: Unit
    required_tools: tuple[str, ...] = ()
    description: str = ""
    """The first 1 KiB."""
    remaining_s: Seconds
    excluded: tuple[str, ...] = ()
    """Nodes that have failed this task."""
    limit: Annotated[int, Meta(ge=1, le=64)] = BID_LIMIT
    prefer: tuple[str, ...] = ()
    """Nodes MATCH knows to be good: their hosts must offer them if they are free."""


class Bid(Wire, frozen=True, kw_only=True):
    """One node's offer."""

    node_id: Token
    claim: Unit = 0.5
    """How well the node says it does this domain."""
    load: Unit = 0.0
    """Taken slots and backlog as a share of all there is room for."""
    tools: tuple[str, ...] = ()
    """Those of the required tools it has."""
    expected_tokens: Count = 0
    expected_s: Seconds = 0.0
    backlog: Count = 0
    """Runs queued before this one."""


class Offer(Wire, frozen=True, kw_only=True):
    """One host's answer to a call: bids, or why there are none."""

    host_id: Token
    bids: tuple[Bid, ...] = ()
    decline: DeclineCode | None = None


class HostAnnouncement(Wire, frozen=True, kw_only=True):
    """A host says that it is alive."""

    host_id: Token
    nodes: Annotated[tuple[Token, ...], Meta(max_length=4096)] = ()
    slots: Count = 0
    running: Count = 0
    queued: Count = 0
    draining: bool = False
    templates: bool = False
    """Whether it can start nodes on request."""


class SpawnRequest(Wire, frozen=True, kw_only=True):
    """SCALE asks for one more node."""

    slug: Token
    required_tools: tuple[str, ...] = ()
    reason: Literal["no_bids", "saturated"] = "no_bids"
    task_id: Token | None = None


class RetireRequest(Wire, frozen=True, kw_only=True):
    """ADAPT asks a host to retire a node."""

    node_id: Token
    reason: Annotated[str, Meta(max_length=500)] = ""
