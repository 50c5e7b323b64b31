"""The envelope that the six phases pass on, and the parts that they add."""

from typing import Annotated, Literal

from msgspec import Meta
from msgspec.structs import replace

from loom.schemas.auction import Award
from loom.schemas.base import (
    CheckedMessage,
    Count,
    Message,
    Name,
    Names,
    Note,
    Ordinal,
    Outputs,
    Seconds,
    Timestamp,
    Unit,
    cut_note,
)
from loom.schemas.identity import LOCAL_OWNER, PUBLIC, qualified
from loom.schemas.task import (
    MAX_WARNINGS,
    BestRejected,
    PhaseUsage,
    Priority,
    RunResult,
    TaskAd,
    TaskError,
)
from loom.schemas.tokens import Token, domain_token

Phase = Literal["sense", "match", "scale", "execute", "evaluate", "adapt"]
PHASES: tuple[Phase, ...] = ("sense", "match", "scale", "execute", "evaluate", "adapt")

MAX_HOPS = 64
"""Most hops of an envelope; of more, those in the middle are dropped."""
MAX_FAILED_ATTEMPTS = 16
"""Most failed attempts of an envelope: the newest."""
MAX_CAUSE_CHARS = 300
BUSY_S, BUSY_MAX_S = 0.02, 5.0
"""First and longest pause after an attempt on a node without a free slot."""
IN_HAND_S = 0.25
"""A longer pause becomes a scheduled message and occupies no slot of MATCH."""
ReplySubjects = Annotated[tuple[Annotated[str, Meta(max_length=256)], ...], Meta(max_length=8)]


class Spec(CheckedMessage, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """SENSE's estimate of a task: complexity, domains, and whether to divide it."""

    complexity: Unit
    domains: Annotated[tuple[Name, ...], Meta(min_length=1, max_length=8)]
    """Best first; the first one is used for the auction."""
    method: Literal["given", "heuristic", "llm"]
    """given: the ad has both; llm: a model's estimate; heuristic: derived from the words."""
    note: Note = ""
    """Why another method than the expected one was used, for example that the model did not respond."""
    estimated: Unit | None = None
    """SENSE's estimate before calibration; absent: the ad has the complexity."""
    divide: bool = False
    """Whether to divide the task: its ad contains or requires a plan, or its complexity exceeds the threshold."""
    deepest: Annotated[int, Meta(ge=0, le=16)] = 0
    """Most divisions between a client's task and its deepest subtask."""
    whole: bool = False
    """Whether SCALE decided not to divide the task."""
    no_offers_since: Timestamp | None = None
    """Server time since which calls for bids received no offer."""

    @property
    def domain_token(self) -> str:
        """The token of the auctioned domain."""
        return domain_token(self.domains[0])


class Split(CheckedMessage, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The parent of a subtask or delegated task."""

    parent: Token
    depth: Annotated[int, Meta(ge=1, le=16)]
    subtask: Token | None = None
    """Id within the parent's plan; absent for delegated work."""
    grant: Count | None = None
    """Token limit set by the parent; absent: no limit."""
    deadline: Timestamp
    """Deadline of the parent, in server time."""
    inputs: Outputs = {}


class Hop(Message, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The handling of an envelope by one phase."""

    phase: Phase
    instance: Name
    """The replica of the phase."""
    started: Timestamp
    """Server time, seconds since the epoch."""
    finished: Timestamp
    step: Count = 0


class RejectedResult(CheckedMessage, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The best refused result so far, with its score and node."""

    result: RunResult
    score: Unit = 0.0
    reason: Note = ""
    """Why it was refused."""
    node_id: Token
    owner: Token = LOCAL_OWNER
    host_id: Token

    def to_rejected(self) -> BestRejected:
        """Return the form that a submitter receives."""
        run = self.result
        return BestRejected(
            content=run.content,
            truncated=run.truncated,
            score=self.score,
            reason=self.reason,
            node_id=self.node_id,
            owner=self.owner,
        )


class Opinion(CheckedMessage, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A judging model's score of a result."""

    score: Unit
    reason: Annotated[str, Meta(max_length=MAX_CAUSE_CHARS)] = ""


class FailedAttempt(CheckedMessage, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A failed attempt for which its node is to blame."""

    attempt: Ordinal
    node_id: Token
    owner: Token = LOCAL_OWNER
    host_id: Token
    code: Annotated[str, Meta(max_length=64)]
    message: Annotated[str, Meta(max_length=MAX_CAUSE_CHARS)] = ""
    tokens: Count = 0
    duration_s: Seconds = 0.0

    @property
    def node(self) -> str:
        """The node as people write it."""
        return qualified(self.owner, self.node_id)


class Claim(Message, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The fence of an attempt: the EXECUTE replica and message that may report its result."""

    attempt: Count = 0
    """0: no attempt is claimed yet."""
    node_id: Name = ""
    owner: Name = LOCAL_OWNER
    host_id: Name = ""
    instance: Name = ""
    """The EXECUTE replica."""
    stream_seq: Count = 0
    """Sequence in TASKS of the message with the claim."""

    @property
    def node(self) -> str:
        """The node as people write it; empty without a claim."""
        return qualified(self.owner, self.node_id) if self.node_id else ""


class RecordVersion(Message, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The task record's other fields and revision, as of the last write.

    With them the next compare-and-set can be attempted without a read. It names `revision` and fails after a write of
    another process; then the record is read.
    """

    revision: Ordinal
    submission: Name = ""
    reply_to: ReplySubjects = ()
    claim: Claim = Claim()
    admitted_at: Timestamp


class Envelope(Message, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A task with its current state, passed from phase to phase."""

    v: Count = 1
    ad: TaskAd
    submitter: Token = PUBLIC
    """Submitter of the task; subtasks and delegated tasks have that of their parent."""
    spec: Spec | None = None
    award: Award | None = None
    split: Split | None = None
    inputs: Outputs = {}
    """subtask id -> output, the input of a synthesis."""
    result: RunResult | None = None
    opinion: Opinion | None = None
    """A model's score of the result; absent: no model judged it."""
    unjudged: Note = ""
    """Why the result lacks a required opinion; empty: it has one, or none is required."""
    best_rejected: RejectedResult | None = None
    """Best refused result so far."""
    error: TaskError | None = None
    last_error: TaskError | None = None
    """Error of the previous attempt."""
    attempt: Ordinal = 1
    failures: Count = 0
    """Failed attempts for which nodes are to blame."""
    busy_retries: Count = 0
    """Attempts on nodes without a free slot."""
    step: Count = 0
    """Hops so far."""
    deadline: Timestamp
    """Server time, seconds since the epoch."""
    budget: Count | None = None
    """Tokens left; absent: no limit."""
    excluded: Names = ()
    """Nodes that have failed the task: `node_id`, or `owner.node_id` where the owner is not `local`."""
    retry_at: Annotated[dict[Name, Timestamp], Meta(max_length=1000)] = {}
    """Node, named as in `excluded` -> server time of the earliest retry, from the `retry_after_s` of its error."""
    failed_attempts: Annotated[tuple[FailedAttempt, ...], Meta(max_length=MAX_FAILED_ATTEMPTS)] = ()
    """Attempts that failed, oldest first; the newest ones where there were more."""
    spent: RunResult = RunResult()
    """Tokens and cost of all attempts whose result is not in `result`, and of the subtasks; content is empty."""
    phase_usage: Annotated[dict[Name, PhaseUsage], Meta(max_length=16)] = {}
    """phase -> tokens of its model calls."""
    warnings: Annotated[tuple[Note, ...], Meta(max_length=MAX_WARNINGS)] = ()
    """Warnings about the result, for people."""
    trace: Note = ""
    """W3C traceparent, passed on unchanged."""
    record_version: RecordVersion | None = None
    """Version of the task's record; absent in the record's own copy."""
    hops: Annotated[tuple[Hop, ...], Meta(max_length=2 * MAX_HOPS)] = ()

    @property
    def task_id(self) -> str:
        """Id of the task."""
        return self.ad.task_id

    @property
    def priority(self) -> Priority:
        """Priority of the task."""
        return self.ad.priority

    @property
    def domain_token(self) -> str:
        """The token of the auctioned domain."""
        return self.spec.domain_token if self.spec else domain_token(self.ad.domain or "general")

    @property
    def domain(self) -> str:
        """The auctioned domain, in the wording of the ad or of SENSE."""
        return self.spec.domains[0] if self.spec else self.ad.domain

    @property
    def depth(self) -> int:
        """0 for a task of a client, one more for each division or delegation."""
        return self.split.depth if self.split else 0

    def with_hop(self, hop: Hop) -> "Envelope":
        """Return the envelope of the next step, with one more hop; of more than 64, those in the middle are dropped.

        A phase that publishes a task to itself extends its last hop instead of adding one.
        """
        hops = self.hops
        if hops and hops[-1].phase == hop.phase and hops[-1].instance == hop.instance:
            hops = (*hops[:-1], replace(hops[-1], finished=hop.finished, step=hop.step))
        else:
            hops = (*hops, hop)
        if len(hops) > MAX_HOPS:
            hops = (*hops[: MAX_HOPS // 2], *hops[-MAX_HOPS // 2 :])
        return replace(self, hops=hops, step=self.step + 1)

    @property
    def busy_pause_s(self) -> float:
        """Seconds to pause after an attempt on a full node: 0.02, doubled each time, at most 5."""
        return min(BUSY_MAX_S, BUSY_S * 2.0 ** min(self.busy_retries - 1, 16)) if self.busy_retries else 0.0

    def failed(self, error: TaskError) -> "Envelope":
        """Return the envelope with `error` instead of a result."""
        return replace(self.without_result(), error=error)

    def without_result(self) -> "Envelope":
        """Return the envelope without its result, whose tokens and cost are added to `spent`."""
        if self.result is None:
            return self
        return replace(self, spent=self.spent.usage_with(self.result), result=None)

    def warned(self, warning: str) -> "Envelope":
        """Return the envelope with one more warning, unless it has that warning or the most that fit."""
        if warning in self.warnings or len(self.warnings) >= MAX_WARNINGS:
            return self
        return replace(self, warnings=(*self.warnings, cut_note(warning)))
