"""The envelope that six phases pass along, and what each of them writes on it."""

from typing import Annotated, Literal

from msgspec import Meta
from msgspec.structs import replace

from loom.schemas.base import (
    MAX_SECONDS,
    CheckedMessage,
    Count,
    Message,
    Name,
    Names,
    Note,
    Ordinal,
    Outputs,
    Seconds,
    Text,
    Timestamp,
    Token,
    Unit,
    cut_note,
)
from loom.schemas.identity import LOCAL_OWNER, PUBLIC, qualified
from loom.schemas.rejected import BestRejected
from loom.schemas.task import (
    MAX_WARNINGS,
    PhaseUsage,
    Priority,
    RunResult,
    TaskAd,
    TaskError,
    TaskResult,
    TaskState,
    TaskUsage,
    ad_digest,
    domain_token,
)

Phase = Literal["sense", "match", "scale", "execute", "evaluate", "adapt"]
PHASES: tuple[Phase, ...] = ("sense", "match", "scale", "execute", "evaluate", "adapt")

MAX_HOPS = 64
"""Hops an envelope remembers; past that the middle is dropped."""
MAX_FAILED_ATTEMPTS = 16
"""Failed attempts an envelope remembers, the newest ones."""
MAX_CAUSE_CHARS = 300
MAX_DELEGATED = 256
"""Delegated tasks a record remembers."""
BUSY_S, BUSY_MAX_S = 0.02, 5.0
"""First and longest pause after an attempt that met a full node."""
IN_HAND_S = 0.25
"""A longer pause is a schedule: it holds no slot of MATCH."""
AWARD_BIDS = 16
"""Bids an award remembers, best first."""
REJECTED = "rejected_result"
MAX_TRUST = 1e9
"""Most a bidder is trusted, and most its score."""
Merit = Annotated[float, Meta(ge=0, le=MAX_TRUST)]
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


class TaskRecord(Message, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is known of a task, from admission to 72 hours after."""

    task_id: Token
    state: TaskState
    submission: Name = ""
    reply_to: ReplySubjects = ()
    envelope: Envelope
    """As admitted, then as it was when an attempt was claimed; once the task has ended, as it ended."""
    claim: Claim = Claim()
    admitted_at: Timestamp
    ended_at: Timestamp | None = None
    score: Unit | None = None
    """What the judge gave the result."""
    below_threshold: bool = False
    """Whether it succeeded with the best refused answer, as the ad's `best_effort` allows."""
    rejected: bool = False
    """Whether it failed because attempts or bidders ran out after an answer had been refused."""
    delegated: Annotated[tuple[Token, ...], Meta(max_length=MAX_DELEGATED)] = ()
    """Tasks its runs have delegated, oldest first; the newest ones where there were more."""

    def __repr__(self) -> str:
        return f"<TaskRecord {self.task_id}, {self.state}>"

    @property
    def ended(self) -> bool:
        """Whether the state is terminal."""
        return self.state in ENDED

    @property
    def ad_digest(self) -> str:
        """Tells the ad from others under the same id; empty where the submission could not be read."""
        error = self.envelope.error
        unread = not self.submission or (error is not None and error.code == "dead_letter")
        return "" if unread else ad_digest(self.envelope.ad)

    @property
    def lasted_s(self) -> float:
        """Seconds from admission to the end, at most what a message carries; 0 while the task goes on."""
        return min(MAX_SECONDS, max(0.0, (self.ended_at or self.admitted_at) - self.admitted_at))

    @property
    def error(self) -> TaskError | None:
        """Why the task did not succeed, as submitters see it: with the best answer that was refused on the way.

        `envelope.error` is the last attempt's own error, by which its node is rewarded.
        """
        own, best = self.envelope.error, self.envelope.best_rejected
        if own is None or self.state == "succeeded":
            return None
        if best is None or self.state != "failed":
            return own
        if not self.rejected:
            return replace(own, best_rejected=best.to_rejected())
        last = "" if own.code == REJECTED else f"; the last attempt ended with {own.code}: {own.message}"
        refused = best.to_rejected()
        message = cut_note(f"{best.reason or 'refused'} (the best refused answer, of {refused.node}){last}")
        return TaskError(code=REJECTED, message=message, node_id=best.node_id, best_rejected=refused)

    @property
    def used(self) -> RunResult:
        """Tokens and money of all attempts; content is empty."""
        env = self.envelope
        if env.result is None or self.below_threshold:  # a kept result is of an attempt that counts as spent
            return env.spent
        return env.spent.usage_with(env.result)

    def to_result(self) -> TaskResult:
        """Return the answer this record holds; for a running task, how far it is."""
        env = self.envelope
        run, used = env.result or RunResult(), self.used
        by = env.best_rejected if self.below_threshold else env.award
        return TaskResult(
            task_id=self.task_id,
            state=self.state,
            content=run.content,
            error=self.error,
            domain=env.domain,
            node_id=by.node_id if by else None,
            owner=by.owner if by else None,
            host_id=by.host_id if by else None,
            attempts=self.claim.attempt,
            score=self.score,
            below_threshold=self.below_threshold,
            truncated=run.truncated,
            prompt_tokens=used.prompt_tokens,
            completion_tokens=used.completion_tokens,
            estimated_usage=used.estimated_usage,
            usd=used.usd,
            usage=TaskUsage(phases=env.phase_usage),
            steps=run.steps,
            duration_s=run.duration_s,
            warnings=env.warnings,
            labels=env.ad.labels,
            ad_digest=self.ad_digest,
        )


class TaskStatus(TaskResult, frozen=True, kw_only=True):
    """The answer to a `StatusQuery` with `full`: the result together with the record."""

    record: TaskRecord | None = None
    """Without reply subjects; absent while the task waits for admission."""


ENDED: frozenset[str] = frozenset({"succeeded", "failed", "cancelled"})
"""Terminal states."""


Subject = Annotated[str, Meta(max_length=4096)]
"""As long as the server takes one; a token of it may be as long."""


class DeadLetter(CheckedMessage, frozen=True, kw_only=True):
    """The facts beside the raw bytes of a message that could not be handled."""

    phase: Subject
    task_id: Subject
    subject: Subject
    deliveries: Count
    reason: Annotated[str, Meta(max_length=1000)]
    stream_seq: Count = 0
    cut: bool = False
    """Whether the bytes kept are fewer than there were."""
    trail: Note = ""
    """The phases it had passed, oldest first, with a space between: `sense match scale`."""


class Subtask(CheckedMessage, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A node of a split plan."""

    id: Token
    description: Text
    domain: Name = ""
    dependencies: Annotated[tuple[Token, ...], Meta(max_length=1000)] = ()
    estimated_complexity: Unit = 0.3
    state: Literal["waiting", "running", "succeeded", "failed", "cancelled"] = "waiting"
    child_id: Token | None = None
    grant: Count | None = None
    """Tokens it may use; absent: no limit."""
    node_id: Token | None = None
    """Who did it."""
    owner: Token | None = None
    """Whose node that is."""
    error: TaskError | None = None
    tokens: Count = 0
    """Used, failed attempts included."""
    spent: RunResult = RunResult()
    """The same, as prompt and completion tokens, and the money; content is empty."""
    duration_s: Seconds = 0.0
    """From its admission to its end."""


class SplitPlan(CheckedMessage, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A parked parent and the graph of its subtasks; outputs are read from the children's records."""

    parent_id: Token
    state: Literal["running", "joining", "done"] = "running"
    subtasks: Annotated[tuple[Subtask, ...], Meta(max_length=1000)]
    envelope: Envelope
    """The parked parent."""
    error: TaskError | None = None
    """Why a plan that is done has failed; absent where the parent ended for another reason."""
    note: Note = ""
