"""Requests an answer from a provider that has `complete`, `stream` or both."""

import inspect
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from loom.agents.deadline import Deadline
from loom.agents.llm.chunk_reading import read_chunk, read_result
from loom.agents.user_code import call, contain
from loom.schemas.errors import AgentFailed
from loom.schemas.llm import CompletionParams, StreamChunk


async def chunks(
    provider: Any, params: CompletionParams, deadline: Deadline, *, streaming: bool
) -> AsyncGenerator[StreamChunk, None]:
    """Request an answer and yield it in pieces; an answer of `complete` is one piece.

    Args:
        provider: An object with `complete`, `stream` or both.
        params: The request.
        deadline: Enforced on each piece.
        streaming: Whether `stream` is preferred.

    Raises:
        AgentFailed: The provider has neither method, or its answer cannot be read.
        DeadlineExceeded: There is no time left.
        Exception: The provider raised it.
    """
    streams, completes = (callable(getattr(provider, name, None)) for name in ("stream", "complete"))
    if not streams and not completes:
        kind = type(provider).__name__
        raise AgentFailed(f"the model's provider, of type {kind}, has neither complete(params) nor stream(params)")
    if not streams or (completes and not streaming):
        async with deadline.enforced():
            answer = await call(provider.complete, params)
        with contain():
            whole = read_result(answer)
        yield whole
        return
    async with aclosing(deadline.each(await _stream(provider, params, deadline))) as pieces:
        async for piece in pieces:
            with contain():
                chunk = read_chunk(piece)
            yield chunk


async def _stream(provider: Any, params: CompletionParams, deadline: Deadline) -> Any:
    """Return the provider's async iterator, which a coroutine may return."""
    with contain():
        source = provider.stream(params)
        if inspect.isawaitable(source):
            async with deadline.enforced():
                source = await source
        if not hasattr(source, "__aiter__"):
            kind = type(source).__name__
            raise AgentFailed(
                f"the provider's stream(params) returned an object of type {kind}: make it an async generator"
            )
    return source
