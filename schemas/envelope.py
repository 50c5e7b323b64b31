"""The envelope that six phases pass along, and what each of them writes on it."""

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
"""Hops an envelope remembers; past that the middle is dropped."""
MAX_FAILED_ATTEMPTS = 16
"""Failed attempts an envelope remembers, the newest ones."""
MAX_CAUSE_CHARS = 300
BUSY_S, BUSY_MAX_S = 0.02, 5.0
"""First and longest pause after an attempt that met a full node."""
IN_HAND_S = 0.25
"""A longer pause is a schedule: it holds no slot of MATCH."""
ReplySubjects = Annotated[tuple[Annotated[str, Meta(max_length=256)], ...], Meta(max_length=8)]


class Spec(CheckedMessage, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What SENSE made of the ad."""

    complexity: Unit
    domains: Annotated[tuple[Name, ...], Meta(min_length=1, max_length=8)]
    """Best first; the first one is auctioned."""
    method: Literal["given", "heuristic", "llm"]
    """given: the ad said both; llm: a model was asked; heuristic: a look at the words."""
    note: Note = ""
    """Why the method is not the one expected, for example that the model could not be asked."""
    estimated: Unit | None = None
    """SENSE's own guess, before calibration; absent: the ad gave the complexity."""
    divide: bool = False
    """Whether the task is to be divided: its ad gives or wants a plan, or it is harder than the threshold."""
    deepest: Annotated[int, Meta(ge=0, le=16)] = 0
    """Divisions there may be between a client's task and its smallest part."""
    whole: bool = False
    """Whether SCALE has decided against dividing the task."""
    no_offers_since: Timestamp | None = None
    """Server time since which nobody at all has answered a call."""

    @property
    def domain_token(self) -> str:
        """The token of the auctioned domain."""
        return domain_token(self.domains[0])


class Split(CheckedMessage, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where a subtask comes from."""

    parent: Token
    depth: Annotated[int, Meta(ge=1, le=16)]
    subtask: Token | None = None
    """Id within the parent's plan; absent for delegated work."""
    grant: Count | None = None
    """Tokens the parent gave; absent: no limit."""
    deadline: Timestamp
    """The parent's, in server time."""
    inputs: Outputs = {}


class Hop(Message, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One phase's turn."""

    phase: Phase
    instance: Name
    """Which replica."""
    started: Timestamp
    """Server time, seconds since the epoch."""
    finished: Timestamp
    step: Count = 0


class RejectedResult(CheckedMessage, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A refused result worth keeping in case nothing better comes."""

    result: RunResult
    score: Unit = 0.0
    reason: Note = ""
    """Why it was refused."""
    node_id: Token
    owner: Token = LOCAL_OWNER
    host_id: Token

    def to_rejected(self) -> BestRejected:
        """Return what a submitter is shown of it."""
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
    """What a judging model thinks of a result."""

    score: Unit
    reason: Annotated[str, Meta(max_length=MAX_CAUSE_CHARS)] = ""


class FailedAttempt(CheckedMessage, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An attempt that came to nothing by its node's fault."""

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
    """EXECUTE's hold on an attempt: the fence."""

    attempt: Count = 0
    """0: no attempt is claimed yet."""
    node_id: Name = ""
    owner: Name = LOCAL_OWNER
    host_id: Name = ""
    instance: Name = ""
    """Which EXECUTE replica."""
    stream_seq: Count = 0
    """Sequence in TASKS of the message that carries the claim."""

    @property
    def node(self) -> str:
        """The node as people write it; empty where there is none."""
        return qualified(self.owner, self.node_id) if self.node_id else ""


class RecordVersion(Message, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The record besides its envelope, as whoever wrote it last has left it: the next write needs no reading.

    The write names `revision`, so it fails where somebody else has written since, and then the record is read.
    """

    revision: Ordinal
    submission: Name = ""
    reply_to: ReplySubjects = ()
    claim: Claim = Claim()
    admitted_at: Timestamp


class Envelope(Message, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A task on its way through the phases."""

    v: Count = 1
    ad: TaskAd
    submitter: Token = PUBLIC
    """Whose task it is; subtasks and delegated tasks have their parent's."""
    spec: Spec | None = None
    award: Award | None = None
    split: Split | None = None
    inputs: Outputs = {}
    """subtask id -> output, for a synthesis."""
    result: RunResult | None = None
    opinion: Opinion | None = None
    """Of the result, where a model was asked."""
    unjudged: Note = ""
    """Why the result has no opinion although one was wanted; empty: it has one, or none was wanted."""
    best_rejected: RejectedResult | None = None
    """The best refused result so far."""
    error: TaskError | None = None
    last_error: TaskError | None = None
    """Why the attempt before this one failed."""
    attempt: Ordinal = 1
    failures: Count = 0
    """Attempts that were the node's fault."""
    busy_retries: Count = 0
    """Attempts that met a full node."""
    step: Count = 0
    """Hops so far."""
    deadline: Timestamp
    """Server time, seconds since the epoch."""
    budget: Count | None = None
    """Tokens left; absent: no limit."""
    excluded: Names = ()
    """Nodes that have failed the task: `node_id`, or `owner.node_id` where the owner is not `local`."""
    retry_at: Annotated[dict[Name, Timestamp], Meta(max_length=1000)] = {}
    """Node, as in `excluded` -> server time from which it asked to be tried again, as a model's server told it."""
    failed_attempts: Annotated[tuple[FailedAttempt, ...], Meta(max_length=MAX_FAILED_ATTEMPTS)] = ()
    """Attempts that failed, oldest first; the newest ones where there were more."""
    spent: RunResult = RunResult()
    """Tokens and money of all attempts whose result is not in `result`, and of a divided task's subtasks; content is
    empty."""
    phase_usage: Annotated[dict[Name, PhaseUsage], Meta(max_length=16)] = {}
    """phase -> what its questions to a model took."""
    warnings: Annotated[tuple[Note, ...], Meta(max_length=MAX_WARNINGS)] = ()
    """What a person should know of the result."""
    trace: Note = ""
    """W3C traceparent, passed on as it came."""
    record_version: RecordVersion | None = None
    """Of the task's record; absent on the record's own copy."""
    hops: Annotated[tuple[Hop, ...], Meta(max_length=2 * MAX_HOPS)] = ()

    @property
    def task_id(self) -> str:
        """The ad's id."""
        return self.ad.task_id

    @property
    def priority(self) -> Priority:
        """The ad's priority."""
        return self.ad.priority

    @property
    def domain_token(self) -> str:
        """The token of the auctioned domain."""
        return self.spec.domain_token if self.spec else domain_token(self.ad.domain or "general")

    @property
    def domain(self) -> str:
        """The auctioned domain as worded."""
        return self.spec.domains[0] if self.spec else self.ad.domain

    @property
    def depth(self) -> int:
        """0 for what a client submitted."""
        return self.split.depth if self.split else 0

    def with_hop(self, hop: Hop) -> "Envelope":
        """Return the next step's envelope: one hop longer, the middle dropped past 64.

        A phase that hands a task to itself extends its last hop instead of adding one.
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
        """Seconds to pause after an attempt that met a full node: 20 ms, doubled each time, at most 5 s."""
        return min(BUSY_MAX_S, BUSY_S * 2.0 ** min(self.busy_retries - 1, 16)) if self.busy_retries else 0.0

    def failed(self, error: TaskError) -> "Envelope":
        """Return the envelope with `error` instead of a result."""
        return replace(self.without_result(), error=error)

    def without_result(self) -> "Envelope":
        """Return the envelope with its result's tokens and money among what is spent, and the result gone."""
        if self.result is None:
            return self
        return replace(self, spent=self.spent.usage_with(self.result), result=None)

    def warned(self, warning: str) -> "Envelope":
        """Return the envelope with one more warning for the submitter, unless it has it, or as many as fit."""
        if warning in self.warnings or len(self.warnings) >= MAX_WARNINGS:
            return self
        return replace(self, warnings=(*self.warnings, cut_note(warning)))
