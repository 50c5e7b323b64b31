"""The conversation of one job with a model: its rounds, limits and costs."""

import time
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing

from msgspec.structs import replace

from loom.agents.deadline import Deadline
from loom.agents.llm.completion import chunks
from loom.agents.llm.config import AgentConfig
from loom.agents.llm.history import CallIds, legal_call
from loom.agents.llm.model_answer import ModelAnswer, max_chars, why_empty
from loom.agents.llm.openai.wrapped_json import json_text
from loom.agents.llm.prompt import opening
from loom.agents.llm.token_use import TokenUse, answer_limit, estimate_tokens
from loom.agents.llm.tool_round import MAX_REPEATS, RequestedCall, ToolRounds
from loom.agents.run_context import RunContext
from loom.agents.tools import Tool
from loom.agents.user_code import error_fields, type_name
from loom.bus.logs.logger import get_logger
from loom.schemas.errors import AgentFailed, BudgetExceeded, LoomError
from loom.schemas.events import AgentEvent, Done, ReasoningDelta, StepEnd, StepStart, TextDelta
from loom.schemas.llm import AnyProvider, CompletionParams, Message
from loom.schemas.run import RunRequest

REPORT_S = 0.05
"""Seconds by which a job ends before its deadline, so that its costs are reported in time."""

log = get_logger()


class Conversation:
    """Runs the rounds of one job with a model, and counts its tokens and time.

    Args:
        tools: Tools by name; the job may allow only some of them.
        run_context: Context of the run on a host; None outside of hosts.
    """

    def __init__(
        self,
        provider: AnyProvider,
        config: AgentConfig,
        system_prompt: str,
        tools: Mapping[str, Tool],
        job: RunRequest,
        run_context: RunContext | None,
    ) -> None:
        self._provider, self._config, self._job = provider, config, job
        allowed = {name: tool for name, tool in tools.items() if job.allows(name)}
        self._definitions = tuple(tool.definition for tool in allowed.values())
        self._messages = opening(system_prompt, job)
        self._schema = job.accept.json_schema if job.accept else None
        self._started = time.monotonic()
        self._step = 0
        self._deadline = Deadline(job.remaining_s, early_s=REPORT_S)
        self._run_context = run_context
        self._calls = ToolRounds(allowed, job, self._deadline, config.tool_context)
        self._ids = CallIds()
        self._answer = ModelAnswer()
        self._limit: int | None = None  # token limit of the last answer
        self._tokens = TokenUse()
        self._text = ""  # text of the last round that wrote some

    async def events(self) -> AsyncGenerator[AgentEvent, None]:
        """Yield events until the model answers without tool calls; the last event is Done.

        Raises:
            LoomError: Same as `Agent.stream`.
        """
        max_steps = self._config.max_steps
        for step in range(1, max_steps + 1):
            self._step = step
            yield StepStart(step=step, total_steps=max_steps)
            async with aclosing(self._request_answer()) as pieces:
                async for delta in pieces:
                    yield delta
            self._check_answer()
            if not self._answer.tool_calls:
                yield StepEnd(step=step)
                break
            if step == max_steps:  # the model could not read the results of its calls
                yield StepEnd(step=step, reason="max_steps")
                break
            async with aclosing(self._call_tools()) as events:
                async for event in events:
                    yield event
            yield StepEnd(step=step, reason="tool_use")
        self._finish()
        yield self.so_far()

    async def _request_answer(self) -> AsyncGenerator[TextDelta | ReasoningDelta, None]:
        """Request an answer, yield its deltas, and count its tokens, also if it breaks off."""
        params = self._params()
        self._answer = ModelAnswer()
        try:
            async with aclosing(self._request(params)) as pieces:
                async for delta in pieces:
                    yield delta
        except AgentFailed as error:
            # Servers without this response format, or without it for requests with tools, refuse the whole request.
            if params.json_schema is None or self._answer.pieces or error.retry_after_s is not None:
                raise
            log.info("model_request_without_schema", task_id=self._job.task_id, reason=error.message)
            self._schema = None
            async with aclosing(self._request(replace(params, json_schema=None))) as pieces:
                async for delta in pieces:
                    yield delta
        finally:
            self._count()

    async def _request(self, params: CompletionParams) -> AsyncGenerator[TextDelta | ReasoningDelta, None]:
        """Request an answer once; an exception of the provider becomes AgentFailed."""
        params = replace(params, timeout_s=self._deadline.left)
        source = chunks(self._provider, params, self._deadline, streaming=self._config.stream)
        try:
            async with aclosing(source) as parts:
                async for chunk in parts:
                    for delta in self._answer.add(chunk):
                        yield delta
                    self._check_size()
            for delta in self._answer.end():
                yield delta
        except LoomError:
            raise
        except Exception as error:  # any object may be a provider, and may raise anything
            log.warning("provider_raised", task_id=self._job.task_id, node_id=self._job.node_id, **error_fields(error))
            raise self._failed(f"the model could not answer: its provider raised {type_name(error)}") from error

    def _check_size(self) -> None:
        if self._answer.pieces > 1 and self._answer.size > max_chars(self._config.max_tokens):
            raise self._failed("the model does not stop: its answer is longer than it was asked for")

    def _params(self) -> CompletionParams:
        """Return the next request, with the answer limited to the tokens that are left."""
        size = max(self._tokens.last, estimate_tokens((self._messages, self._definitions)))
        if size > self._config.token_budget:
            raise self._failed(
                f"the conversation exceeds the agent's token_budget of {self._config.token_budget} tokens"
            )
        left = None if self._job.token_budget is None else self._job.token_budget - self._spent
        if left is not None and size >= left:
            raise self._overspent(f"{left} are left and the next request takes about {size}")
        self._limit = answer_limit(self._config.max_tokens, None if left is None else left - size)
        return CompletionParams(
            messages=tuple(self._messages),
            tools=self._definitions,
            temperature=self._config.temperature,
            max_tokens=self._limit,
            # Some servers enforce the schema from the first token, so that the model cannot call tools: with tools,
            # only the prompt describes the answer.
            json_schema=None if self._definitions else self._schema,
            timeout_s=self._deadline.left,
        )

    def _count(self) -> None:
        """Count the tokens of the answer, complete or not."""
        answer = self._answer
        if not answer.pieces:
            return
        written = (answer.content, answer.reasoning, answer.thoughts, answer.refusal, answer.tool_calls)
        self._tokens.add(answer.usage, (self._messages, self._definitions), written)
        if answer.content.strip():
            self._text = answer.content
        if self._run_context is not None:
            self._run_context.report_tokens(self._tokens.total)

    def _check_answer(self) -> None:
        if self._answer.finish_reason == "content_filter":
            raise self._failed("the model's answer was withheld by a content filter")
        budget = self._job.token_budget
        if budget is not None and self._spent > budget:
            raise self._overspent(f"{self._spent} were used")

    async def _call_tools(self) -> AsyncGenerator[AgentEvent, None]:
        """Run the tool calls of the answer, and add them and their results to the conversation."""
        answer = self._answer
        repeated = self._calls.count_repeats(answer.tool_calls)
        if repeated:
            calls_of = f"the same call of {', '.join(repeated)} {MAX_REPEATS} rounds running"
            raise self._failed(f"the model turns in circles: {calls_of}")
        calls = [RequestedCall(call, legal_call(call, self._ids.unique(call.id))) for call in answer.tool_calls]
        turn = Message(
            role="assistant",
            content=answer.content,
            reasoning=answer.reasoning,
            tool_calls=tuple(call.legal for call in calls),
        )
        self._messages.append(turn)
        async with aclosing(self._calls.run(calls, self._messages, cut=answer.cut)) as events:
            async for event in events:
                yield event

    def _finish(self) -> None:
        """Remove fences and prose around a JSON answer.

        Raises:
            AgentFailed: There is no answer.
        """
        if not self._text or self._answer.is_refused_or_cut:
            reason = self._why_empty()
            raise self._failed("the model ended without an answer" + (f": {reason}" if reason else ""))
        if self._job.accept is not None and self._job.accept.json_schema is not None:
            self._text = json_text(self._text, self._job.accept.json_schema)

    def _why_empty(self) -> str:
        if self._answer.tool_calls:
            return f"its {self._step} rounds went into tool calls: raise AgentConfig(max_steps=…)"
        by_budget = self._limit != self._config.max_tokens
        return why_empty(self._answer, limit=self._limit, by_budget=by_budget)

    @property
    def _spent(self) -> int:
        """Tokens that the job has used, including those of delegated tasks."""
        return self._tokens.total + (self._run_context.delegated_tokens if self._run_context else 0)

    def so_far(self) -> Done:
        """Return the text, tokens and steps so far."""
        return Done(
            content=self._text,
            tokens_used=self._tokens.total,
            steps=self._step,
            duration_ms=round((time.monotonic() - self._started) * 1000),
            usage=self._tokens.as_usage(),
        )

    def _failed(self, message: str) -> AgentFailed:
        return AgentFailed(message, task_id=self._job.task_id)

    def _overspent(self, detail: str) -> BudgetExceeded:
        return BudgetExceeded(
            f"the task's {self._job.token_budget} tokens are spent: {detail}", task_id=self._job.task_id
        )
