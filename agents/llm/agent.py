"""An agent that calls a language model in rounds, and runs the tools that the model calls."""

from collections.abc import AsyncGenerator, Callable, Iterable
from contextlib import aclosing
from typing import Any, Self

from loom.agents.event_bus import EventBus
from loom.agents.llm.config import AgentConfig
from loom.agents.llm.conversation import Conversation
from loom.agents.protocol import collect
from loom.agents.run_context import RunContext, current_run
from loom.agents.tools import Tool, close_all, start_all
from loom.schemas.base import new_id
from loom.schemas.errors import LoomError
from loom.schemas.events import AgentEvent
from loom.schemas.llm import AnyProvider
from loom.schemas.run import RunRequest
from loom.schemas.task import RunResult


class Agent:
    """A model with a system prompt and tools; each job is a separate conversation.

    Args:
        provider: Any object with `complete` or `stream` of `LLMProvider`, or both. Their results may be dicts, texts,
            or objects of other classes with the fields of `CompletionResult` and `StreamChunk`.
        config: Default: an AgentConfig without a system prompt.
        system_prompt: Replaces that of the config.
        tools: Tools, functions to make tools of, or a ToolRegistry; names must be unique.
        name: Name for people.
        event_bus: Gets the events of every job in addition to the iterator; default: a new one, used by `on`.

    Raises:
        LoomError: A function cannot be a tool, or two tools have the same name.
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
        all_tools = [tool if isinstance(tool, Tool) else Tool(tool) for tool in tools]
        self._tools = {tool.name: tool for tool in all_tools}
        if len(self._tools) < len(all_tools):
            raise LoomError("two tools have the same name: rename one of them by tool(name=…)")

    @property
    def tools(self) -> tuple[str, ...]:
        """Names of the agent's tools."""
        return tuple(self._tools)

    async def start(self) -> None:
        """Open the lifespans of the tools; a node host calls it before the first run.

        Raises:
            LoomError: The lifespan of a tool cannot be opened.
        """
        await start_all(self._tools.values())

    async def close(self) -> None:
        """Close the lifespans of the tools; a node host calls it when it stops."""
        await close_all(self._tools.values())

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def stream(
        self, job: RunRequest | str, *, run_context: RunContext | None = None
    ) -> AsyncGenerator[AgentEvent, None]:
        """Work on a job, or on a description, until the model answers without tool calls, or until `max_steps`.

        Reasoning of the model is yielded as ReasoningDelta, its answer as TextDelta. With `job.accept.json_schema`,
        the model is asked for that format. Fences or prose around one JSON value are removed from the final content.

        A tool call with equal arguments in a third consecutive round is not run; its result is a warning. In a fifth
        round the job fails.

        Args:
            job: A job, or a description.
            run_context: Context of the run, from its host; default: the context of the calling run, if there is one.

        Raises:
            AgentFailed: The model failed, broke off, does not stop, repeats its tool calls, or gave no answer. The
                message has the reason, and `retry_after_s` the wait that its server asks for.
            BudgetExceeded: `job.token_budget` is spent.
            DeadlineExceeded: `job.remaining_s` ran out.

        Each error has `partial`, the text so far, and `spent`, a Done with that text and the tokens so far.
        """
        run_context = current_run() if run_context is None else run_context
        conversation = Conversation(
            self.provider, self.config, self.system_prompt, self._tools, _as_request(job), run_context
        )
        try:
            async with aclosing(self.event_bus.relay(conversation.events())) as events:
                async for event in events:
                    yield event
        except LoomError as error:
            spent = conversation.so_far()
            vars(error).update(spent=spent, partial=spent.content)
            raise

    async def run(self, job: RunRequest | str) -> RunResult:
        """Work on a job, or on a description, and return the result.

        Raises:
            LoomError: As `stream` does.
        """
        return await collect(self, _as_request(job))


def _as_request(job: RunRequest | str) -> RunRequest:
    return RunRequest(task_id=new_id(), description=job) if isinstance(job, str) else job
