"""The messages of an auction, the award, and the announcements of node hosts."""

from collections.abc import Iterable
from typing import Annotated, Literal

import msgspec
from msgspec import Meta, Raw, field

from loom.schemas.base import CheckedMessage, Count, Message, Name, Names, Note, Ordinal, Seconds, Unit, total
from loom.schemas.identity import LOCAL_OWNER, qualified
from loom.schemas.task import Priority
from loom.schemas.tokens import Token, domain_token

BID_LIMIT = 16
"""Most bids of an offer, unless the call sets another limit."""
MAX_BIDS = 64
"""Greatest limit of bids that a call may set for one host."""
MAX_LOTS = 16
"""Most tasks of one call."""
DESCRIPTION_BYTES = 1024
"""Bytes of a task's description in a call for bids."""
ANNOUNCED_NODES = 128
"""Most nodes of one announcement; a process with more announces itself as several hosts."""
MAX_ANNOUNCEMENT_BYTES = 64 * 1024
ANNOUNCED_NAMES = 64
"""Most domains and most tools of an announced node."""
ANY_DOMAIN = "*"
"""Instead of a domain in an announcement: every domain that the node does not list."""
NEUTRAL = 0.5
"""Self-rating of a node without one."""
AWARD_BIDS = 16
"""Most bids of an award: the best."""
MAX_TRUST = 1e9
"""Greatest trust in a bidder, and its greatest score."""

DeclineCode = Literal["busy", "unqualified", "draining"]
SpawnDecline = Literal["unqualified", "idle", "full"]
RetireDecline = Literal["permanent", "unknown", "busy"]
AnswerTo = Annotated[str, Meta(pattern=r"^[A-Za-z0-9_-]{1,64}\.[A-Za-z0-9_-]{1,64}\Z")]
"""The last two tokens of the subject an offer is published to: the MATCH instance and the call."""
UsdPrice = Annotated[float, Meta(ge=0, le=1e6)]
Merit = Annotated[float, Meta(ge=0, le=MAX_TRUST)]


class Lot(Message, frozen=True, kw_only=True):
    """One task of a call for bids."""

    task_id: Token
    attempt: Ordinal
    complexity: Unit
    description: Note = ""
    """The first 1 KiB."""
    priority: Priority = "normal"
    remaining_s: Seconds
    """Until the task's deadline."""


class CallForBids(Message, frozen=True, kw_only=True):
    """A request of MATCH for bids on tasks of one domain; each host answers with one Offer.

    The tasks of a call have the same domain, required tools and excluded nodes.
    """

    call_id: Token
    domain: Name
    """As in the ad; its token is that of the subject `loom.auction.<domain_token>`."""
    required_tools: Names = ()
    excluded: Names = ()
    """Nodes that have failed a task of the call: `node_id`, or `owner.node_id` where the owner is not `local`."""
    lots: Annotated[tuple[Lot, ...], Meta(min_length=1, max_length=MAX_LOTS)]
    answer_to: AnswerTo
    """The offer goes to `loom.offer.<owner>.<host_id>.<answer_to>`."""
    limit: Annotated[int, Meta(ge=1, le=MAX_BIDS)] = BID_LIMIT
    """Most bids that are read from one offer."""
    prefer: Names = ()
    """Nodes with the best evidence in the domain, named as in `excluded`: a host should offer those that are free."""

    @property
    def domain_token(self) -> str:
        """The token of the domain."""
        return domain_token(self.domain)


class Bid(CheckedMessage, frozen=True, kw_only=True):
    """One node's bid."""

    node_id: Token
    self_rating: Unit = NEUTRAL
    """The node's own rating in the domain."""
    load: Unit = 0.0
    """Occupied slots and backlog as a share of the capacity, 0 to 1."""
    tools: Names = ()
    """The required tools that the node has."""
    expected_tokens: Count = 0
    expected_s: Seconds = 0.0
    backlog: Count = 0
    """Runs in the queue before this one."""
    free: Count | None = None
    """Free places for tasks that are not urgent; absent: unknown."""
    tasks: Annotated[tuple[Token, ...], Meta(max_length=MAX_LOTS)] | None = None
    """Ids of the lots that the bid is for; absent: all of them."""

    def is_for(self, task_id: str) -> bool:
        """Return whether the bid is for a task of its call."""
        return self.tasks is None or task_id in self.tasks


class Offer(Message, frozen=True, kw_only=True):
    """A host's reply to a call: bids, or the reason for none. The subject has the host and its owner."""

    bids: Annotated[tuple[Bid, ...], Meta(max_length=MAX_BIDS)] = ()
    decline: DeclineCode | None = None
    """busy: qualified nodes have no free slot; unqualified: no node qualifies; draining: the host stops."""


class ScoredBid(CheckedMessage, frozen=True, kw_only=True):
    """A bid with the terms of its score."""

    node_id: Token
    owner: Token = LOCAL_OWNER
    host_id: Token
    score: Merit
    self_rating: Unit
    evidence: Unit | None = None
    """Mean reward of the node in this domain; absent: no rewards yet."""
    count: Count = 0
    """Rewards behind the evidence."""
    trust: Merit
    """Weighted mean of evidence and self-rating, plus the bonus."""
    bonus: Merit = 0.0
    load: Unit
    tools: Unit
    """Share of the required tools that the node has."""
    shared_count: Count = 0
    """Judged attempts of its owner's new nodes, which count as its own; 0: only its own count."""
    comes_last: bool = False
    """Whether it ranks after all other bidders, because another new node of its owner failed the task."""

    @property
    def node(self) -> str:
        """The node as people write it."""
        return qualified(self.owner, self.node_id)


NO_BIDS = Raw(b"[]")
_raw_bids = msgspec.json.Decoder(tuple[Raw, ...])
_scored_bid = msgspec.json.Decoder(ScoredBid)
_scored_bids = msgspec.json.Decoder(Annotated[tuple[ScoredBid, ...], Meta(max_length=AWARD_BIDS)])


def bids_json(encoded: Iterable[bytes]) -> Raw:
    """Return the JSON list of encoded `ScoredBid`s, for an award."""
    return Raw(b"[" + b",".join(encoded) + b"]")


class Award(Message, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The winner of an auction, and the best bids."""

    node_id: Token
    owner: Token = LOCAL_OWNER
    """Owner of the node."""
    host_id: Token
    score: Merit = 0.0
    bids_json: Raw = field(default=NO_BIDS, name="bids")
    """The best bids as JSON, a list of at most 16 `ScoredBid`s: the phases behind MATCH pass it on undecoded."""
    evidence_seq: Count = 0
    """Sequence of the last reward in the evidence behind the scores."""
    backlog: Count = 0
    """Runs in the queue of the winner."""
    policy: Annotated[str, Meta(max_length=200)] = ""
    """Award policy, as in the setting; empty: the task is pinned, or the award is of an older version."""
    pinned: bool = False
    plain: bool = False
    """Whether the node is plain: one request, and its first reply ends the run."""
    max_run_s: Seconds | None = None
    """Seconds after which a run of a plain node without a reply is lost; absent: the default."""

    @property
    def bids(self) -> tuple[ScoredBid, ...]:
        """The best bids, best first; empty if they cannot be decoded, since they only explain the award."""
        try:
            bids: tuple[ScoredBid, ...] = _scored_bids.decode(self.bids_json)
        except (ValueError, RecursionError):
            return ()
        return bids

    @property
    def winning_bid(self) -> ScoredBid | None:
        """The bid of the winner, decoded without the others; None where it is not the first of the list."""
        try:
            bids = _raw_bids.decode(self.bids_json)
            bid = _scored_bid.decode(bids[0]) if bids else None
        except (ValueError, RecursionError):
            return None
        is_winner = bid is not None and (bid.owner, bid.node_id, bid.host_id) == (
            self.owner,
            self.node_id,
            self.host_id,
        )
        return bid if is_winner else None

    @property
    def node(self) -> str:
        """The node as people write it."""
        return qualified(self.owner, self.node_id)


class ChildState(CheckedMessage, frozen=True, kw_only=True):
    """State of a node that its host started on request."""

    node_id: Token
    parent_id: Token
    """The original of the clone."""
    age_s: Seconds = 0.0
    """Seconds since its start."""
    idle_s: Seconds = 0.0
    """Seconds since its last run, or its start; 0 during a run."""
    retiring: bool = False
    """Whether it finishes its runs and accepts no more."""


class AnnouncedDomain(CheckedMessage, frozen=True, kw_only=True):
    """A domain in which a node accepts tasks."""

    domain: Name
    """Any wording; `*`: every domain that the node does not list."""
    self_rating: Unit | None = None
    """The node's rating of itself; 0: it refuses the domain; absent: 0.5."""


class Price(CheckedMessage, frozen=True, kw_only=True):
    """Price of a node's tokens in USD per million. Reserved: not used yet."""

    input: UsdPrice = 0.0
    output: UsdPrice = 0.0


class AnnouncedNode(CheckedMessage, frozen=True, kw_only=True):
    """A node in its host's announcement."""

    node_id: Token
    domains: Annotated[tuple[AnnouncedDomain, ...], Meta(max_length=ANNOUNCED_NAMES)] | None = None
    """Absent: the node accepts tasks of every domain."""
    tools: Annotated[tuple[Name, ...], Meta(max_length=ANNOUNCED_NAMES)] = ()
    slots: Count = 1
    """Most concurrent runs."""
    plain: bool = False
    """Whether MATCH bids for the node, from this announcement, and its first reply to a run request ends the run."""
    max_run_s: Seconds | None = None
    """Seconds after which a run of a plain node without a reply is lost; absent: 60."""
    price: Price | None = None

    def self_rating(self, domain: str) -> float:
        """Return the node's rating of itself in a domain (any wording, or its token); 0: it refuses the domain."""
        if self.domains is None:
            return NEUTRAL
        wanted = domain_token(domain)
        others = 0.0
        for named in self.domains:
            rating = NEUTRAL if named.self_rating is None else named.self_rating
            if named.domain == ANY_DOMAIN:
                others = rating
            elif domain_token(named.domain) == wanted:
                return rating
        return others


class HostAnnouncement(CheckedMessage, frozen=True, kw_only=True):
    """Heartbeat of a node host, with its nodes. The subject has the host and its owner."""

    seq: Count = 0
    """Increases with each announcement of the host; a lower one than the last is ignored."""
    nodes: Annotated[tuple[AnnouncedNode, ...], Meta(max_length=ANNOUNCED_NODES)] = ()
    running: Count = 0
    queued: Count = 0
    draining: bool = False
    """Whether the host stops and accepts no more runs."""
    can_spawn: bool = False
    """Whether it can start nodes on request."""
    busy: Annotated[tuple[Token, ...], Meta(max_length=ANNOUNCED_NODES)] = ()
    """Ids of the nodes with runs."""
    spawned: Annotated[tuple[ChildState, ...], Meta(max_length=ANNOUNCED_NODES)] = ()
    """The nodes that were started on request."""
    stuck: Count = 0
    """Abandoned runs that ignored their cancellation and still execute. They occupy no slot."""

    @property
    def node_ids(self) -> tuple[str, ...]:
        """The ids of the nodes, in the order of the announcement."""
        return tuple(node.node_id for node in self.nodes)

    @property
    def slots(self) -> int:
        """Most concurrent runs of all nodes."""
        return total(*(node.slots for node in self.nodes))


class SpawnRequest(CheckedMessage, frozen=True, kw_only=True):
    """SCALE's request for one more node."""

    domain_token: Token
    required_tools: Names = ()
    description: Note = ""
    """The task's first 1 KiB, cut on a character boundary."""
    reason: Literal["no_bids", "saturated"] = "no_bids"
    task_id: Token | None = None


class SpawnReply(CheckedMessage, frozen=True, kw_only=True):
    """A host's reply to a spawn request: the started node, or the reason for none."""

    host_id: Token
    node_id: Token | None = None
    decline: SpawnDecline | None = None
    """unqualified: no node has the tools; idle: a qualified node has no work; full: the host is at its limit."""


class RetireRequest(CheckedMessage, frozen=True, kw_only=True):
    """ADAPT's request to retire a node."""

    node_id: Token
    reason: Annotated[str, Meta(max_length=500)] = ""
    when_idle: bool = False
    """Whether the node stays if it has runs."""


class RetireReply(CheckedMessage, frozen=True, kw_only=True):
    """A host's reply: the node retires after its last run, or the reason why it stays."""

    host_id: Token
    node_id: Token
    decline: RetireDecline | None = None
    """permanent: it was not started on request; unknown: the host has no such node; busy: it has runs (`when_idle`)."""
