import asyncio
import gc
import warnings
from collections.abc import AsyncIterator
from contextlib import aclosing

import pytest
from support.openai_server import OpenAIServer, Reply
from support.providers import ASK, provider_for, streamed
from support.wait import until

from loom.agents.llm.openai import openai_provider
from loom.agents.llm.openai.openai_provider import OpenAIProvider
from loom.schemas.errors import AgentFailed


@pytest.fixture
async def server() -> AsyncIterator[OpenAIServer]:
    async with OpenAIServer() as running:
        yield running


@pytest.fixture
async def provider(server: OpenAIServer) -> AsyncIterator[OpenAIProvider]:
    made = provider_for(server.base_url)
    yield made
    await made.aclose()


async def test_a_model_that_is_down_is_reported_as_down(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openai_provider, "BACKOFF_S", 0.01)
    async with OpenAIServer() as gone:
        url = gone.base_url
    provider = provider_for(url)
    with pytest.raises(AgentFailed, match=r"the connection to the model's server at 127\.0\.0\.1:\d+ failed"):
        await provider.complete(ASK)
    await provider.aclose()


async def test_a_missing_key_is_reported_as_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    with pytest.raises(AgentFailed, match="OPENAI_API_KEY"):
        await OpenAIProvider().complete(ASK)


async def test_a_self_hosted_server_needs_no_key(server: OpenAIServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setenv("OPENAI_BASE_URL", server.base_url)
    provider = OpenAIProvider()

    assert (await provider.complete(ASK)).content == "You wrote: How do you do?"
    await provider.aclose()


async def test_a_cancelled_stream_hangs_up_at_once(server: OpenAIServer, provider: OpenAIProvider) -> None:
    server.script(Reply(text="word " * 100, pause_s=0.05))
    task = asyncio.create_task(streamed(provider))
    await until(lambda: server.requests, what="the server was asked")
    task.cancel()
    await asyncio.wait({task}, timeout=1)

    assert task.cancelled()
    await until(lambda: server.disconnects, within_s=1, what="the client hung up")


async def test_an_unfinished_stream_disconnects_when_closed(server: OpenAIServer, provider: OpenAIProvider) -> None:
    server.script(Reply(text="word " * 100, pause_s=0.05))
    async with aclosing(provider.stream(ASK)) as chunks:
        await anext(chunks)
    await until(lambda: server.disconnects, within_s=1, what="the client hung up")


async def test_requests_share_connections(server: OpenAIServer, provider: OpenAIProvider) -> None:
    for _ in range(3):
        await provider.complete(ASK)

    assert server.connections == 1


def test_one_provider_serves_several_event_loops_and_leaves_nothing_open() -> None:
    with OpenAIServer() as server, warnings.catch_warnings():
        warnings.simplefilter("error")
        provider = provider_for(server.base_url)
        answers = [asyncio.run(provider.complete(ASK)).content for _ in range(3)]
        gc.collect()

        assert answers == ["You wrote: How do you do?"] * 3
        assert len(provider._clients._clients) == 1
