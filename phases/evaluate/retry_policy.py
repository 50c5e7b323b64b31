"""Whether a result is accepted, and how its task ends or is retried. Pure."""

from dataclasses import dataclass

from msgspec.structs import replace

from loom.phases.shared.acceptance import plain_violation
from loom.phases.shared.check_pool import Violation
from loom.phases.shared.scale_rule import may_divide
from loom.schemas.config import ClusterConfig
from loom.schemas.envelope import (
    IN_HAND_S,
    MAX_CAUSE_CHARS,
    MAX_FAILED_ATTEMPTS,
    Envelope,
    FailedAttempt,
    RejectedResult,
)
from loom.schemas.notices import SubtaskEnded
from loom.schemas.record import REJECTED, TaskRecord
from loom.schemas.task import Accept, RunResult, TaskError, TaskState

COUNTED = frozenset({"node_lost", "agent_failed", "rejected_result"})
"""Errors caused by the node: each counts as a failure, excludes the node, and earns it a reward of 0."""
INVALID = "invalid_task"
"""With a node: its opinion of the ad, which another node has to confirm. Without one: the ad breaks a rule."""
RETRIED = COUNTED | {"node_busy"}
RETRY_DELAY_S = 0.1
"""Pause after the first failure of a node, in seconds; doubled after each further one."""
MAX_RETRY_DELAY_S = 5.0


@dataclass(frozen=True)
class Finish:
    """The task ends in `state`, with this envelope in its record."""

    state: TaskState
    envelope: Envelope
    score: float | None = None
    below_threshold: bool = False
    rejected: bool = False
    """Whether attempts or bidders ran out after an answer had been rejected."""


@dataclass(frozen=True)
class Retry:
    """The task goes to another node, after at least `delay_s`."""

    envelope: Envelope
    delay_s: float = 0.0


Decision = Finish | Retry


def judge(envelope: Envelope, violation: Violation | None = None) -> TaskError | None:
    """Return why the result is rejected, by a rule or by the model's opinion; None if it is accepted.

    Args:
        envelope: The task's, with its result.
        violation: Outcome of the check of the ad's pattern and JSON Schema.
    """
    content = envelope.result.content if envelope.result else ""
    why = plain_violation(content, envelope.ad.accept)
    if why is None and violation is not None:
        if violation.error.code != "rejected_result":
            return violation.error
        why = violation.error.message
    opinion, threshold = envelope.opinion, (envelope.ad.accept or Accept()).threshold
    if why is None and opinion is not None and opinion.score < threshold:
        why = f"judged {opinion.score:.2f}, at least {threshold:.2f} is asked for: {opinion.reason}"
    if why is None:
        return None
    node_id = envelope.award.node_id if envelope.award else None
    return TaskError(code=REJECTED, message=why[:2000], node_id=node_id)


def unchecked(why: str) -> Violation:
    """Return the outcome of a check that could not be made before the deadline: the task fails through no node."""
    message = f"the deadline passed before the result could be checked: {why}"
    return Violation(TaskError(code="deadline_exceeded", message=message[:2000]), decided=False)


def decide(envelope: Envelope, config: ClusterConfig, now: float, violation: Violation | None = None) -> Decision:
    """Return how the task ends, or how it is retried.

    Args:
        envelope: The task's, with a result or an error.
        config: Limits of retries.
        now: Server time, seconds since the epoch.
        violation: Outcome of the check of the ad's pattern and JSON Schema.
    """
    error = envelope.error or judge(envelope, violation)
    if error is None:
        return Finish("succeeded", envelope, score=score_of(envelope))
    failed = replace(envelope, error=error)
    if error.code == REJECTED and (violation is None or violation.decided):
        failed = keep_best(failed, error.message)
    if error.code == "no_bids" and envelope.failures:
        return retry_rested(envelope, now) or finish_with_best(failed, last_failure(envelope) or error)
    by_node = error.code in COUNTED or is_opinion(envelope, error)
    failed = count_failure(failed, error, now) if by_node else failed
    if is_final(envelope, error):
        out_of_time = envelope.error is not None and error.code == "deadline_exceeded"
        return (best_effort(failed, error) if out_of_time else None) or fail(failed, error)
    final = final_decision(failed, error, config, now)
    if final is not None:
        return final
    next_attempt = replace(
        failed.without_result(),
        opinion=None,
        unjudged="",
        error=None,
        last_error=error,
        attempt=envelope.attempt + 1,
    )
    if error.code == "node_busy":
        next_attempt = replace(next_attempt, busy_retries=next_attempt.busy_retries + 1)
        pause_s = next_attempt.busy_pause_s
        return Retry(next_attempt, pause_s if pause_s > IN_HAND_S else 0.0)
    return Retry(next_attempt, retry_delay_s(error, failed.failures))


def score_of(envelope: Envelope) -> float | None:
    """Return a success's score: the model's, else 1 by the rules; None if a model should have judged and did not."""
    if envelope.opinion is not None:
        return envelope.opinion.score
    return None if envelope.unjudged else 1.0


def is_opinion(envelope: Envelope, error: TaskError) -> bool:
    """Return whether the error is the opinion of a node that the ad is invalid."""
    return error.code == INVALID and error.node_id is not None and envelope.award is not None


def is_final(envelope: Envelope, error: TaskError) -> bool:
    """Return whether an error ends the task although attempts are left.

    A node's opinion that the ad is invalid does so if another node agrees, or if the ad is pinned to the node.
    """
    if error.code in RETRIED:
        return False
    if not is_opinion(envelope, error) or envelope.ad.node_id is not None:
        return True
    node = envelope.award.node if envelope.award else ""
    return any(failed.code == INVALID and failed.node != node for failed in envelope.failed_attempts)


def fail(envelope: Envelope, error: TaskError) -> Finish:
    """Return the end of a task with that error; a task whose budget is used up keeps its partial result."""
    ended = replace(envelope, error=error)
    ended = ended if has_partial_result(error) else ended.without_result()
    return Finish("cancelled" if error.code == "cancelled" else "failed", ended)


def has_partial_result(error: TaskError) -> bool:
    """Return whether a failed task keeps its result next to the error: the partial result of a used-up budget."""
    return error.code == "budget_exceeded"


def final_decision(envelope: Envelope, error: TaskError, config: ClusterConfig, now: float) -> Finish | None:
    """Return the end of a task without attempts, time or tokens left for a retry; None if it may be retried."""
    late = now >= envelope.deadline
    if envelope.failures >= config.max_attempts or (late and error.code != "node_busy"):
        return finish_with_best(envelope, error)
    if late:
        too_late = TaskError(code="deadline_exceeded", message="the deadline passed before another attempt")
        return best_effort(envelope, too_late) or fail(envelope, too_late)
    if envelope.budget is not None and envelope.budget <= 0:
        if envelope.best_rejected is not None:
            return finish_with_best(envelope, error)
        why = f"no tokens are left for another attempt, after {error.code}: {error.message}"
        return fail(envelope, TaskError(code="budget_exceeded", message=why[:2000]))
    return None


def count_failure(envelope: Envelope, error: TaskError, now: float) -> Envelope:
    """Return the envelope with one more failure of its node: counted, listed, and the node excluded."""
    envelope = replace(envelope, failures=envelope.failures + 1)
    award, result = envelope.award, envelope.result or RunResult()
    if award is None:
        return envelope
    failed = FailedAttempt(
        attempt=envelope.attempt,
        node_id=award.node_id,
        owner=award.owner,
        host_id=award.host_id,
        code=error.code,
        message=error.message[:MAX_CAUSE_CHARS],
        tokens=result.tokens,
        duration_s=result.duration_s,
    )
    envelope = replace(envelope, failed_attempts=(*envelope.failed_attempts, failed)[-MAX_FAILED_ATTEMPTS:])
    if error.retry_after_s is not None:
        envelope = replace(envelope, retry_at={**envelope.retry_at, award.node: now + error.retry_after_s})
    may_have_moved = error.code == "node_lost" and envelope.ad.node_id is not None  # the node may be on another host
    if may_have_moved or award.node in envelope.excluded:
        return envelope
    return replace(envelope, excluded=(*envelope.excluded, award.node))


def retry_delay_s(error: TaskError, failures: int) -> float:
    """Return the least pause before the next attempt, in seconds; 0 after a rejected result or a busy node."""
    if error.code not in {"node_lost", "agent_failed"}:
        return 0.0
    return min(MAX_RETRY_DELAY_S, RETRY_DELAY_S * 2.0 ** (failures - 1))


def retry_rested(envelope: Envelope, now: float) -> Retry | None:
    """When every candidate has failed, retry the node whose `retry_at` comes first.

    Returns:
        None if no node has one, or if the first one is not before the deadline.
    """
    node = min(envelope.retry_at, key=lambda name: envelope.retry_at[name], default=None)
    if node is None or envelope.retry_at[node] >= envelope.deadline:
        return None
    next_attempt = replace(
        envelope.without_result(),
        error=None,
        last_error=last_failure(envelope),
        excluded=tuple(name for name in envelope.excluded if name != node),
        retry_at={name: at for name, at in envelope.retry_at.items() if name != node},
        attempt=envelope.attempt + 1,
    )
    return Retry(next_attempt, max(0.0, envelope.retry_at[node] - now))


def last_failure(envelope: Envelope) -> TaskError | None:
    """Return the error of the last attempt that its node failed."""
    last = envelope.last_error
    if last is not None and (last.code in COUNTED or (last.code == INVALID and last.node_id is not None)):
        return last
    if not envelope.failed_attempts:
        return None
    failed = envelope.failed_attempts[-1]
    return TaskError(code=failed.code, message=failed.message, node_id=failed.node_id)


def keep_best(envelope: Envelope, reason: str) -> Envelope:
    """Return the envelope with its rejected result kept as the best one, unless an earlier one scored at least as well.

    Args:
        envelope: The task's, with a rejected result.
        reason: Why the result is rejected.
    """
    result, award = envelope.result, envelope.award
    if result is None or award is None or not result.content.strip():
        return envelope
    score = envelope.opinion.score if envelope.opinion else 0.0
    if envelope.best_rejected is not None and envelope.best_rejected.score >= score:
        return envelope
    best = RejectedResult(
        result=result,
        score=score,
        reason=reason,
        node_id=award.node_id,
        owner=award.owner,
        host_id=award.host_id,
    )
    return replace(envelope, best_rejected=best)


def finish_with_best(envelope: Envelope, error: TaskError) -> Finish:
    """Return the end of a task without attempts or bidders left: with the error of its last attempt.

    The record's `rejected` and the envelope's `best_rejected` make a `rejected_result` of it for the submitter. An ad
    with `best_effort` succeeds with the best rejected answer.
    """
    if envelope.best_rejected is None:
        return fail(envelope, error)
    ended = replace(envelope.without_result(), error=error)
    return best_effort(envelope, error) or Finish("failed", ended, rejected=True)


def best_effort(envelope: Envelope, error: TaskError) -> Finish | None:
    """Return the success with the best rejected answer; None without one, or without `best_effort` in the ad."""
    accept, best = envelope.ad.accept, envelope.best_rejected
    if best is None or accept is None or not accept.best_effort:
        return None
    ended = replace(envelope.without_result(), error=error, result=best.result)
    return Finish("succeeded", ended, score=best.score, below_threshold=True)


def notice_of(record: TaskRecord) -> SubtaskEnded | None:
    """Return the notice for SCALE that a subtask of a plan has ended; None for any other task."""
    split = record.envelope.split
    if split is None or split.subtask is None:
        return None
    return SubtaskEnded(task_id=split.parent, child_id=record.task_id, subtask=split.subtask)


def may_be_divided(record: TaskRecord) -> bool:
    """Return whether the task may have a plan: its parts were joined, or it ended before or without that."""
    return bool(record.envelope.inputs) or record.state != "succeeded" or may_divide(record.envelope)
