"""The messages of an auction, and what node hosts announce of themselves."""

from typing import Annotated, Literal

from msgspec import Meta

from loom.schemas.base import CheckedMessage, Count, Message, Name, Names, Note, Ordinal, Seconds, Unit, total
from loom.schemas.identity import LOCAL_OWNER, qualified
from loom.schemas.task import Priority
from loom.schemas.tokens import Token, domain_token

BID_LIMIT = 16
"""Most bids one offer carries."""
MAX_BIDS = 64
"""Most bids a call may ask of one host."""
MAX_LOTS = 16
"""Most tasks one call is for."""
DESCRIPTION_BYTES = 1024
"""Bytes of a task's description in a call for bids."""
ANNOUNCED_NODES = 128
"""Most nodes of one announcement; a process with more announces itself as several hosts."""
MAX_ANNOUNCEMENT_BYTES = 64 * 1024
ANNOUNCED_NAMES = 64
"""Most domains and most tools that a node announces."""
ANY_DOMAIN = "*"
"""In place of an announced domain: every domain that the node does not name."""
NEUTRAL = 0.5
"""The self-rating of a node that gives none."""
AWARD_BIDS = 16
"""Bids an award remembers, best first."""
MAX_TRUST = 1e9
"""Most a bidder is trusted, and most its score."""

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
    """As worded; its token is that of the subject `loom.auction.<domain_token>`."""
    required_tools: Names = ()
    excluded: Names = ()
    """Nodes that have failed a task of the call: `node_id`, or `owner.node_id` where the owner is not `local`."""
    lots: Annotated[tuple[Lot, ...], Meta(min_length=1, max_length=MAX_LOTS)]
    answer_to: AnswerTo
    """The offer goes to `loom.offer.<owner>.<host_id>.<answer_to>`."""
    limit: Annotated[int, Meta(ge=1, le=MAX_BIDS)] = BID_LIMIT
    """Most bids of one offer that are read."""
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
    """How well the node rates itself in the domain."""
    load: Unit = 0.0
    """Taken slots and backlog as a share of all there is room for."""
    tools: Names = ()
    """Those of the required tools it has."""
    expected_tokens: Count = 0
    expected_s: Seconds = 0.0
    backlog: Count = 0
    """Runs queued before this one."""
    free: Count | None = None
    """Places for tasks that are not urgent; absent: unknown."""
    tasks: Annotated[tuple[Token, ...], Meta(max_length=MAX_LOTS)] | None = None
    """Tasks of the call's lots that the bid is for; absent: all of them."""

    def is_for(self, task_id: str) -> bool:
        """Return whether the bid is for a task of its call."""
        return self.tasks is None or task_id in self.tasks


class Offer(Message, frozen=True, kw_only=True):
    """One host's answer to a call: bids, or why there are none. The subject names the host and its owner."""

    bids: Annotated[tuple[Bid, ...], Meta(max_length=MAX_BIDS)] = ()
    decline: DeclineCode | None = None
    """busy: a node could do it and has no room; unqualified: no node could; draining: the host stops."""


class ScoredBid(CheckedMessage, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A bid as the auction weighed it."""

    node_id: Token
    owner: Token = LOCAL_OWNER
    host_id: Token
    score: Merit
    self_rating: Unit
    evidence: Unit | None = None
    """Mean reward of the node in this domain; absent: none yet."""
    count: Count = 0
    """Rewards behind the evidence."""
    trust: Merit
    """Evidence and claim blended, plus the bonus for the little known."""
    bonus: Merit = 0.0
    load: Unit
    tools: Unit
    """Share of the required tools the node has."""
    shared_count: Count = 0
    """Judged attempts of its owner's newcomers, which count as its own; 0: only its own count."""
    comes_last: bool = False
    """Whether it comes after all other bidders: another newcomer of its owner has failed the task."""

    @property
    def node(self) -> str:
        """The node as people write it."""
        return qualified(self.owner, self.node_id)


class Award(Message, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Who won, and against whom."""

    node_id: Token
    owner: Token = LOCAL_OWNER
    """Whose node it is."""
    host_id: Token
    score: Merit = 0.0
    bids: Annotated[tuple[ScoredBid, ...], Meta(max_length=AWARD_BIDS)] = ()
    """Best first."""
    evidence_seq: Count = 0
    """Sequence of the last reward the scores rest on."""
    backlog: Count = 0
    """Runs queued at the winner."""
    policy: Annotated[str, Meta(max_length=200)] = ""
    """How the bidders were trusted, by the name the setting has; empty: pinned, or of a version that did not tell."""
    pinned: bool = False
    plain: bool = False
    """Whether the node is a plain one: it is asked once, and its first reply is the end of the run."""
    max_run_s: Seconds | None = None
    """Of a plain node: seconds after which a run without a reply is lost; absent: the default."""

    @property
    def node(self) -> str:
        """The node as people write it."""
        return qualified(self.owner, self.node_id)


class ChildState(CheckedMessage, frozen=True, kw_only=True):
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


class AnnouncedDomain(CheckedMessage, frozen=True, kw_only=True):
    """A domain that a node takes."""

    domain: Name
    """As worded; `*`: every domain that the node does not name."""
    self_rating: Unit | None = None
    """How well the node rates itself there; 0: it does not take the domain; absent: 0.5."""


class Price(CheckedMessage, frozen=True, kw_only=True):
    """What a node's tokens cost, in USD per million. Reserved: not used yet."""

    input: UsdPrice = 0.0
    output: UsdPrice = 0.0


class AnnouncedNode(CheckedMessage, frozen=True, kw_only=True):
    """What a host announces of one of its nodes."""

    node_id: Token
    domains: Annotated[tuple[AnnouncedDomain, ...], Meta(max_length=ANNOUNCED_NAMES)] | None = None
    """Absent: it takes tasks of every domain."""
    tools: Annotated[tuple[Name, ...], Meta(max_length=ANNOUNCED_NAMES)] = ()
    slots: Count = 1
    """Runs it works on at once."""
    plain: bool = False
    """Whether MATCH bids for it, from this announcement, and its first reply to a run request is the end of the run."""
    max_run_s: Seconds | None = None
    """Seconds after which a run of a plain node without a reply is lost; absent: 60."""
    price: Price | None = None

    def self_rating(self, domain: str) -> float:
        """Return how the node rates itself in a domain, given as worded or by its token; 0: it does not take it."""
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
    """A sign of life of a node host, with its nodes. The subject names the host and its owner."""

    seq: Count = 0
    """Rises with each announcement of the host: a lower one than the last is ignored."""
    nodes: Annotated[tuple[AnnouncedNode, ...], Meta(max_length=ANNOUNCED_NODES)] = ()
    running: Count = 0
    queued: Count = 0
    draining: bool = False
    """Whether the host stops: it takes no more runs."""
    can_spawn: bool = False
    """Whether it can start nodes on request."""
    busy: Annotated[tuple[Token, ...], Meta(max_length=ANNOUNCED_NODES)] = ()
    """Those of the nodes that have work in hand."""
    spawned: Annotated[tuple[ChildState, ...], Meta(max_length=ANNOUNCED_NODES)] = ()
    """Those of the nodes that were started on request."""
    stuck: Count = 0
    """Runs that still work although they were given up: they ignored their cancel. They hold no slot."""

    @property
    def node_ids(self) -> tuple[str, ...]:
        """The ids of the nodes, in the order of the announcement."""
        return tuple(node.node_id for node in self.nodes)

    @property
    def slots(self) -> int:
        """Runs that the nodes work on at once."""
        return total(*(node.slots for node in self.nodes))


class SpawnRequest(CheckedMessage, frozen=True, kw_only=True):
    """SCALE asks for one more node."""

    domain_token: Token
    required_tools: Names = ()
    description: Note = ""
    """The task's first 1 KiB, cut on a character boundary."""
    reason: Literal["no_bids", "saturated"] = "no_bids"
    task_id: Token | None = None


class SpawnReply(CheckedMessage, frozen=True, kw_only=True):
    """A host's answer to a request for a node: which one it has started, or why none."""

    host_id: Token
    node_id: Token | None = None
    decline: SpawnDecline | None = None
    """unqualified: none of its nodes has the tools; idle: one that could take the work has none; full: at its limit."""


class RetireRequest(CheckedMessage, frozen=True, kw_only=True):
    """ADAPT asks a host to retire a node."""

    node_id: Token
    reason: Annotated[str, Meta(max_length=500)] = ""
    when_idle: bool = False
    """Whether the node may stay if it has work in hand."""


class RetireReply(CheckedMessage, frozen=True, kw_only=True):
    """A host's answer: the node takes no more work and goes once it has none in hand, or why it stays."""

    host_id: Token
    node_id: Token
    decline: RetireDecline | None = None
    """permanent: it was not started on request; unknown: it is not here (any more); busy: as `when_idle` asked."""
