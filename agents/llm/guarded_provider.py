"""Wraps a user's model provider for a process that does other work as well."""

from collections.abc import AsyncGenerator
from contextlib import aclosing

from loom.agents.deadline import Deadline
from loom.agents.llm.completion import chunks
from loom.agents.llm.model_answer import ModelAnswer
from loom.agents.user_code import BaseExceptionRaised, type_name
from loom.schemas.errors import AgentFailed
from loom.schemas.llm import AnyProvider, CompletionParams, CompletionResult, StreamChunk

LIMIT_S = 180.0
"""Seconds that an answer may take if the request has no limit."""


class GuardedProvider:
    """Converts exceptions of a provider that would end the process or the task into AgentFailed.

    Like `Agent`, it accepts answers in other formats, and providers with only one of `complete` and `stream`.
    """

    def __init__(self, provider: AnyProvider) -> None:
        self._provider = provider

    async def complete(self, params: CompletionParams) -> CompletionResult:
        """Return the provider's answer, without a block of reasoning at its start."""
        answer = ModelAnswer()
        async with aclosing(self._chunks(params, streaming=False)) as pieces:
            async for piece in pieces:
                answer.add(piece)
        answer.end()
        return answer.result()

    def stream(self, params: CompletionParams) -> AsyncGenerator[StreamChunk, None]:
        """Yield the pieces of the provider's answer."""
        return self._chunks(params, streaming=True)

    async def _chunks(self, params: CompletionParams, *, streaming: bool) -> AsyncGenerator[StreamChunk, None]:
        deadline = Deadline(LIMIT_S if params.timeout_s is None else params.timeout_s)
        try:
            async with aclosing(chunks(self._provider, params, deadline, streaming=streaming)) as pieces:
                async for piece in pieces:
                    yield piece
        except BaseExceptionRaised as error:
            raise AgentFailed(f"the model's provider raised {type_name(error)}") from error
