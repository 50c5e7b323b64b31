"""Delegation: a run has others do part of its work, and holds no slot while it waits for them."""

import asyncio
from collections.abc import Callable
from contextvars import ContextVar
from types import TracebackType
from typing import Any, Optional, Self

from loom.agents.host.runs import Run
from loom.agents.host.slots import RunQueue
from loom.agents.job import run_costs
from loom.agents.tools import tool
from loom.schemas.checks.ad import check_ad
from loom.schemas.errors import BudgetExceeded, LoomError, SubtaskFailed
from loom.schemas.run import MAX_OPEN_DELEGATIONS, delegated_id
from loom.schemas.task import RunResult, TaskAd, TaskError, TaskResult

MOST_S = 86_400.0

_current: ContextVar[Optional["Delegator"]] = ContextVar("delegator", default=None)


@tool(timeout_s=MOST_S)
async def delegate(
    task: str, domain: str = "", token_budget: int | None = None, context: dict[str, Any] | None = None
) -> str:
    """Give a task to whoever in the cluster is best at it, and return their answer.

    They know only what you tell them: `task` says in words all they need, `context` adds small JSON. `domain` names
    the field of knowledge; empty: found from the words. `token_budget` is the most tokens they may use; absent: half
    of what you have left, if you have a limit. Several tasks may be delegated at once.
    """
    delegator = Delegator.current()
    if delegator is None:
        raise LoomError("only a run on a node host can delegate")
    return await delegator.delegate(task, domain, token_budget, context or {})


class Delegator:
    """Delegates on behalf of one run; `delegate` finds it while the body of its `with` runs.

    Args:
        fill: Called when the run's room may have a slot to give.
    """

    def __init__(self, run: Run, room: RunQueue, fill: Callable[[], None]) -> None:
        self.run = run
        self.own_tokens = 0
        """What the agent itself has taken so far, where it says so."""
        self._room = room
        self._fill = fill
        self._calls = 0
        self._granted = 0
        self._open = 0
        self._turn = asyncio.Semaphore(MAX_OPEN_DELEGATIONS)  # further ones wait their turn

    def __enter__(self) -> Self:
        self._tokens = _current.set(self), run_costs.set(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _current.reset(self._tokens[0])
        run_costs.reset(self._tokens[1])

    @property
    def others_tokens(self) -> int:
        """Tokens that delegated work has taken so far."""
        return self.run.others.tokens

    @staticmethod
    def current() -> "Delegator | None":
        """Return that of the run the caller works for; None outside any."""
        return _current.get()

    async def delegate(self, task: str, domain: str, token_budget: int | None, context: dict[str, Any]) -> str:
        """Have others do a task and return their answer.

        Raises:
            SubtaskFailed: It ended without a result; the message says why.
            BudgetExceeded: No tokens are left to grant.
            InvalidTask: It cannot be submitted; `field` names the part to blame.
        """
        self._calls += 1
        call = self._calls
        task_id = delegated_id(self.run.request.task_id, self.run.request.attempt, call)
        async with self._turn:
            if self.run.last is not None:
                raise LoomError("the run that would delegate has ended")
            grant = self._grant(token_budget)
            ad = TaskAd(
                task_id=task_id,
                domain=domain,
                description=task,
                priority=self.run.request.priority,
                token_budget=grant,
                timeout_s=min(MOST_S, max(0.001, self.run.left_s)),
                context=context,
            )
            result = await self._ask(check_ad(ad), call)
        if result.success:
            return result.content
        raise failure(result)

    async def _ask(self, ad: TaskAd, call: int) -> TaskResult:
        """Wait for the work without a slot; the last of several answers gets the run its slot back."""
        self._granted += ad.token_budget or 0
        self._open += 1
        self._room.leave(self.run)
        self._fill()
        try:
            result = await self.run.ask(ad, call)
            self.run.charge(result)
        finally:
            self._granted -= ad.token_budget or 0
            self._open -= 1
            if not self._open and self.run.last is None:  # a run that has ended needs no slot
                self._room.come_back(self.run)
                self._fill()
        if not self._open and self.run.last is None:
            await self.run.seated.wait()
        return result

    def _grant(self, asked: int | None) -> int | None:
        """The most tokens the work may take; None where the task has no limit and none is asked for."""
        budget = self.run.request.token_budget
        if budget is None:
            return asked
        left = budget - self.own_tokens - self.run.others.tokens - self._granted
        if left < 1:
            raise BudgetExceeded(f"none of the task's {budget} tokens are left to delegate with")
        return min(left, asked) if asked is not None else (left + 1) // 2

    def overspent(self, result: RunResult) -> TaskError | None:
        """Return why a result comes too dear: the run and those it delegated to have taken more than there was."""
        budget, others = self.run.request.token_budget, self.run.others.tokens
        if budget is None or not others or result.tokens + others <= budget:
            return None
        used = f"{result.tokens + others} were used, {others} of them by others"
        return TaskError(code=BudgetExceeded.code, message=f"the task's {budget} tokens are spent: {used}")


def failure(result: TaskResult) -> SubtaskFailed:
    """Return the error of delegated work that ended without a result; a failure further down speaks for itself."""
    error = result.error
    if error is None:
        return SubtaskFailed(f"the delegated task ended as {result.state}", task_id=result.task_id)
    if error.code == SubtaskFailed.code:
        return SubtaskFailed(error.message, task_id=result.task_id)
    return SubtaskFailed(
        f"delegated work failed: {error.code}: {error.message}",
        task_id=result.task_id,
        best_rejected=error.best_rejected,
    )
