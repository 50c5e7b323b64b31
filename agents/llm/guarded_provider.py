"""A user's model provider, for a process that does other work too."""

from collections.abc import AsyncGenerator

from loom.agents.user_code import BaseExceptionRaised, Opened, guarded, type_name
from loom.schemas.errors import AgentFailed
from loom.schemas.llm import CompletionParams, CompletionResult, LLMProvider, StreamChunk


class GuardedProvider:
    """A provider that cannot end the process or task that asks it: such an exception comes out as AgentFailed."""

    def __init__(self, provider: LLMProvider) -> None:
        self._provider = provider

    async def complete(self, params: CompletionParams) -> CompletionResult:
        """Return the provider's answer."""
        try:
            with guarded():
                return await self._provider.complete(params)
        except BaseExceptionRaised as error:
            raise AgentFailed(f"the model's provider raised {type_name(error)}") from error

    async def stream(self, params: CompletionParams) -> AsyncGenerator[StreamChunk, None]:
        """Yield the provider's pieces."""
        try:
            with guarded():
                source = self._provider.stream(params)
            async with Opened(source) as chunks:
                async for chunk in chunks:
                    yield chunk
        except BaseExceptionRaised as error:
            raise AgentFailed(f"the model's provider raised {type_name(error)}") from error
