"""What a result is worth, and what follows from it. Pure."""

from dataclasses import dataclass

from msgspec.structs import replace

from loom.bus.reward_bus import RewardBus
from loom.schemas.config import ClusterConfig
from loom.schemas.envelope import Best, Envelope, TaskRecord
from loom.schemas.learning import Reward, Signal
from loom.schemas.task import DEFAULT_TOKEN_YARDSTICK, RunResult, TaskError, TaskState

COUNTED = frozenset({"node_lost", "agent_failed", "rejected_result"})
"""Errors that are the node's fault: counted, excluding it, rewarded with 0."""
RETRIED = COUNTED | {"node_busy"}


@dataclass(frozen=True)
class End:
    """The task ends like this."""

    state: TaskState
    envelope: Envelope
    score: float | None = None
    below_threshold: bool = False


@dataclass(frozen=True)
class Back:
    """The task goes to another node."""

    envelope: Envelope


Decision = End | Back


def is_late(envelope: Envelope, record: TaskRecord) -> bool:
    """Return whether the envelope speaks of an attempt that a later one has replaced; a cancel is of the task."""
    cancelled = envelope.error is not None and envelope.error.code == "cancelled"
    return envelope.attempt < record.claim.attempt and not cancelled


def judge(envelope: Envelope) -> TaskError | None:
    """Return why the result is refused by rule, or None when it is good: then its score is 1."""
    result = envelope.result
    node_id = envelope.award.node_id if envelope.award else None
    if result is None or not result.content.strip():
        return TaskError(code="rejected_result", message="the result is empty", node_id=node_id)
    accept = envelope.ad.accept
    missing = [text for text in accept.contains if text not in result.content] if accept else []
    if missing:
        return TaskError(code="rejected_result", message=f"the result does not contain {missing[0]!r}", node_id=node_id)
    return None


def decide(envelope: Envelope, config: ClusterConfig, now: float) -> Decision:
    """Return whether the task ends, and how, or goes back to MATCH."""
    error = envelope.error or judge(envelope)
    if error is None:
        return End("succeeded", envelope, score=1.0)
    refused = keep_best(replace(envelope, error=error))
    if error.code not in RETRIED:
        if error.code == "no_bids" and envelope.failures:
            last = envelope.last_error
            return give_up(refused, last if last is not None and last.code in COUNTED else error)
        return End("cancelled" if error.code == "cancelled" else "failed", replace(refused, result=None))
    failures = envelope.failures + (error.code in COUNTED)
    if failures >= config.max_attempts or (now >= envelope.deadline and error.code in COUNTED):
        return give_up(replace(refused, failures=failures), error)
    if now >= envelope.deadline:
        late = TaskError(code="deadline_exceeded", message="the deadline passed before another attempt")
        return End("failed", replace(refused, result=None, error=late))
    excluded = refused.excluded
    pinned_elsewhere = error.code == "node_lost" and envelope.ad.node_id is not None  # its node may be on another host
    if error.code in COUNTED and envelope.award and envelope.award.node_id not in excluded and not pinned_elsewhere:
        excluded = (*excluded, envelope.award.node_id)
    return Back(
        replace(
            refused,
            result=None,
            error=None,
            last_error=error,
            failures=failures,
            excluded=excluded,
            attempt=envelope.attempt + 1,
        )
    )


def keep_best(envelope: Envelope) -> Envelope:
    """Return the envelope with its refused result kept, if there is one and none better."""
    result, award = envelope.result, envelope.award
    if result is None or award is None or not result.content.strip() or envelope.best is not None:
        return envelope
    return replace(envelope, best=Best(result=result, score=0.0, node_id=award.node_id, host_id=award.host_id))


def give_up(envelope: Envelope, error: TaskError) -> End:
    """Return the end of a task that nobody is left to try: with the best there was, else with the last error."""
    ended = replace(envelope, error=error, result=envelope.best.result if envelope.best else None)
    if envelope.best is not None:
        return End("succeeded", ended, score=envelope.best.score, below_threshold=True)
    return End("failed", ended)


def reward_for(envelope: Envelope, error: TaskError | None, ended_at: float) -> Reward | None:
    """Return the reward of the envelope's attempt; None when nobody earned one.

    A reward exists for a success and for the three failures that are the node's fault.
    """
    award = envelope.award
    if award is None or (error is not None and error.code not in COUNTED):
        return None
    result = (envelope.result if error is None else None) or RunResult()
    return Reward(
        reward_id=f"{envelope.task_id}:{envelope.attempt}:rules",
        task_id=envelope.task_id,
        attempt=envelope.attempt,
        node_id=award.node_id,
        slug=envelope.slug,
        score=0.0 if error else 1.0,
        signal=Signal() if error else _signal(envelope, result),
        tokens=result.tokens,
        seconds=result.duration_s,
        ended_at=ended_at,
        reason=error.code if error else "",
    )


def _signal(envelope: Envelope, result: RunResult) -> Signal:
    yardstick = envelope.ad.token_budget or DEFAULT_TOKEN_YARDSTICK
    return RewardBus().compute_signal(
        success=True, token_cost=result.tokens, token_budget=yardstick, error_count=result.tool_errors
    )


def implied_reward(record: TaskRecord) -> Reward | None:
    """Return the reward that an ended record implies; the same one whoever asks."""
    if record.ended_at is None:
        return None
    return reward_for(record.envelope, record.envelope.error, record.ended_at)
