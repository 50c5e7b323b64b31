"""What can go wrong, with the code that says so in every language.

LoomError
  InvalidTask         invalid_task        the ad breaks a rule                      field
  NoBids              no_bids             nobody could or would take the task
  DeadlineExceeded    deadline_exceeded   timeout_s ran out
  Cancelled           cancelled           someone cancelled the task
  NodeLost            node_lost           the node fell silent                      node_id
  AgentFailed         agent_failed        the agent raised or gave up               node_id
  RejectedResult      rejected_result     no answer met what the task accepts       best_rejected
  BudgetExceeded      budget_exceeded     the task's hard token limit is spent
  InvalidPlan         invalid_plan        the subtask graph breaks a rule
  Overloaded          overloaded          the intake is full
  UnknownTask         unknown_task        no task of that id is known
  NodeBusy            node_busy           the node has neither slot nor backlog room
  SubtaskFailed       subtask_failed      a subtask ended without a result
  DeadLettered        dead_letter         a message could not be handled
  BusUnavailable      bus_unavailable     no server or no phases answer             url
"""

from typing import Any, ClassVar


class LoomError(Exception):
    """Something went wrong; `code` names it stably and the message says what to do next.

    Args:
        message: One sentence for a person, without secrets.
        facts: Fields a program may branch on, kept as attributes: `task_id`, `field`, `node_id`, …
    """

    code: ClassVar[str] = "unknown"

    def __init__(self, message: str, **facts: Any) -> None:
        super().__init__(message)
        self.message = message
        self.facts = facts

    def __getattr__(self, name: str) -> Any:
        # Only called for what is not set: a fact, or None for a fact this error does not have.
        if name in _FACTS:
            return self.__dict__.get("facts", {}).get(name)
        raise AttributeError(name)


_FACTS = frozenset({"task_id", "field", "node_id", "url", "retry_after_s", "partial", "spent", "best_rejected"})


class InvalidTask(LoomError, ValueError):
    """The ad breaks a rule; `field` names the part."""

    code = "invalid_task"


class NoBids(LoomError):
    """Nobody could or would take the task."""

    code = "no_bids"


class DeadlineExceeded(LoomError):
    """The task's `timeout_s` ran out."""

    code = "deadline_exceeded"


class Cancelled(LoomError):
    """Someone cancelled the task."""

    code = "cancelled"


class NodeLost(LoomError):
    """The node that ran the task fell silent."""

    code = "node_lost"


class AgentFailed(LoomError):
    """The agent raised, or gave up."""

    code = "agent_failed"


class RejectedResult(LoomError):
    """No answer met what the task accepts.

    `best_rejected` has the best answer there was (`content`, `score`, `reason`, `node_id`), `partial` its text alone;
    both are None where no attempt had an answer.
    """

    code = "rejected_result"


class BudgetExceeded(LoomError):
    """The task's hard token limit is spent."""

    code = "budget_exceeded"


class InvalidPlan(LoomError):
    """The subtask graph breaks a rule."""

    code = "invalid_plan"


class Overloaded(LoomError):
    """The intake is full; try again later."""

    code = "overloaded"


class UnknownTask(LoomError):
    """No task of that id is known."""

    code = "unknown_task"


class NodeBusy(LoomError):
    """The node has neither a free slot nor room in its backlog."""

    code = "node_busy"


class SubtaskFailed(LoomError):
    """A subtask ended without a result."""

    code = "subtask_failed"


class DeadLettered(LoomError):
    """A message could not be handled and waits among the dead letters."""

    code = "dead_letter"


class BusUnavailable(LoomError):
    """No server, or no phases, answer."""

    code = "bus_unavailable"


BY_CODE: dict[str, type[LoomError]] = {cls.code: cls for cls in LoomError.__subclasses__()}
"""code -> error class. Only the classes of this file."""


def error_for(code: str, message: str, **facts: Any) -> LoomError:
    """Return the error a wire `code` stands for; an unknown code gives a plain LoomError with that code."""
    cls = BY_CODE.get(code)
    if cls is not None:
        return cls(message, **facts)
    error = LoomError(message, **facts)
    error.code = code  # type: ignore[misc]  # a newer peer's code is kept as it came
    return error
