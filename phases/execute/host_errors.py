"""How far EXECUTE believes the error code of a host: as far as its own facts go. Pure."""

from dataclasses import dataclass

from msgspec.structs import replace

from loom.schemas.task import TaskError

LATE_S = 1.0
"""A host's clock may be ahead of ours by so much."""
SPENT = 0.5
"""Share of its budget a run has to report as spent: an agent stops before the request that would go beyond it."""
MAX_MESSAGE_CHARS = 2000


@dataclass(frozen=True)
class Facts:
    """What EXECUTE knows of a run that has ended."""

    budget: int | None
    """Tokens that were left to the task when the run began; None: no limit."""
    tokens: int
    """Tokens the host reports."""
    left_s: float
    """Seconds to the task's deadline."""
    delegation_failed: bool
    """Whether a task this run has delegated ended without a result."""
    cancelled: bool
    """Whether the task has been cancelled."""


def believed(error: TaskError, facts: Facts) -> TaskError:
    """Return the error with its code, if the facts confirm it, else as `agent_failed`; the message is kept.

    `node_busy` needs no fact: a host that stops gives a run back, and a rejection has the same effect. `invalid_task`
    is the opinion of one node, which EVALUATE has another one confirm.
    """
    confirmed = {
        "node_busy": True,
        "invalid_task": True,
        "budget_exceeded": facts.budget is not None and facts.tokens >= SPENT * facts.budget,
        "deadline_exceeded": facts.left_s <= LATE_S,
        "subtask_failed": facts.delegation_failed,
        "cancelled": facts.cancelled,
    }
    code = error.code if confirmed.get(error.code, False) else "agent_failed"
    return replace(error, code=code, message=error.message[:MAX_MESSAGE_CHARS])
