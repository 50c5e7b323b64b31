"""TaskPlanner of loom-agent 0.6: divides a task by a model, runs the subtasks, and combines their outputs."""

import asyncio
import inspect
from collections.abc import Awaitable, Callable, Mapping, Sequence

from msgspec.structs import replace

from loom.bus.logs.log_fields import error_fields
from loom.bus.logs.logger import get_logger
from loom.compat.types import SubTask
from loom.phases.scale import planner
from loom.schemas.config import ClusterConfig
from loom.schemas.errors import AgentFailed, Cancelled, DeadlineExceeded, InvalidPlan, LoomError, SubtaskFailed
from loom.schemas.llm import CompletionParams, CompletionResult, LLMProvider, SystemMessage, Usage, UserMessage
from loom.schemas.plan import check_graph
from loom.schemas.task import TaskAd, TaskError, TaskResult

Execute = Callable[[SubTask, dict[str, str]], Awaitable[TaskResult]]
"""Runs one subtask; the second argument maps the id of each dependency to its output."""

SYNTHESIS_PROMPT = """\
Answer the user's task from the outputs of its subtasks below, each after its id in brackets. Answer the task itself; \
do not describe the subtasks. Where an output you need is missing, say so."""

log = get_logger()


class TaskPlanner:
    """Plans with any LLM provider; it has no state."""

    def __init__(self, provider: LLMProvider) -> None:
        self._provider = provider

    async def decompose(self, task: TaskAd | str) -> list[SubTask]:
        """Return subtasks of a valid graph; without a plan in time, a single subtask equal to the task.

        The request to the model is that of SCALE: an invalid plan is returned to the model once. Exceptions of the
        provider other than AgentFailed and DeadlineExceeded are raised.
        """
        ad = _as_ad(task)
        try:
            answer = await planner.plan_from_model(self._provider, ad, ClusterConfig(), ad.timeout_s)
            if answer.value is None:
                raise answer.error or AgentFailed(answer.why)
        except (AgentFailed, DeadlineExceeded, InvalidPlan, TimeoutError) as error:
            reason = error.message if isinstance(error, LoomError) else "the model took too long"
            log.warning("plan_unusable", task_id=ad.task_id, reason=reason)
            whole = SubTask(description=ad.description, domain=ad.domain)
            if ad.estimated_complexity is not None:
                whole.estimated_complexity = ad.estimated_complexity
            return [whole]
        return [
            SubTask(
                part.id, part.description, part.domain or ad.domain, [*part.dependencies], part.estimated_complexity
            )
            for part in answer.value
        ]

    async def execute_dag(self, subtasks: Sequence[SubTask], execute: Execute) -> dict[str, TaskResult]:
        """Run each subtask as soon as its dependencies have succeeded.

        Args:
            subtasks: A graph that `check_graph` accepts.
            execute: Runs one subtask; an exception becomes a failed result.

        Returns:
            subtask id -> result, in the order of `subtasks`. After a failure, the dependent subtasks do not run: their
            results are failures with code `subtask_failed` and 0 attempts.

        Raises:
            InvalidPlan: The graph breaks a rule; no subtask has run.
            TypeError: `execute` does not take two arguments; no subtask has run.
        """
        _check_executor(execute)
        check_graph(subtasks)
        running: dict[str, asyncio.Task[TaskResult]] = {}

        async def run(subtask: SubTask) -> TaskResult:
            needed = {name: await running[name] for name in subtask.dependencies}
            failed = next((name for name, result in needed.items() if not result.success), None)
            if failed is not None:
                return _failed(subtask.id, SubtaskFailed(f"not run: it depends on {failed}, which did not succeed"))
            return await _attempt(execute, subtask, {name: result.content for name, result in needed.items()})

        async with asyncio.TaskGroup() as group:
            for subtask in subtasks:
                running[subtask.id] = group.create_task(run(subtask))
        return {name: task.result() for name, task in running.items()}

    async def aggregate(self, task: TaskAd | str, results: Mapping[str, TaskResult]) -> TaskResult:
        """Return one result of `task` from those of its subtasks, with the tokens of all of them.

        A single success is the answer. The model combines several; its prompt lists the missing ones. Without any
        success, or without an answer of the model, the result is a failure. Exceptions of the provider are raised.
        """
        ad = _as_ad(task)
        outputs = {name: r.content for name, r in results.items() if r.success and r.content.strip()}
        if not outputs:
            return _total(_failed(ad.task_id, SubtaskFailed("no subtask gave a result")), results)
        if len(results) == 1:
            (content,) = outputs.values()
            return _total(TaskResult(task_id=ad.task_id, state="succeeded", content=content, domain=ad.domain), results)
        parts = [f"[{name}] {outputs.get(name, '(missing: this subtask gave no result)')}" for name in results]
        question = ad.description + "\n\n" + "\n---\n".join(parts)
        answer = await self._synthesis(question, ad.timeout_s)
        if not answer.content.strip():
            failure = _failed(ad.task_id, AgentFailed("the model returned an empty synthesis"))
            return _total(failure, results, answer.usage)
        whole = TaskResult(task_id=ad.task_id, state="succeeded", content=answer.content, domain=ad.domain)
        return _total(whole, results, answer.usage)

    async def _synthesis(self, question: str, timeout_s: float) -> CompletionResult:
        messages = (SystemMessage(SYNTHESIS_PROMPT), UserMessage(question))
        params = CompletionParams(messages=messages, temperature=0.3, max_tokens=2048, timeout_s=timeout_s)
        return await self._provider.complete(params)


def _check_executor(execute: Execute) -> None:
    try:
        inspect.signature(execute).bind(SubTask(), {})
    except TypeError as error:
        raise TypeError(
            f"execute must take the subtask and the outputs it builds on, (subtask, inputs): {error}"
        ) from None
    except ValueError:  # a callable without a signature
        return


async def _attempt(execute: Execute, subtask: SubTask, inputs: dict[str, str]) -> TaskResult:
    """Run one subtask; any failure becomes a result, so that other subtasks continue."""
    try:
        return await execute(subtask, inputs)
    except LoomError as error:
        return _failed(subtask.id, error, attempts=1)
    except asyncio.CancelledError:
        current = asyncio.current_task()
        if current is None or current.cancelling():
            raise
        # This task was not cancelled, but something that the subtask awaited.
        return _failed(subtask.id, Cancelled("what the subtask waited for was cancelled"), attempts=1)
    except Exception as error:  # noqa: BLE001 - `execute` is the user's and may raise anything
        log.warning("subtask_raised", subtask_id=subtask.id, **error_fields(error))
        return _failed(subtask.id, AgentFailed(f"the subtask raised {type(error).__name__}"), attempts=1)


def _failed(task_id: str, error: LoomError, *, attempts: int = 0) -> TaskResult:
    return TaskResult(task_id=task_id, state="failed", error=TaskError.of(error), attempts=attempts)


def _total(answer: TaskResult, results: Mapping[str, TaskResult], usage: Usage | None = None) -> TaskResult:
    """Return `answer` with the tokens of all results and of the synthesis."""
    return replace(
        answer,
        prompt_tokens=sum(r.prompt_tokens for r in results.values()) + (usage.prompt_tokens if usage else 0),
        completion_tokens=sum(r.completion_tokens for r in results.values())
        + (usage.completion_tokens if usage else 0),
    )


def _as_ad(task: TaskAd | str) -> TaskAd:
    return TaskAd(description=task) if isinstance(task, str) else task
