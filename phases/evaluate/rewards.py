"""The rewards that results, failures and ended records imply. Pure."""

from loom.phases.evaluate.retry_policy import COUNTED, INVALID
from loom.schemas.envelope import Envelope
from loom.schemas.identity import JUDGE, RULES
from loom.schemas.learning.reward import Reward, Signal, success_signal
from loom.schemas.record import REJECTED, TaskRecord
from loom.schemas.task import RunResult, TaskError


def reward_for(envelope: Envelope, error: TaskError | None, ended_at: float) -> Reward | None:
    """Return the reward of the envelope's attempt; None if it earns none.

    A success earns one, and so do the three failures that a node causes. A run that the deadline has ended earns one
    as well: otherwise an agent that hangs would never lose its share. A success whose rubric was not checked earns
    none.

    Args:
        envelope: The task's, with its award.
        error: The attempt's error; None: a success.
        ended_at: When the attempt ended, server time, seconds since the epoch.
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
        signal=Signal() if error else success_signal(envelope.ad, result.tokens, result.tool_errors),
        tokens=result.tokens,
        seconds=result.duration_s,
        ended_at=ended_at,
        estimated=None if error else _estimated(envelope),
        reason=error.code if error else "",
        labels=envelope.ad.labels,
    )


def is_unchecked(envelope: Envelope) -> bool:
    """Return whether the ad has a rubric that no model could check."""
    accept = envelope.ad.accept
    return bool(envelope.unjudged) and envelope.opinion is None and accept is not None and accept.rubric is not None


def ran_too_long(error: TaskError) -> bool:
    """Return whether a node was running the task when its deadline passed."""
    return error.code == "deadline_exceeded" and error.node_id is not None


def _score(envelope: Envelope, error: TaskError | None) -> float:
    """Return the score of a reward: the model's, from 0 to 1, or 1 or 0 by the rules."""
    if envelope.opinion is not None and _has_opinion(envelope, error):
        return envelope.opinion.score
    return 0.0 if error else 1.0


def _has_opinion(envelope: Envelope, error: TaskError | None) -> bool:
    """Return whether a model has judged the rewarded result."""
    return envelope.opinion is not None and (error is None or error.code == REJECTED)


def _estimated(envelope: Envelope) -> float | None:
    """Return SENSE's estimate of the complexity; None without one, or if other nodes have done parts of the task."""
    return envelope.spec.estimated if envelope.spec and not envelope.inputs else None


def implied_rewards(record: TaskRecord) -> tuple[Reward, ...]:
    """Return the rewards that an ended record implies, the last attempt's first; equal in every replica."""
    if record.ended_at is None:
        return ()
    last = reward_for(record.envelope, record.envelope.error, record.ended_at)
    return ((last,) if last is not None else ()) + refutation_rewards(record, record.ended_at)


def refutation_rewards(record: TaskRecord, ended_at: float) -> tuple[Reward, ...]:
    """Return a reward of 0 for each node that called the ad invalid, if another node has succeeded with it."""
    envelope = record.envelope
    if record.state != "succeeded" or record.below_threshold or is_unchecked(envelope):
        return ()
    return tuple(
        Reward(
            reward_id=f"{envelope.task_id}:{failed.attempt}:{RULES}",
            task_id=envelope.task_id,
            attempt=failed.attempt,
            source=RULES,
            node_id=failed.node_id,
            owner=failed.owner,
            domain_token=envelope.domain_token,
            score=0.0,
            signal=Signal(),
            tokens=failed.tokens,
            seconds=failed.duration_s,
            ended_at=ended_at,
            reason=INVALID,
            labels=envelope.ad.labels,
        )
        for failed in envelope.failed_attempts
        if failed.code == INVALID
    )
