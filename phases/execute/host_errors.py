"""Which error codes of a host EXECUTE accepts: those that its own facts confirm. Pure."""

from dataclasses import dataclass

from msgspec.structs import replace

from loom.schemas.task import TaskError

CLOCK_SKEW_S = 1.0
"""Seconds by which the clock of a host may be ahead of this one."""
USED_SHARE = 0.5
"""Share of its budget that a run must report as used: an agent stops before the request that would exceed it."""
MAX_MESSAGE_CHARS = 2000


@dataclass(frozen=True)
class RunFacts:
    """Facts that EXECUTE has about a run that has ended."""

    budget: int | None
    """Tokens that the task had left when the run began; None: unlimited."""
    tokens: int
    """Tokens that the host reports as used."""
    left_s: float
    """Seconds until the task's deadline."""
    delegation_failed: bool
    """Whether a task that this run has delegated ended without a result."""
    cancelled: bool
    """Whether the task was cancelled."""


def confirmed_error(error: TaskError, facts: RunFacts) -> TaskError:
    """Return the error with its code if the facts confirm it, else as `agent_failed`; the message is kept.

    `node_busy` needs no confirmation: a host that stops gives a run back, and a rejection has the same effect.
    `invalid_task` is the opinion of one node, which EVALUATE has another node confirm.
    """
    confirmed = {
        "node_busy": True,
        "invalid_task": True,
        "budget_exceeded": facts.budget is not None and facts.tokens >= USED_SHARE * facts.budget,
        "deadline_exceeded": facts.left_s <= CLOCK_SKEW_S,
        "subtask_failed": facts.delegation_failed,
        "cancelled": facts.cancelled,
    }
    code = error.code if confirmed.get(error.code, False) else "agent_failed"
    return replace(error, code=code, message=error.message[:MAX_MESSAGE_CHARS])
