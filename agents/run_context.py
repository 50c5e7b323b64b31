"""The context of a run on a host, for the code that works on the run."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol


class RunContext(Protocol):
    """Counts the tokens of a run on a host, and delegates tasks of the run."""

    @property
    def delegated_tokens(self) -> int:
        """Tokens of the tasks that the run has delegated."""
        ...

    def report_tokens(self, tokens: int) -> None:
        """Report the number of tokens that the agent itself has used so far.

        Args:
            tokens: Sum of all tokens since the start of the run. A sum below an earlier one is ignored.
        """
        ...

    async def delegate(self, task: str, domain: str, token_budget: int | None, context: dict[str, Any]) -> str:
        """Delegate a task and return its answer.

        Args:
            task: Description of the task.
            domain: Domain of the task; empty: it is derived from the description.
            token_budget: Token limit of the task; None: half of the tokens that are left, if the run has a limit.
            context: JSON values for the task.

        Raises:
            SubtaskFailed: The task ended without a result; the message has the reason.
            BudgetExceeded: No tokens are left to grant.
            InvalidTask: The task is not valid; `field` names the field.
        """
        ...


_current: ContextVar[RunContext | None] = ContextVar("run_context", default=None)


def current_run() -> RunContext | None:
    """Return the context of the calling run, or None outside of runs on a host."""
    return _current.get()


@contextmanager
def as_current_run(run_context: RunContext) -> Iterator[None]:
    """Make `current_run` return a context in the body of the `with`, and in the tasks that the body starts."""
    token = _current.set(run_context)
    try:
        yield
    finally:
        _current.reset(token)
