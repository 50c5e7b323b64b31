import asyncio
import time
from collections.abc import AsyncIterator

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.openai_server import OpenAIServer, Reply
from support.providers import ASK, KEY, provider_for, streamed

from loom.agents.llm.config import AgentConfig
from loom.agents.llm.openai import openai_provider
from loom.agents.llm.openai.openai_provider import OpenAIProvider, backoff_s
from loom.agents.llm.openai.waits import retry_after_s
from loom.schemas.errors import AgentFailed

NOW = {"Retry-After": "0"}


@pytest.fixture
async def server() -> AsyncIterator[OpenAIServer]:
    async with OpenAIServer() as running:
        yield running


@pytest.fixture
async def provider(server: OpenAIServer) -> AsyncIterator[OpenAIProvider]:
    made = provider_for(server.base_url)
    yield made
    await made.aclose()


@pytest.mark.slow
@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize("status", [429, 500, 502, 503])
async def test_a_passing_fault_of_the_server_is_tried_again(
    server: OpenAIServer, provider: OpenAIProvider, status: int, streaming: bool
) -> None:
    server.script(Reply(status=status, headers=NOW), Reply(status=status, headers=NOW), Reply(text="at last"))
    text = "".join(c.text for c in await streamed(provider)) if streaming else (await provider.complete(ASK)).content

    assert text == "at last"
    assert len(server.requests) == 3


async def test_three_tries_are_all(server: OpenAIServer, provider: OpenAIProvider) -> None:
    server.answer = lambda _: Reply(status=503, headers=NOW, body='{"error": {"message": "out of order"}}')
    with pytest.raises(AgentFailed, match=r"the model's server at 127\.0\.0\.1:\d+ failed \(503\): out of order"):
        await provider.complete(ASK)

    assert len(server.requests) == 3


@pytest.mark.parametrize("status", [400, 401, 403, 404, 422])
async def test_a_refusal_is_final(server: OpenAIServer, provider: OpenAIProvider, status: int) -> None:
    server.script(Reply(status=status, headers=NOW, body='{"error": {"message": "no"}}'))
    with pytest.raises(AgentFailed, match=f"{status}"):
        await streamed(provider)

    assert len(server.requests) == 1


@pytest.mark.parametrize("status", [400, 401])
async def test_no_error_repeats_the_key(server: OpenAIServer, provider: OpenAIProvider, status: int) -> None:
    server.script(Reply(status=status, body=f'{{"error": {{"message": "bad key {KEY}"}}}}'))
    with pytest.raises(AgentFailed) as caught:
        await provider.complete(ASK)

    assert KEY not in caught.value.message
    assert KEY not in repr(AgentConfig(api_key=KEY))


async def test_a_page_of_html_becomes_a_short_sentence(server: OpenAIServer, provider: OpenAIProvider) -> None:
    page = "<html><body><h1>502 Bad Gateway</h1>" + "x" * 5000 + "</body></html>"
    server.answer = lambda _: Reply(status=502, headers=NOW, body=page)
    with pytest.raises(AgentFailed) as caught:
        await streamed(provider)

    assert caught.value.message == f"the model's server at {server.base_url[7:-3]} failed (502)"


async def test_a_wait_longer_than_the_time_left_fails_at_once(server: OpenAIServer, provider: OpenAIProvider) -> None:
    server.script(Reply(status=429, headers={"Retry-After": "3600"}))
    async with asyncio.timeout(5):
        with pytest.raises(AgentFailed) as caught:
            await provider.complete(ASK)

    assert caught.value.retry_after_s == 3600
    assert len(server.requests) == 1


@pytest.mark.parametrize("streaming", [True, False])
async def test_a_long_wait_is_left_to_the_caller(
    server: OpenAIServer, provider: OpenAIProvider, streaming: bool
) -> None:
    patient = msgspec.structs.replace(ASK, timeout_s=3600)
    server.script(Reply(status=503, headers={"Retry-After": "6"}))
    async with asyncio.timeout(5):
        with pytest.raises(AgentFailed) as caught:
            await (streamed(provider, patient) if streaming else provider.complete(patient))

    assert caught.value.retry_after_s == 6 > openai_provider.PATIENCE_S
    assert len(server.requests) == 1


@pytest.mark.slow
@pytest.mark.parametrize("headers", [{"Retry-After": "1"}, {"retry-after-ms": "300", "Retry-After": "60"}])
async def test_a_short_retry_after_of_the_server_is_kept(
    server: OpenAIServer, provider: OpenAIProvider, headers: dict[str, str]
) -> None:
    asked_at: list[float] = []

    def busy_once(_: object) -> Reply:
        asked_at.append(time.monotonic())
        return Reply(text="now") if len(asked_at) > 1 else Reply(status=429, headers=headers)

    server.answer = busy_once

    assert (await provider.complete(ASK)).content == "now"
    assert asked_at[1] - asked_at[0] >= (retry_after_s({k.lower(): v for k, v in headers.items()}, now=0) or 0)


async def test_a_server_that_stays_busy_ends_with_its_last_error(
    server: OpenAIServer, provider: OpenAIProvider
) -> None:
    server.answer = lambda _: Reply(status=429, headers={"retry-after-ms": "1"})
    with pytest.raises(AgentFailed) as caught:
        await provider.complete(ASK)

    assert caught.value.retry_after_s == 0.001
    assert len(server.requests) == 3


async def test_a_refusal_promises_nothing_for_later(server: OpenAIServer, provider: OpenAIProvider) -> None:
    server.script(Reply(status=400, headers={"Retry-After": "60"}))
    with pytest.raises(AgentFailed) as caught:
        await provider.complete(ASK)

    assert caught.value.retry_after_s is None


@given(tries=st.integers(1, 10), jitter=st.floats(0, 1, exclude_max=True))
def test_the_wait_doubles_give_or_take_a_quarter(tries: int, jitter: float) -> None:
    assert 0.75 <= backoff_s(tries, jitter) / 2 ** (tries - 1) <= 1.25


async def test_the_error_text_of_a_server_can_be_forwarded(server: OpenAIServer, provider: OpenAIProvider) -> None:
    server.script(Reply(status=400, body='{"error": {"message": "half a pair: \\ud83d"}}'))
    with pytest.raises(AgentFailed, match="half a pair: ") as caught:
        await provider.complete(ASK)

    assert caught.value.message.encode()


async def test_of_a_refusal_without_end_the_beginning_is_read(server: OpenAIServer, provider: OpenAIProvider) -> None:
    server.script(Reply(status=400, body="no such model " + "x" * 100_000, headers={"Content-Length": str(10**9)}))

    with pytest.raises(AgentFailed, match=r"refused the request \(400\): no such model"):
        await asyncio.wait_for(provider.complete(ASK), 5)
    assert len(server.requests) == 1


@pytest.mark.parametrize("headers", [{"Content-Encoding": "gzip"}, {"Content-Type": "application/json; charset=rot13"}])
async def test_a_refusal_whose_body_cannot_be_decoded_keeps_its_status(
    server: OpenAIServer, provider: OpenAIProvider, headers: dict[str, str]
) -> None:
    server.script(Reply(status=400, body='{"error": "no"}', headers=headers))

    with pytest.raises(AgentFailed, match=r"refused the request \(400\)"):
        await provider.complete(ASK)
    assert len(server.requests) == 1
