"""An agent that works in rounds with a language model and calls tools."""

from collections.abc import AsyncGenerator, Callable, Iterable
from contextlib import aclosing
from typing import Any, Self

from loom.agents.event_bus import EventBus
from loom.agents.llm.config import AgentConfig
from loom.agents.llm.conversation import Conversation
from loom.agents.protocol import collect
from loom.agents.tools import Tool, close_all, start_all
from loom.schemas.base import new_id
from loom.schemas.errors import LoomError
from loom.schemas.events import AgentEvent
from loom.schemas.llm import AnyProvider
from loom.schemas.run import RunRequest
from loom.schemas.task import RunResult


class Agent:
    """A model with a system prompt and tools; each job is a conversation of its own.

    Args:
        provider: Any object with `complete` or `stream` of `LLMProvider`, or both. What they give may be objects of
            other classes with the fields of `CompletionResult` and `StreamChunk`, dicts or texts.
        config: Default: an AgentConfig without a system prompt.
        system_prompt: Instead of the config's.
        tools: Tools, or functions to make tools of, or a ToolRegistry; names must differ.
        name: What people call it.
        event_bus: Gets the events of every job, beside the iterator; absent: one of its own, for `on`.

    Raises:
        LoomError: A function cannot be a tool, or two have one name.
    """

    def __init__(
        self,
        provider: AnyProvider,
        config: AgentConfig | None = None,
        name: str | None = None,
        *,
        system_prompt: str | None = None,
        tools: Iterable[Tool | Callable[..., Any]] = (),
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

    async def start(self) -> None:
        """Open what its tools need open; a node host calls it before the first run.

        Raises:
            LoomError: A tool's lifespan cannot be opened.
        """
        await start_all(self._tools.values())

    async def close(self) -> None:
        """Close what `start` opened; a node host calls it at its end."""
        await close_all(self._tools.values())

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def stream(self, job: RunRequest | str) -> AsyncGenerator[AgentEvent, None]:
        """Work on `job`, or on a description, until the model answers without asking for tools, or at `max_steps`.

        The model's reasoning comes as ReasoningDelta, its answer as TextDelta. With `job.accept.json_schema` the model
        is asked for that form, and fences or prose around one JSON value are no part of the final content.

        The same tool with the same arguments in a third round running is not run: its result is a warning. In a fifth
        the model counts as turning in circles.

        Raises:
            AgentFailed: The model could not be asked, broke off, does not stop, turns in circles or gave no answer, and
                why; `retry_after_s` where its server asks for a wait.
            BudgetExceeded: `job.token_budget` is spent.
            DeadlineExceeded: `job.remaining_s` ran out.

        Each of them has `partial`, the text so far, and `spent`, a Done with the text and the tokens so far.
        """
        conversation = Conversation(self.provider, self.config, self.system_prompt, self._tools, _as_request(job))
        try:
            async with aclosing(self.event_bus.relay(conversation.events())) as events:
                async for event in events:
                    yield event
        except LoomError as error:
            spent = conversation.so_far()
            vars(error).update(spent=spent, partial=spent.content)
            raise

    async def run(self, job: RunRequest | str) -> RunResult:
        """Work on `job`, or on a description, and return the result.

        Raises:
            LoomError: As `stream` does.
        """
        return await collect(self, _as_request(job))


def _as_request(job: RunRequest | str) -> RunRequest:
    return RunRequest(task_id=new_id(), description=job) if isinstance(job, str) else job
