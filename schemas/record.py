"""The record of a task, and the results derived from it."""

from typing import Annotated

from msgspec import Meta
from msgspec.structs import replace

from loom.schemas.base import MAX_SECONDS, Message, Name, Timestamp, Unit, cut_note
from loom.schemas.envelope import Claim, Envelope, ReplySubjects
from loom.schemas.task import RunResult, TaskError, TaskResult, TaskState, TaskUsage, ad_digest
from loom.schemas.tokens import Token

MAX_DELEGATED = 256
"""Most delegated tasks of a record: the newest."""
REJECTED = "rejected_result"
ENDED: frozenset[str] = frozenset({"succeeded", "failed", "cancelled"})
"""Terminal states."""


class TaskRecord(Message, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """State of a task, stored from admission to 72 hours after its end."""

    task_id: Token
    state: TaskState
    submission: Name = ""
    reply_to: ReplySubjects = ()
    envelope: Envelope
    """The envelope at admission, later at the newest claim of an attempt, and finally at the end."""
    claim: Claim = Claim()
    admitted_at: Timestamp
    ended_at: Timestamp | None = None
    score: Unit | None = None
    """Score of the result by a model."""
    below_threshold: bool = False
    """Whether the task succeeded with the best refused answer, which the ad's `best_effort` permits."""
    rejected: bool = False
    """Whether attempts or bidders ran out after an answer had been refused."""
    delegated: Annotated[tuple[Token, ...], Meta(max_length=MAX_DELEGATED)] = ()
    """Ids of delegated tasks, oldest first; at most the newest 256."""

    def __repr__(self) -> str:
        return f"<TaskRecord {self.task_id}, {self.state}>"

    @property
    def ended(self) -> bool:
        """Whether the state is terminal."""
        return self.state in ENDED

    @property
    def ad_digest(self) -> str:
        """Digest that distinguishes the ad from others with the same id; empty if the ad could not be decoded."""
        error = self.envelope.error
        unread = not self.submission or (error is not None and error.code == "dead_letter")
        return "" if unread else ad_digest(self.envelope.ad)

    @property
    def lasted_s(self) -> float:
        """Seconds from admission to end, at most the longest duration of a message; 0 while the task runs."""
        return min(MAX_SECONDS, max(0.0, (self.ended_at or self.admitted_at) - self.admitted_at))

    @property
    def error(self) -> TaskError | None:
        """The error that submitters receive, with the best refused answer; absent for a success.

        `envelope.error` is the error of the last attempt, from which the reward of its node is computed.
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
        """Tokens and cost of all attempts; content is empty."""
        env = self.envelope
        if env.result is None or self.below_threshold:  # the tokens of a refused result are in `spent`
            return env.spent
        return env.spent.usage_with(env.result)

    def to_result(self) -> TaskResult:
        """Return the result of the task; for a running task, its present state."""
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
    """The reply to a `StatusQuery` with `full`: the result and the record."""

    record: TaskRecord | None = None
    """Without reply subjects; absent while the task waits for admission."""
