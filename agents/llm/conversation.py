"""One job's conversation with a model: its rounds, limits and cost."""

import time
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing

from msgspec.structs import replace

from loom.agents.deadline import Deadline
from loom.agents.host.delegation import Delegator
from loom.agents.llm.completion import chunks
from loom.agents.llm.config import AgentConfig
from loom.agents.llm.history import CallIds, legal_call
from loom.agents.llm.model_answer import ModelAnswer, most_chars, why_empty
from loom.agents.llm.openai.wrapped_json import json_text
from loom.agents.llm.prompt import opening
from loom.agents.llm.token_use import TokenUse, answer_limit, estimate_tokens
from loom.agents.llm.tool_round import MOST_REPEATS, ToolRounds, Wanted
from loom.agents.tools import Tool
from loom.agents.user_code import error_fields, type_name
from loom.bus.logs.logger import get_logger
from loom.schemas.errors import AgentFailed, BudgetExceeded, LoomError
from loom.schemas.events import AgentEvent, Done, ReasoningDelta, StepEnd, StepStart, TextDelta
from loom.schemas.llm import AnyProvider, CompletionParams, Message
from loom.schemas.run import RunRequest

REPORT_S = 0.05
"""How long before its deadline a job ends, so that its cost is reported by then."""

log = get_logger()


class Conversation:
    """One job's messages, tokens and time: nothing of it outlives the job.

    Args:
        tools: By name; the job may narrow them.
    """

    def __init__(
        self,
        provider: AnyProvider,
        config: AgentConfig,
        system_prompt: str,
        tools: Mapping[str, Tool],
        job: RunRequest,
    ) -> None:
        self._provider, self._config, self._job = provider, config, job
        allowed = {name: each for name, each in tools.items() if job.allows(name)}
        self._definitions = tuple(each.definition for each in allowed.values())
        self._messages = opening(system_prompt, job)
        self._schema = job.accept.json_schema if job.accept else None
        self._started = time.monotonic()
        self._step = 0
        self._deadline = Deadline(job.remaining_s, early_s=REPORT_S)
        self._delegator = Delegator.current()
        self._calls = ToolRounds(allowed, job, self._deadline, config.tool_context)
        self._ids = CallIds()
        self._answer = ModelAnswer()
        self._limit: int | None = None  # most tokens of the last answer
        self._tokens = TokenUse()
        self._text = ""  # of the last round that wrote any

    async def events(self) -> AsyncGenerator[AgentEvent, None]:
        """Yield what happens until the model answers without asking for tools; the last event is Done.

        Raises:
            LoomError: As `Agent.stream` does.
        """
        most = self._config.max_steps
        for step in range(1, most + 1):
            self._step = step
            yield StepStart(step=step, total_steps=most)
            async with aclosing(self._ask()) as pieces:
                async for delta in pieces:
                    yield delta
            self._check_answer()
            if not self._answer.tool_calls:
                yield StepEnd(step=step)
                break
            if step == most:  # results of tools would not be read any more
                yield StepEnd(step=step, reason="max_steps")
                break
            async with aclosing(self._call_tools()) as events:
                async for event in events:
                    yield event
            yield StepEnd(step=step, reason="tool_use")
        self._finish()
        yield self.so_far()

    async def _ask(self) -> AsyncGenerator[TextDelta | ReasoningDelta, None]:
        """Ask the model, yield what it shows, keep the answer and count its tokens, also those of a broken one."""
        params = self._params()
        self._answer = ModelAnswer()
        try:
            async with aclosing(self._asked(params)) as pieces:
                async for delta in pieces:
                    yield delta
        except AgentFailed as error:
            # A server that knows no such response format, or not beside tools, refuses the whole request.
            if params.json_schema is None or self._answer.pieces or error.retry_after_s is not None:
                raise
            log.info("model_asked_without_schema", task_id=self._job.task_id, reason=error.message)
            self._schema = None
            async with aclosing(self._asked(replace(params, json_schema=None))) as pieces:
                async for delta in pieces:
                    yield delta
        finally:
            self._count()

    async def _asked(self, params: CompletionParams) -> AsyncGenerator[TextDelta | ReasoningDelta, None]:
        """Ask once; whatever the provider raises is the agent's failure."""
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
        except Exception as error:  # any object may be a provider, so anything may come out of it
            log.warning("provider_raised", task_id=self._job.task_id, node_id=self._job.node_id, **error_fields(error))
            raise self._failed(f"the model could not answer: its provider raised {type_name(error)}") from error

    def _check_size(self) -> None:
        if self._answer.pieces > 1 and self._answer.size > most_chars(self._config.max_tokens):
            raise self._failed("the model does not stop: its answer is longer than it was asked for")

    def _params(self) -> CompletionParams:
        """The next question, its answer bounded by the tokens that are left."""
        size = max(self._tokens.last, estimate_tokens((self._messages, self._definitions)))
        if size > self._config.token_budget:
            raise self._failed(f"the conversation has outgrown the agent's {self._config.token_budget} tokens")
        left = None if self._job.token_budget is None else self._job.token_budget - self._spent
        if left is not None and size >= left:
            raise self._overspent(f"{left} are left and the next question takes about {size}")
        self._limit = answer_limit(self._config.max_tokens, None if left is None else left - size)
        return CompletionParams(
            messages=tuple(self._messages),
            tools=self._definitions,
            temperature=self._config.temperature,
            max_tokens=self._limit,
            # Servers that hold an answer to a schema from its first token leave a model that has tools no way to call
            # one: the prompt alone describes the answer then.
            json_schema=None if self._definitions else self._schema,
            timeout_s=self._deadline.left,
        )

    def _count(self) -> None:
        """Account for the answer, as far as it came."""
        answer = self._answer
        if not answer.pieces:
            return
        written = (answer.content, answer.reasoning, answer.thoughts, answer.refusal, answer.tool_calls)
        self._tokens.add(answer.usage, (self._messages, self._definitions), written)
        if answer.content.strip():
            self._text = answer.content
        if self._delegator is not None:
            self._delegator.own_tokens = self._tokens.total

    def _check_answer(self) -> None:
        if self._answer.finish_reason == "content_filter":
            raise self._failed("the model's answer was withheld by a content filter")
        budget = self._job.token_budget
        if budget is not None and self._spent > budget:
            raise self._overspent(f"{self._spent} were used")

    async def _call_tools(self) -> AsyncGenerator[AgentEvent, None]:
        """Run the calls of the answer; they and their results become a part of the conversation."""
        answer = self._answer
        circling = self._calls.circling(answer.tool_calls)
        if circling:
            again = f"the same call of {', '.join(circling)} {MOST_REPEATS} rounds running"
            raise self._failed(f"the model turns in circles: {again}")
        calls = [Wanted(each, legal_call(each, self._ids.unique(each.id))) for each in answer.tool_calls]
        turn = Message(
            role="assistant",
            content=answer.content,
            reasoning=answer.reasoning,
            tool_calls=tuple(each.legal for each in calls),
        )
        self._messages.append(turn)
        async with aclosing(self._calls.run(calls, self._messages, cut=answer.cut)) as events:
            async for event in events:
                yield event

    def _finish(self) -> None:
        """Take off what surrounds the answer.

        Raises:
            AgentFailed: There is none.
        """
        if not self._text or self._answer.spoilt:
            why = self._why_empty()
            raise self._failed("the model ended without an answer" + (f": {why}" if why else ""))
        if self._job.accept is not None and self._job.accept.json_schema is not None:
            self._text = json_text(self._text, self._job.accept.json_schema)

    def _why_empty(self) -> str:
        if self._answer.tool_calls:
            return f"its {self._step} rounds went into tool calls: raise AgentConfig(max_steps=…)"
        by_budget = self._limit != self._config.max_tokens
        return why_empty(self._answer, limit=self._limit, by_budget=by_budget)

    @property
    def _spent(self) -> int:
        """Tokens the job has taken, those of delegated work included."""
        return self._tokens.total + (self._delegator.delegated_tokens if self._delegator else 0)

    def so_far(self) -> Done:
        """Return the text, tokens and steps by now."""
        return Done(
            content=self._text,
            tokens_used=self._tokens.total,
            steps=self._step,
            duration_ms=round((time.monotonic() - self._started) * 1000),
            usage=self._tokens.as_usage(),
        )

    def _failed(self, message: str) -> AgentFailed:
        return AgentFailed(message, task_id=self._job.task_id)

    def _overspent(self, how: str) -> BudgetExceeded:
        return BudgetExceeded(f"the task's {self._job.token_budget} tokens are spent: {how}", task_id=self._job.task_id)
