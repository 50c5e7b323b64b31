"""Delegation of tasks by a run, which holds no slot while it waits for them."""

import asyncio
from collections.abc import Callable
from typing import Any

from loom.agents.host.runs import Run
from loom.agents.host.slots import RunQueue
from loom.agents.run_context import RunContext, current_run
from loom.agents.tools import tool
from loom.schemas.checks.ad import check_ad
from loom.schemas.errors import BudgetExceeded, LoomError, SubtaskFailed
from loom.schemas.run import MAX_OPEN_DELEGATIONS, delegated_id
from loom.schemas.task import RunResult, TaskAd, TaskError, TaskResult

MAX_TIMEOUT_S = 86_400.0


@tool(timeout_s=MAX_TIMEOUT_S)
async def delegate(
    task: str, domain: str = "", token_budget: int | None = None, context: dict[str, Any] | None = None
) -> str:
    """Delegate a task to the agent in the cluster that is best at it, and return its answer.

    The agent knows only what this call contains: `task` is the complete task in words, `context` adds small JSON.
    `domain` names the field of knowledge; if it is empty, it is derived from the words. `token_budget` is the most
    tokens the agent may use; by default half of the tokens you have left, if you have a limit. Several tasks may be
    delegated at once.
    """
    run_context = current_run()
    if run_context is None:
        raise LoomError("only a run on a node host can delegate")
    return await run_context.delegate(task, domain, token_budget, context or {})


class Delegator(RunContext):
    """Delegates tasks of one run, and limits their tokens to those the run has left.

    Args:
        start_queued: Called when a slot of the run's queue may have become free.
    """

    def __init__(self, run: Run, queue: RunQueue, start_queued: Callable[[], None]) -> None:
        self.run = run
        self._own_tokens = 0
        """Tokens that the agent itself has reported so far."""
        self._queue = queue
        self._start_queued = start_queued
        self._calls = 0
        self._granted = 0
        """Sum of the token budgets of open delegations."""
        self._open = 0
        self._limit = asyncio.Semaphore(MAX_OPEN_DELEGATIONS)

    @property
    def delegated_tokens(self) -> int:
        """Tokens that delegated tasks have used so far."""
        return self.run.delegated_usage.tokens

    def report_tokens(self, tokens: int) -> None:
        """Report the number of tokens that the agent itself has used so far."""
        self._own_tokens = max(self._own_tokens, tokens)

    async def delegate(self, task: str, domain: str, token_budget: int | None, context: dict[str, Any]) -> str:
        """Delegate a task and return its answer; the run holds no slot while it waits."""
        self._calls += 1
        call = self._calls
        task_id = delegated_id(self.run.request.task_id, self.run.request.attempt, call)
        async with self._limit:
            if self.run.final_event is not None:
                raise LoomError("a run that has ended cannot delegate")
            grant = self._grant(token_budget)
            ad = TaskAd(
                task_id=task_id,
                domain=domain,
                description=task,
                priority=self.run.request.priority,
                token_budget=grant,
                timeout_s=min(MAX_TIMEOUT_S, max(0.001, self.run.left_s)),
                context=context,
            )
            result = await self._await_result(check_ad(ad), call)
        if result.success:
            return result.content
        raise delegation_error(result)

    async def _await_result(self, ad: TaskAd, call: int) -> TaskResult:
        """Wait for a delegated task without a slot; the last of several results resumes the run."""
        self._granted += ad.token_budget or 0
        self._open += 1
        self._queue.suspend(self.run)
        self._start_queued()
        try:
            result = await self.run.await_delegated(ad, call)
            self.run.add_tokens(result)
        finally:
            self._granted -= ad.token_budget or 0
            self._open -= 1
            if not self._open and self.run.final_event is None:  # a run that has ended needs no slot
                self._queue.resume(self.run)
                self._start_queued()
        if not self._open and self.run.final_event is None:
            await self.run.has_slot.wait()
        return result

    def _grant(self, requested: int | None) -> int | None:
        """Return the token budget of a delegated task; None if neither the run nor the caller sets a limit."""
        budget = self.run.request.token_budget
        if budget is None:
            return requested
        left = budget - self._own_tokens - self.delegated_tokens - self._granted
        if left < 1:
            raise BudgetExceeded(f"none of the task's {budget} tokens are left to delegate with")
        return min(left, requested) if requested is not None else (left + 1) // 2

    def overspent(self, result: RunResult) -> TaskError | None:
        """Return a `budget_exceeded` error if the run and its delegated tasks used more than the budget."""
        budget = self.run.request.token_budget
        if budget is None:
            return None
        delegated = self.delegated_tokens
        if not delegated or result.tokens + delegated <= budget:
            return None
        used = f"{result.tokens + delegated} were used, {delegated} of them by delegated tasks"
        return TaskError(code=BudgetExceeded.code, message=f"the task's {budget} tokens are spent: {used}")


def delegation_error(result: TaskResult) -> SubtaskFailed:
    """Return the error of a delegated task without a result; a nested SubtaskFailed keeps its message."""
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
