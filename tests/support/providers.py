"""An OpenAIProvider before a server that answers by a script."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from loom.agents.llm.config import AgentConfig
from loom.agents.llm.openai.openai_provider import OpenAIProvider
from loom.schemas.llm import CompletionParams, CompletionResult, StreamChunk, UserMessage
from support.openai_server import Answerer, OpenAIServer, Reply

KEY = "sk-very-secret"
ASK = CompletionParams(messages=(UserMessage("How do you do?"),), timeout_s=30)


def provider_for(base_url: str, **config: Any) -> OpenAIProvider:
    return OpenAIProvider(AgentConfig(**{"api_key": KEY, "base_url": base_url, "model": "tiny", **config}))


@asynccontextmanager
async def serving(
    *replies: Reply, answer: Answerer | None = None, **config: Any
) -> AsyncIterator[tuple[OpenAIServer, OpenAIProvider]]:
    """A server with these replies, then `answer`, and a provider that asks it."""
    async with OpenAIServer(answer) as server:
        server.script(*replies)
        provider = provider_for(server.base_url, **config)
        try:
            yield server, provider
        finally:
            await provider.aclose()


async def streamed(provider: OpenAIProvider, params: CompletionParams = ASK) -> list[StreamChunk]:
    return [chunk async for chunk in provider.stream(params)]


async def answered(provider: OpenAIProvider, params: CompletionParams = ASK, *, stream: bool) -> CompletionResult:
    """The answer, put together where it is streamed."""
    if not stream:
        return await provider.complete(params)
    chunks = await streamed(provider, params)
    return CompletionResult(
        content="".join(chunk.text for chunk in chunks),
        reasoning="".join(chunk.reasoning for chunk in chunks),
        refusal="".join(chunk.refusal for chunk in chunks),
        tool_calls=chunks[-1].tool_calls,
        usage=chunks[-1].usage,
        finish_reason=chunks[-1].finish_reason,
    )
