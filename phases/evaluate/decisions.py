"""What a result is worth, and what follows from it. Pure."""

from dataclasses import dataclass

from msgspec.structs import replace

from loom.phases.shared.acceptance import plain_violation
from loom.phases.shared.check_pool import Violation
from loom.phases.shared.division import may_divide
from loom.schemas.config import ClusterConfig
from loom.schemas.envelope import (
    IN_HAND_S,
    MAX_CAUSE_CHARS,
    MAX_FAILED_ATTEMPTS,
    REJECTED,
    Envelope,
    FailedAttempt,
    RejectedResult,
    TaskRecord,
)
from loom.schemas.identity import JUDGE, RULES
from loom.schemas.learning import Reward, Signal, success_signal
from loom.schemas.notices import SubtaskEnded
from loom.schemas.task import Accept, RunResult, TaskError, TaskState

COUNTED = frozenset({"node_lost", "agent_failed", "rejected_result"})
"""Errors that are the node's fault: counted, excluding it, rewarded with 0."""
INVALID = "invalid_task"
"""Of a node: its opinion of the ad, which another node has to confirm. Without a node: a rule the ad breaks."""
RETRIED = COUNTED | {"node_busy"}
RETRY_S = 0.1
"""Pause after the first failure of a node; twice that after each further one."""
RETRY_MAX_S = 5.0


@dataclass(frozen=True)
class Finish:
    """The task ends like this."""

    state: TaskState
    envelope: Envelope
    score: float | None = None
    below_threshold: bool = False
    rejected: bool = False
    """Whether attempts or bidders ran out after an answer had been refused."""


@dataclass(frozen=True)
class Retry:
    """The task goes to another node, after at least `delay_s`."""

    envelope: Envelope
    delay_s: float = 0.0


Decision = Finish | Retry


def is_late(envelope: Envelope, record: TaskRecord) -> bool:
    """Return whether the envelope speaks of an attempt that a later one has replaced; a cancel is of the task."""
    cancelled = envelope.error is not None and envelope.error.code == "cancelled"
    return envelope.attempt < record.claim.attempt and not cancelled


def judge(envelope: Envelope, violation: Violation | None = None) -> TaskError | None:
    """Return why the result is refused, by rule or by the opinion on the envelope; None when it is good.

    Args:
        violation: The outcome of the ad's pattern and JSON Schema.
    """
    content = envelope.result.content if envelope.result else ""
    why = plain_violation(content, envelope.ad.accept)
    if why is None and violation is not None:
        if violation.error.code != "rejected_result":
            return violation.error
        why = violation.error.message
    opinion, least = envelope.opinion, (envelope.ad.accept or Accept()).threshold
    if why is None and opinion is not None and opinion.score < least:
        why = f"judged {opinion.score:.2f}, at least {least:.2f} is asked for: {opinion.reason}"
    if why is None:
        return None
    node_id = envelope.award.node_id if envelope.award else None
    return TaskError(code=REJECTED, message=why[:2000], node_id=node_id)


def unchecked(why: str) -> Violation:
    """Return the outcome of a check that could not be made before the deadline: the task fails, and no node did."""
    message = f"the deadline passed before the result could be checked: {why}"
    return Violation(TaskError(code="deadline_exceeded", message=message[:2000]), decided=False)


def decide(envelope: Envelope, config: ClusterConfig, now: float, violation: Violation | None = None) -> Decision:
    """Return whether the task ends, and how, or goes back to MATCH.

    Args:
        violation: The outcome of the ad's pattern and JSON Schema.
    """
    error = envelope.error or judge(envelope, violation)
    if error is None:
        return Finish("succeeded", envelope, score=score_of(envelope))
    refused = replace(envelope, error=error)
    if error.code == REJECTED and (violation is None or violation.decided):
        refused = keep_best(refused, error.message)
    if error.code == "no_bids" and envelope.failures:
        return wait_for_rested(envelope, now) or finish_with_best(refused, last_failure(envelope) or error)
    by_node = error.code in COUNTED or is_opinion(envelope, error)
    refused = count(refused, error, now) if by_node else refused
    if is_final(envelope, error):
        out_of_time = envelope.error is not None and error.code == "deadline_exceeded"
        return (best_effort(refused, error) if out_of_time else None) or fail(refused, error)
    final = final_decision(refused, error, config, now)
    if final is not None:
        return final
    again = replace(
        refused.without_result(),
        opinion=None,
        unjudged="",
        error=None,
        last_error=error,
        attempt=envelope.attempt + 1,
    )
    if error.code == "node_busy":
        again = replace(again, busy_retries=again.busy_retries + 1)
        return Retry(again, again.busy_pause_s if again.busy_pause_s > IN_HAND_S else 0.0)
    return Retry(again, retry_s(error, refused.failures))


def score_of(envelope: Envelope) -> float | None:
    """Return the score of a success: the judge's, else that of the rules; None where a judge was to be asked."""
    if envelope.opinion is not None:
        return envelope.opinion.score
    return None if envelope.unjudged else 1.0


def is_opinion(envelope: Envelope, error: TaskError) -> bool:
    """Return whether the error is a node's word that the ad cannot be worked on."""
    return error.code == INVALID and error.node_id is not None and envelope.award is not None


def is_final(envelope: Envelope, error: TaskError) -> bool:
    """Return whether an error ends the task whatever attempts are left.

    A node's word that the ad is invalid does when another node has given the same, or there is no other to ask.
    """
    if error.code in RETRIED:
        return False
    if not is_opinion(envelope, error) or envelope.ad.node_id is not None:
        return True
    accused = envelope.award.node if envelope.award else ""
    return any(tried.code == INVALID and tried.node != accused for tried in envelope.failed_attempts)


def fail(envelope: Envelope, error: TaskError) -> Finish:
    """Return the end of a task with that error, and with what there is for a budget that is spent."""
    ended = replace(envelope, error=error)
    ended = ended if keeps_result(error) else ended.without_result()
    return Finish("cancelled" if error.code == "cancelled" else "failed", ended)


def keeps_result(error: TaskError) -> bool:
    """Return whether a failed task answers its result besides the error: what there is for a budget that is spent."""
    return error.code == "budget_exceeded"


def final_decision(envelope: Envelope, error: TaskError, config: ClusterConfig, now: float) -> Finish | None:
    """Return the end of a task that may not be tried again: too often, too late, or nothing left to spend."""
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


def count(envelope: Envelope, error: TaskError, now: float) -> Envelope:
    """Return the envelope with a failure that is its node's fault: counted, remembered, and the node excluded."""
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
    elsewhere = error.code == "node_lost" and envelope.ad.node_id is not None  # its node may be on another host
    if elsewhere or award.node in envelope.excluded:
        return envelope
    return replace(envelope, excluded=(*envelope.excluded, award.node))


def retry_s(error: TaskError, failures: int) -> float:
    """Return the least pause before the next attempt: none after a refused result or a full node."""
    return min(RETRY_MAX_S, RETRY_S * 2.0 ** (failures - 1)) if error.code in {"node_lost", "agent_failed"} else 0.0


def wait_for_rested(envelope: Envelope, now: float) -> Retry | None:
    """Return how to go on when only failed nodes are left: with the first of those that asked for a rest.

    None when there is none, or the deadline comes before it.
    """
    rested = min(envelope.retry_at, key=lambda node: envelope.retry_at[node], default=None)
    if rested is None or envelope.retry_at[rested] >= envelope.deadline:
        return None
    again = replace(
        envelope.without_result(),
        error=None,
        last_error=last_failure(envelope),
        excluded=tuple(node for node in envelope.excluded if node != rested),
        retry_at={node: at for node, at in envelope.retry_at.items() if node != rested},
        attempt=envelope.attempt + 1,
    )
    return Retry(again, max(0.0, envelope.retry_at[rested] - now))


def last_failure(envelope: Envelope) -> TaskError | None:
    """Return the error of the last attempt that was its node's fault."""
    last = envelope.last_error
    if last is not None and (last.code in COUNTED or (last.code == INVALID and last.node_id is not None)):
        return last
    if not envelope.failed_attempts:
        return None
    failed = envelope.failed_attempts[-1]
    return TaskError(code=failed.code, message=failed.message, node_id=failed.node_id)


def keep_best(envelope: Envelope, reason: str) -> Envelope:
    """Return the envelope with its refused result kept, if there is one and none as good.

    Args:
        reason: Why it is refused.
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
    """Return the end of a task that has no attempts or bidders left: with its last attempt's own error.

    The record's `rejected` and the envelope's `best` make a `rejected_result` of it for its submitter. An ad that asks
    for the best there was succeeds with that.
    """
    if envelope.best_rejected is None:
        return fail(envelope, error)
    ended = replace(envelope.without_result(), error=error)
    return best_effort(envelope, error) or Finish("failed", ended, rejected=True)


def best_effort(envelope: Envelope, error: TaskError) -> Finish | None:
    """Return the success with the best refused answer; None where the ad does not ask for it, or there is none."""
    accept, best = envelope.ad.accept, envelope.best_rejected
    if best is None or accept is None or not accept.best_effort:
        return None
    ended = replace(envelope.without_result(), error=error, result=best.result)
    return Finish("succeeded", ended, score=best.score, below_threshold=True)


def reward_for(envelope: Envelope, error: TaskError | None, ended_at: float) -> Reward | None:
    """Return the reward of the envelope's attempt; None when nobody earned one.

    A reward exists for a success, for the three failures that are the node's fault, and for a run that the deadline
    has ended: else an agent that hangs would never lose its share. A success whose rubric was not checked earns none.
    """
    award = envelope.award
    if award is None or (error is not None and error.code not in COUNTED and not ran_too_long(error)):
        return None
    if error is None and is_unchecked(envelope):
        return None
    result = (envelope.result if error is None else None) or RunResult()
    source = JUDGE if _has_opinion(envelope, error) else RULES
    return Reward(
        reward_id=f"{envelope.task_id}:{envelope.attempt}:{source}",
        task_id=envelope.task_id,
        attempt=envelope.attempt,
        source=source,
        node_id=award.node_id,
        owner=award.owner,
        domain_token=envelope.domain_token,
        score=_score(envelope, error),
        signal=Signal() if error else _signal(envelope, result),
        tokens=result.tokens,
        seconds=result.duration_s,
        ended_at=ended_at,
        estimated=None if error else _guess(envelope),
        reason=error.code if error else "",
        labels=envelope.ad.labels,
    )


def is_unchecked(envelope: Envelope) -> bool:
    """Return whether the ad's rubric was to be checked, and no judge could be asked."""
    accept = envelope.ad.accept
    return bool(envelope.unjudged) and envelope.opinion is None and accept is not None and accept.rubric is not None


def ran_too_long(error: TaskError) -> bool:
    """Return whether a node had the task in hand when its deadline came."""
    return error.code == "deadline_exceeded" and error.node_id is not None


def _score(envelope: Envelope, error: TaskError | None) -> float:
    """1 or 0 by the rules; anything between where a model was asked."""
    if envelope.opinion is not None and _has_opinion(envelope, error):
        return envelope.opinion.score
    return 0.0 if error else 1.0


def _has_opinion(envelope: Envelope, error: TaskError | None) -> bool:
    """Return whether a model has judged the result that is rewarded."""
    return envelope.opinion is not None and (error is None or error.code == REJECTED)


def _guess(envelope: Envelope) -> float | None:
    """How hard SENSE took the task to be; None when it did not say, or the run had parts done by others."""
    return envelope.spec.estimated if envelope.spec and not envelope.inputs else None


def _signal(envelope: Envelope, result: RunResult) -> Signal:
    return success_signal(envelope.ad, result.tokens, result.tool_errors)


def implied_rewards(record: TaskRecord) -> tuple[Reward, ...]:
    """Return the rewards that an ended record implies, the last attempt's first; the same ones in every replica."""
    if record.ended_at is None:
        return ()
    last = reward_for(record.envelope, record.envelope.error, record.ended_at)
    return ((last,) if last is not None else ()) + refuted(record, record.ended_at)


def refuted(record: TaskRecord, ended_at: float) -> tuple[Reward, ...]:
    """Return a reward of 0 for each node that called the ad invalid, where another one has succeeded with it."""
    envelope = record.envelope
    if record.state != "succeeded" or record.below_threshold or is_unchecked(envelope):
        return ()
    return tuple(
        Reward(
            reward_id=f"{envelope.task_id}:{tried.attempt}:{RULES}",
            task_id=envelope.task_id,
            attempt=tried.attempt,
            source=RULES,
            node_id=tried.node_id,
            owner=tried.owner,
            domain_token=envelope.domain_token,
            score=0.0,
            signal=Signal(),
            tokens=tried.tokens,
            seconds=tried.duration_s,
            ended_at=ended_at,
            reason=INVALID,
            labels=envelope.ad.labels,
        )
        for tried in envelope.failed_attempts
        if tried.code == INVALID
    )


def notice_of(record: TaskRecord) -> SubtaskEnded | None:
    """Return the notice for SCALE that a subtask of a plan has ended; None for any other task."""
    split = record.envelope.split
    if split is None or split.subtask is None:
        return None
    return SubtaskEnded(task_id=split.parent, child_id=record.task_id, subtask=split.subtask)


def may_be_divided(record: TaskRecord) -> bool:
    """Return whether a plan may be left over: one was put together, or the task ended before or beside that."""
    return bool(record.envelope.inputs) or record.state != "succeeded" or may_divide(record.envelope)
