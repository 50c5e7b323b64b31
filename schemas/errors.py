"""Errors with stable codes, the same in every language.

All classes derive from LoomError; those from NoBids on derive from TaskFailed.

| Class | Code | Meaning | Main attribute |
|---|---|---|---|
| InvalidTask | invalid_task | the ad breaks a rule | field |
| Overloaded | overloaded | the intake is full | retry_after_s |
| UnknownTask | unknown_task | no task has that id | task_id |
| BusUnavailable | bus_unavailable | no server or no phases respond | url |
| NoBids | no_bids | no node offered to run the task |  |
| DeadlineExceeded | deadline_exceeded | timeout_s ran out |  |
| Cancelled | cancelled | a client cancelled the task |  |
| NodeLost | node_lost | the node stopped responding | node_id |
| AgentFailed | agent_failed | the agent raised or gave up | node_id |
| RejectedResult | rejected_result | no answer met what the task accepts | best_rejected |
| BudgetExceeded | budget_exceeded | the task's hard token limit is spent | spent |
| InvalidPlan | invalid_plan | the subtask graph breaks a rule | field |
| NodeBusy | node_busy | the node has neither slot nor backlog room |  |
| SubtaskFailed | subtask_failed | a subtask ended without a result |  |
| DeadLettered | dead_letter | a message could not be handled |  |
"""

from typing import TYPE_CHECKING, ClassVar, TypedDict, Unpack

if TYPE_CHECKING:
    from loom.schemas.events import Done
    from loom.schemas.task import BestRejected


class LoomError(Exception):
    """Base of all errors of loom; `code` is stable and the message includes what to do next.

    Args:
        message: One sentence for a person, without secrets.
        task_id: The task concerned.
        field: Name of the field that breaks a rule.
        node_id: The node concerned.
        url: Address of the server that did not respond, without credentials.
        retry_after_s: Seconds to wait before the next try, from 0.
    """

    code: ClassVar[str] = "unknown"

    message: str
    # Defaults of the class: a subclass written by a user may not call __init__.
    task_id: str | None = None
    field: str | None = None
    node_id: str | None = None
    url: str | None = None
    retry_after_s: float | None = None

    def __init__(
        self,
        message: str,
        *,
        task_id: str | None = None,
        field: str | None = None,
        node_id: str | None = None,
        url: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.task_id = task_id
        self.field = field
        self.node_id = node_id
        self.url = url
        self.retry_after_s = retry_after_s


class _Common(TypedDict, total=False):
    """The keyword arguments of LoomError."""

    task_id: str | None
    field: str | None
    node_id: str | None
    url: str | None
    retry_after_s: float | None


class TaskFailed(LoomError):
    """Base of the errors that end a task or one of its runs.

    Args:
        message: One sentence for a person, without secrets.
        best_rejected: The best answer that was refused: `content`, `score`, `reason`, `node_id`, `truncated`.
        partial: Text of that answer, or the text that the agent had written before the error.
        spent: What the agent had written and used before the error.
        common: The keyword arguments of LoomError.
    """

    best_rejected: "BestRejected | None" = None
    partial: str | None = None
    spent: "Done | None" = None

    def __init__(
        self,
        message: str,
        *,
        best_rejected: "BestRejected | None" = None,
        partial: str | None = None,
        spent: "Done | None" = None,
        **common: Unpack[_Common],
    ) -> None:
        super().__init__(message, **common)
        self.best_rejected = best_rejected
        self.partial = partial
        self.spent = spent


class InvalidTask(LoomError, ValueError):
    """The ad breaks a rule; `field` names the part."""

    code = "invalid_task"


class NoBids(TaskFailed):
    """No node offered to run the task."""

    code = "no_bids"


class DeadlineExceeded(TaskFailed):
    """The task's `timeout_s` ran out."""

    code = "deadline_exceeded"


class Cancelled(TaskFailed):
    """A client cancelled the task."""

    code = "cancelled"


class NodeLost(TaskFailed):
    """The node that ran the task stopped responding."""

    code = "node_lost"


class AgentFailed(TaskFailed):
    """The agent raised, or gave up."""

    code = "agent_failed"


class RejectedResult(TaskFailed):
    """No answer met what the task accepts.

    `best_rejected` is the best refused answer, `partial` its text; both are None if no attempt had an answer.
    """

    code = "rejected_result"


class BudgetExceeded(TaskFailed):
    """The task's hard token limit is spent."""

    code = "budget_exceeded"


class InvalidPlan(TaskFailed):
    """The subtask graph breaks a rule; `field` names the part."""

    code = "invalid_plan"


class Overloaded(LoomError):
    """The intake is full; try again later."""

    code = "overloaded"


class UnknownTask(LoomError):
    """No task has that id."""

    code = "unknown_task"


class NodeBusy(TaskFailed):
    """The node has neither a free slot nor room in its backlog."""

    code = "node_busy"


class SubtaskFailed(TaskFailed):
    """A subtask ended without a result."""

    code = "subtask_failed"


class DeadLettered(TaskFailed):
    """A message could not be handled and is stored as a dead letter."""

    code = "dead_letter"


class BusUnavailable(LoomError):
    """No server or no phases answer; `url` is the server's address."""

    code = "bus_unavailable"


BY_CODE: dict[str, type[LoomError]] = {
    error.code: error
    for error in (
        InvalidTask,
        NoBids,
        DeadlineExceeded,
        Cancelled,
        NodeLost,
        AgentFailed,
        RejectedResult,
        BudgetExceeded,
        InvalidPlan,
        Overloaded,
        UnknownTask,
        NodeBusy,
        SubtaskFailed,
        DeadLettered,
        BusUnavailable,
    )
}
"""code -> error class."""


def error_for(code: str, message: str, **common: Unpack[_Common]) -> LoomError:
    """Return the error of a wire `code`; an unknown code, as of a newer version, becomes a LoomError with that code.

    Args:
        code: A code of the table in docs/tasks.md, or one of a newer version.
        message: One sentence for a person.
        common: The keyword arguments of LoomError.
    """
    known = BY_CODE.get(code)
    if known is not None:
        return known(message, **common)
    error = LoomError(message, **common)
    error.code = code  # type: ignore[misc]  # the code of this instance alone
    return error
