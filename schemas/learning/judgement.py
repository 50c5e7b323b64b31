"""Rewards that people give."""

from loom.schemas.errors import InvalidTask
from loom.schemas.identity import LOCAL_OWNER, PERSON
from loom.schemas.learning.reward import Reward
from loom.schemas.record import REJECTED, TaskRecord


def judgement(record: TaskRecord, score: float, reason: str, source: str = PERSON) -> Reward:
    """Return a person's reward for the node that finished a task.

    Args:
        record: Record of a task that has ended.
        score: From 0 (useless) to 1 (perfect).
        reason: Explanation for readers; truncated to 500 characters.
        source: Name of the person: `bus.identity.source`.

    Raises:
        InvalidTask: No node has finished the task, or the score is out of range.
    """
    owner, node_id, attempt = _judged_attempt(record)
    if not record.ended or node_id is None:
        raise InvalidTask("only a task that a node has finished can be judged", task_id=record.task_id)
    if not _is_share(score):
        why = f"score must be from 0 to 1, not {_shown(score)}: 0 is useless, 1 perfect"
        raise InvalidTask(why, field="score", task_id=record.task_id)
    return Reward(
        reward_id=f"{record.task_id}:{attempt}:{source}",
        task_id=record.task_id,
        attempt=attempt,
        source=source,
        node_id=node_id,
        owner=owner,
        domain_token=record.envelope.domain_token,
        score=score,
        ended_at=record.ended_at or record.admitted_at,
        reason=reason[:500],
        labels=record.envelope.ad.labels,
    )


def _judged_attempt(record: TaskRecord) -> tuple[str, str | None, int]:
    """Return owner, node and attempt of the result that a person sees: the best rejected one if none was accepted."""
    envelope, best = record.envelope, record.envelope.best_rejected
    if best is None or not (record.rejected or record.below_threshold):
        result = record.to_result()
        return result.owner or LOCAL_OWNER, result.node_id, envelope.attempt
    node = (best.owner, best.node_id)
    rejected = [
        failed.attempt
        for failed in envelope.failed_attempts
        if (failed.owner, failed.node_id) == node and failed.code == REJECTED
    ]
    return *node, rejected[-1] if rejected else envelope.attempt


def _is_share(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1


def _shown(value: object) -> str:
    return f"{value:g}" if isinstance(value, int | float) else f"a {type(value).__name__}"
