"""An agent that works in rounds with a language model and calls tools."""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from typing import Any

import msgspec
from msgspec.structs import replace

from loom.agents.deadline import Deadline
from loom.agents.delegate import Delegator
from loom.agents.event_bus import EventBus
from loom.agents.llm.config import AgentConfig
from loom.agents.llm.usage import usage_of
from loom.agents.port import collect, deltas
from loom.agents.tools import Tool, ToolContext, ToolResult
from loom.agents.user_code import described, guarded, text_of, type_name
from loom.bus.log import get_logger
from loom.schemas.errors import AgentFailed, BudgetExceeded, LoomError
from loom.schemas.events import AgentEvent, Done, StepEnd, StepStart, TextDelta, TokenUsage, ToolCallEnd, ToolCallStart
from loom.schemas.llm import CompletionParams, CompletionResult, LLMProvider, Message, StreamChunk, ToolCall, Usage
from loom.schemas.run import RunRequest
from loom.schemas.task import RunResult
from loom.schemas.wire import encode, new_id

TOLD_REPEATS = 3
"""A call wanted in so many rounds running is not run again: the model is told instead."""
MOST_REPEATS = 5
"""A call wanted in so many rounds running ends the job."""
PARALLEL_TOOLS = 8
"""Calls of one round that run at a time."""
EVENT_RESULT_CHARS = 2000
BYTES_PER_TOKEN = 4
"""Where a model does not say how many tokens it took; about right for prose in UTF-8."""
CHARS_PER_TOKEN = 32
"""More than any model packs into a token: a stream longer than that is none that would stop by itself."""
CANCEL_GRACE_S = 0.5
"""How long a cancelled tool may take to clean up before it is left behind."""

log = get_logger()


class Agent:
    """A model with a system prompt and tools; each job is a conversation of its own.

    Args:
        provider: Any object with `complete` and `stream` of `LLMProvider`.
        config: Default: an AgentConfig without a system prompt.
        system_prompt: Instead of the config's.
        tools: Tools, or functions to make tools of; names must differ.
        name: What people call it.
        event_bus: Gets the events of every job, beside the iterator; absent: one of its own, for `on`.

    Raises:
        LoomError: A function cannot be a tool, or two have one name.
    """

    def __init__(
        self,
        provider: LLMProvider,
        config: AgentConfig | None = None,
        name: str | None = None,
        *,
        system_prompt: str | None = None,
        tools: Sequence[Tool | Callable[..., Any]] = (),
        event_bus: EventBus | None = None,
    ) -> None:
        self.id = new_id()
        self.event_bus = event_bus or EventBus()
        self.on = self.event_bus.on
        self.provider = provider
        self.config = config or AgentConfig()
        self.system_prompt = self.config.system_prompt if system_prompt is None else system_prompt
        self.name = name or "agent"
        made = [each if isinstance(each, Tool) else Tool(each) for each in tools]
        self._tools = {each.name: each for each in made}
        if len(self._tools) < len(made):
            raise LoomError("two tools have one name: give one of them another by tool(name=…)")

    @property
    def tools(self) -> tuple[str, ...]:
        """Names of its tools."""
        return tuple(self._tools)

    async def stream(self, job: RunRequest) -> AsyncGenerator[AgentEvent, None]:
        """Work on `job` until the model answers without asking for tools, or `max_steps` is reached.

        The same tool with the same arguments in a third round running is not run: the model is told that it repeats
        itself. In a fifth it is taken to turn in circles.

        Raises:
            AgentFailed: The model could not be asked, broke off, said nothing, does not stop or turns in circles;
                `retry_after_s` where its server said when to come again.
            BudgetExceeded: `job.token_budget` is spent; `partial` holds the text there is.
            DeadlineExceeded: `job.remaining_s` ran out.

        Each of them has `spent`, a Done with the text and the tokens so far.
        """
        conversation = _Conversation(self, self._tools, job)
        try:
            async with aclosing(self.event_bus.relay(conversation.events())) as events:
                async for event in events:
                    yield event
        except LoomError as error:
            error.facts["spent"] = conversation.so_far()
            raise

    async def run(self, job: RunRequest | str) -> RunResult:
        """Work on `job`, or on a description, and return the result.

        Raises:
            LoomError: As `stream` does.
        """
        if isinstance(job, str):
            job = RunRequest(task_id=new_id(), description=job)
        return await collect(self, job)


def job_message(job: RunRequest) -> str:
    """Return what the model is told of `job`: description, context as JSON, outputs of earlier subtasks by name."""
    parts = [job.description]
    if job.context:
        parts.append(f"Context, as JSON:\n{encode(job.context).decode()}")
    if job.inputs:
        parts.append("Results of the subtasks this one builds on:")
        parts.extend(f"[{name}]\n{output}" for name, output in job.inputs.items())
    return text_of("\n\n".join(parts))


def estimate_tokens(value: Any) -> int:
    """Return about how many tokens `value`, text or messages, takes: a quarter of its JSON's bytes, at least 1."""
    return max(1, -(-len(encode(value)) // BYTES_PER_TOKEN))


class _Conversation:
    """One job's messages, tokens and time: nothing of it outlives the job."""

    def __init__(self, agent: Agent, tools: dict[str, Tool], job: RunRequest) -> None:
        self._provider, self._config, self._job = agent.provider, agent.config, job
        self._tools = {name: each for name, each in tools.items() if not job.tools or name in job.tools}
        self._definitions = tuple(each.definition for each in self._tools.values())
        system = (Message(role="system", content=agent.system_prompt),) if agent.system_prompt else ()
        self._messages: list[Message] = [*system, Message(role="user", content=job_message(job))]
        self._started = time.monotonic()
        self._step = 0
        self._deadline = Deadline(job.remaining_s)
        self._delegator = Delegator.current()
        self._room = asyncio.Semaphore(PARALLEL_TOOLS)
        self._answer = CompletionResult()
        self._used = Usage()
        self._guessed = False
        self._text = ""  # of the last round that said anything
        self._size = 0  # tokens of the conversation, as of the last round
        self._rounds: dict[tuple[str, str], int] = {}  # call of the last round -> rounds running that wanted it

    async def events(self) -> AsyncGenerator[AgentEvent, None]:
        most = self._config.max_steps
        for step in range(1, most + 1):
            self._step = step
            yield StepStart(step=step, total_steps=most)
            async with aclosing(self._ask(self._params())) as pieces:
                async for delta in pieces:
                    yield delta
            self._take_answer()
            if not self._answer.tool_calls:
                yield StepEnd(step=step)
                break
            if step == most:  # nobody would read what the tools say
                yield StepEnd(step=step, reason="max_steps")
                break
            self._refuse_circles()
            async with aclosing(self._call_tools(self._answer.tool_calls)) as events:
                async for event in events:
                    yield event
            yield StepEnd(step=step, reason="tool_use")
        if not self._text:
            raise self._failed("the model ended without an answer")
        yield self.so_far()

    def _params(self) -> CompletionParams:
        """The next question, its answer bounded by the tokens that are left."""
        size = max(self._size, estimate_tokens((self._messages, self._definitions)))
        if size > self._config.token_budget:
            raise self._failed(f"the conversation has outgrown the agent's {self._config.token_budget} tokens")
        longest = self._config.max_tokens
        if self._job.token_budget is not None:
            left = self._job.token_budget - self._spent
            if size >= left:
                raise self._overspent(f"{left} are left and the next question takes about {size}")
            longest = min(longest, left - size)
        return CompletionParams(
            messages=tuple(self._messages),
            tools=self._definitions,
            temperature=self._config.temperature,
            max_tokens=longest,
            timeout_s=self._deadline.left,
        )

    async def _ask(self, params: CompletionParams) -> AsyncGenerator[TextDelta, None]:
        """Ask the model, yield its text in pieces and keep the answer."""
        try:
            if self._config.stream:
                parts: list[StreamChunk] = []
                async with aclosing(self._chunks(params)) as chunks:
                    async for chunk in chunks:
                        parts.append(chunk)
                        if chunk.text:
                            yield TextDelta(text=text_of(chunk.text))
                with guarded():
                    self._answer = _clean(_joined(parts))
            else:
                with guarded():
                    async with self._deadline.enforced():
                        answer = await self._provider.complete(params)
                    self._answer = _clean(answer)
                for delta in deltas(self._answer.content):
                    yield delta
        except LoomError:
            raise
        except Exception as error:  # any object may be a provider, so anything may come out of it
            log.warning("provider_raised", task_id=self._job.task_id, node_id=self._job.node_id, **described(error))
            raise self._failed(f"the model could not answer: its provider raised {type_name(error)}") from error

    async def _chunks(self, params: CompletionParams) -> AsyncGenerator[StreamChunk, None]:
        """The answer's pieces, in time and not without end."""
        room = self._config.max_tokens * CHARS_PER_TOKEN
        with guarded():
            source = self._provider.stream(params)
        async with aclosing(self._deadline.each(source)) as chunks:
            async for chunk in chunks:
                with guarded():
                    room -= len(chunk.text)
                if room < 0:
                    raise self._failed("the model does not stop: its answer is longer than it was asked for")
                yield chunk

    def _take_answer(self) -> None:
        """Account for the answer and add it to the conversation."""
        answer = self._answer
        usage = usage_of(answer.usage) or self._guess(answer)
        self._size = usage.total_tokens
        self._used = Usage(
            prompt_tokens=self._used.prompt_tokens + usage.prompt_tokens,
            completion_tokens=self._used.completion_tokens + usage.completion_tokens,
        )
        if answer.content.strip():
            self._text = answer.content
        if self._config.stream and answer.finish_reason is None:
            raise self._failed("the model's answer broke off")
        if answer.finish_reason == "content_filter":
            raise self._failed("the model's answer was withheld by a content filter")
        if self._delegator is not None:
            self._delegator.own_tokens = self._used.total_tokens
        budget = self._job.token_budget
        if budget is not None and self._spent > budget:
            raise self._overspent(f"{self._spent} were used")
        self._messages.append(Message(role="assistant", content=answer.content, tool_calls=answer.tool_calls))

    @property
    def _spent(self) -> int:
        """Tokens the job has taken, those of delegated work included."""
        return self._used.total_tokens + (self._delegator.run.others.tokens if self._delegator else 0)

    def _guess(self, answer: CompletionResult) -> Usage:
        self._guessed = True
        return Usage(
            prompt_tokens=estimate_tokens((self._messages, self._definitions)),
            completion_tokens=estimate_tokens((answer.content, answer.tool_calls)),
        )

    def _refuse_circles(self) -> None:
        wanted = {_identity(each) for each in self._answer.tool_calls}
        self._rounds = {call: self._rounds.get(call, 0) + 1 for call in wanted}
        names = sorted({name for (name, _), rounds in self._rounds.items() if rounds >= MOST_REPEATS})
        if names:
            again = f"the same call of {', '.join(names)} {MOST_REPEATS} rounds running"
            raise self._failed(f"the model turns in circles: {again}")

    async def _call_tools(self, calls: Sequence[ToolCall]) -> AsyncGenerator[ToolCallStart | ToolCallEnd, None]:
        """Run the calls side by side, say so, and add what they return to the conversation."""
        running: dict[asyncio.Task[tuple[ToolResult, float]], ToolCall] = {}
        try:
            for each in calls:
                yield ToolCallStart(tool_call_id=each.id, name=each.name, input=_as_object(each.arguments))
                running[asyncio.create_task(self._call_tool(each))] = each
            pending = set(running)
            while pending:
                ended, pending = await asyncio.wait(
                    pending, timeout=self._deadline.left, return_when=asyncio.FIRST_COMPLETED
                )
                if not ended:
                    self._deadline.check()
                for task in ended:
                    yield _tool_call_end(running[task], *task.result())
        finally:
            unfinished = [task for task in running if task.cancel()]
            if unfinished:
                await asyncio.wait(unfinished, timeout=CANCEL_GRACE_S)
        self._messages.extend(
            Message(role="tool", content=task.result()[0].text, tool_call_id=each.id) for task, each in running.items()
        )

    async def _call_tool(self, wanted: ToolCall) -> tuple[ToolResult, float]:
        """The result and how many milliseconds it took."""
        found = self._tools.get(wanted.name)
        if found is None:
            known = ", ".join(self._tools) or "none"
            return ToolResult(f"Error: there is no tool of that name; there are: {known}", failed=True), 0.0
        rounds = self._rounds[_identity(wanted)]
        if rounds >= TOLD_REPEATS:
            again = f"not run: the same call {rounds} times in a row; use its earlier result, or do something else"
            return ToolResult(f"Error: {again}", failed=True), 0.0
        async with self._room:
            started = time.monotonic()
            context = ToolContext(
                task_id=self._job.task_id,
                attempt=self._job.attempt,
                remaining_s=self._deadline.left,
                tool_context=self._config.tool_context,
            )
            result = await found.run(wanted.arguments, context)
            return result, (time.monotonic() - started) * 1000

    def so_far(self) -> Done:
        """The text, tokens and steps there are by now."""
        used = self._used
        return Done(
            content=self._text,
            tokens_used=used.total_tokens,
            steps=self._step,
            duration_ms=(time.monotonic() - self._started) * 1000,
            usage=TokenUsage(
                prompt_tokens=used.prompt_tokens,
                completion_tokens=used.completion_tokens,
                total_tokens=used.total_tokens,
                estimated=self._guessed,
            ),
        )

    def _failed(self, message: str) -> AgentFailed:
        return AgentFailed(message, task_id=self._job.task_id, partial=self._text)

    def _overspent(self, how: str) -> BudgetExceeded:
        message = f"the task's {self._job.token_budget} tokens are spent: {how}"
        return BudgetExceeded(message, task_id=self._job.task_id, partial=self._text)


def _joined(chunks: Sequence[StreamChunk]) -> CompletionResult:
    return CompletionResult(
        content="".join(chunk.text for chunk in chunks),
        tool_calls=tuple(call for chunk in chunks for call in chunk.tool_calls),
        usage=next((chunk.usage for chunk in reversed(chunks) if chunk.usage), None),
        finish_reason=next((chunk.finish_reason for chunk in reversed(chunks) if chunk.finish_reason), None),
    )


def _clean(answer: CompletionResult) -> CompletionResult:
    """The answer without half surrogate pairs, which models write and UTF-8 cannot carry."""
    calls = tuple(
        replace(each, name=text_of(each.name), arguments=text_of(each.arguments)) for each in answer.tool_calls
    )
    return replace(answer, content=text_of(answer.content), tool_calls=calls)


def _identity(call: ToolCall) -> tuple[str, str]:
    """What makes two calls the same: the tool, and the arguments however they are written."""
    try:
        value = msgspec.json.decode(call.arguments)
        return call.name, msgspec.json.encode(value, order="sorted").decode()
    except (ValueError, RecursionError):
        return call.name, call.arguments


def _as_object(arguments: str) -> dict[str, Any]:
    """The arguments for people to see; empty if they are not a JSON object."""
    try:
        return msgspec.json.decode(arguments, type=dict[str, Any])
    except (ValueError, RecursionError):
        return {}


def _tool_call_end(call: ToolCall, result: ToolResult, duration_ms: float) -> ToolCallEnd:
    return ToolCallEnd(
        tool_call_id=call.id,
        name=call.name,
        result=(result.text if result.published is None else result.published)[:EVENT_RESULT_CHARS],
        failed=result.failed,
        duration_ms=duration_ms,
    )
