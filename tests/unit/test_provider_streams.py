import socket
from collections.abc import AsyncIterator
from contextlib import ExitStack

import msgspec
import pytest
from support.openai_server import ERROR_EVENT, OpenAIServer, Reply, text_event
from support.providers import ASK, provider_for, streamed
from support.wait import until

from loom.agents.llm.openai import openai_provider
from loom.agents.llm.openai.openai_provider import OpenAIProvider
from loom.schemas.errors import AgentFailed, DeadlineExceeded


@pytest.fixture
async def server() -> AsyncIterator[OpenAIServer]:
    async with OpenAIServer() as running:
        yield running


@pytest.fixture
async def provider(server: OpenAIServer) -> AsyncIterator[OpenAIProvider]:
    made = provider_for(server.base_url)
    yield made
    await made.aclose()


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize("silent", [Reply(text="never", delay_s=30), Reply(text="never", silent_after=1)])
async def test_silence_is_tried_again(
    server: OpenAIServer, silent: Reply, streaming: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(openai_provider, "BACKOFF_S", 0.01)
    provider = provider_for(server.base_url, timeout_s=0.2)
    server.answer = lambda _: Reply(text="here")
    server.script(silent if streaming else Reply(delay_s=30))
    text = "".join(c.text for c in await streamed(provider)) if streaming else (await provider.complete(ASK)).content

    assert text == "here"
    await provider.aclose()


@pytest.mark.parametrize(
    ("name", "reason"), [("ReadTimeout", "sent nothing"), ("ReadError", "connection"), ("ConnectTimeout", "be reached")]
)
async def test_an_error_the_library_lets_through_is_understood(
    server: OpenAIServer, provider: OpenAIProvider, name: str, reason: str
) -> None:
    await provider.complete(ASK)
    error = type(name, (Exception,), {"__module__": "httpx"})()
    fault = provider._fault(error)

    assert reason in fault.error.message
    assert fault.retryable


async def test_silence_in_the_middle_is_a_failure(server: OpenAIServer) -> None:
    provider = provider_for(server.base_url, timeout_s=0.2)
    server.script(Reply(text="a text of several pieces", silent_after=3))
    with pytest.raises(AgentFailed, match=r"broke off: .* sent nothing for 0\.2 s"):
        await streamed(provider)

    assert len(server.requests) == 1
    await provider.aclose()


@pytest.mark.slow
async def test_a_server_out_of_reach_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openai_provider, "BACKOFF_S", 0.01)
    with ExitStack() as stack:
        deaf = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        for _ in range(4):  # its queue is full: who comes now gets no answer at all
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(deaf.getsockname())
        provider = provider_for(f"http://127.0.0.1:{deaf.getsockname()[1]}/v1", connect_timeout_s=0.2)
        with pytest.raises(AgentFailed, match=r"could not be reached within 0\.2 s"):
            await provider.complete(ASK)
        await provider.aclose()


@pytest.mark.parametrize("lost", [Reply(text="lost", cut_after=0), Reply(events=(ERROR_EVENT,))])
async def test_a_stream_that_breaks_before_its_first_text_is_retried(
    server: OpenAIServer, provider: OpenAIProvider, lost: Reply, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(openai_provider, "BACKOFF_S", 0.01)
    server.script(lost, Reply(text="found"))

    assert "".join(chunk.text for chunk in await streamed(provider)) == "found"


async def test_a_dropped_connection_is_tried_again(
    server: OpenAIServer, provider: OpenAIProvider, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(openai_provider, "BACKOFF_S", 0.01)
    server.script(Reply(cut_after=0), Reply(text="found"))

    assert (await provider.complete(ASK)).content == "found"


async def test_an_error_in_the_middle_of_a_stream_is_a_failure(server: OpenAIServer, provider: OpenAIProvider) -> None:
    server.script(Reply(events=(text_event("well, "), ERROR_EVENT)))
    with pytest.raises(AgentFailed, match=r"broke off: .* failed: the engine stopped"):
        await streamed(provider)

    assert len(server.requests) == 1


@pytest.mark.parametrize("events", [0, 1])
async def test_a_stream_cut_before_its_first_text_is_tried_again(
    server: OpenAIServer, provider: OpenAIProvider, events: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(openai_provider, "BACKOFF_S", 0.01)
    server.script(Reply(text="lost", cut_after=events), Reply(text="found"))
    chunks = await streamed(provider)

    assert "".join(chunk.text for chunk in chunks) == "found"


async def test_a_stream_cut_later_fails_without_another_try(server: OpenAIServer, provider: OpenAIProvider) -> None:
    server.script(Reply(text="a text of several pieces", cut_after=3))
    seen = []

    async def read() -> None:
        async for chunk in provider.stream(ASK):
            seen.append(chunk.text)  # noqa: PERF401 - what came before the failure counts

    with pytest.raises(AgentFailed, match="broke off"):
        await read()

    assert seen == ["a text o", "f severa"]
    assert len(server.requests) == 1


async def test_a_stream_that_just_ends_has_broken_off(server: OpenAIServer, provider: OpenAIProvider) -> None:
    server.script(Reply(text="half an ans", finish_reason=None))
    with pytest.raises(AgentFailed, match=r"broke off: the model's server at \S+ ended the stream"):
        await streamed(provider)

    assert len(server.requests) == 1


STRANGE = [
    '{"choices": []}',
    '{"choices": [{"index": 0, "delta": {}}]}',
    '"?"',
    "[1]",
    '{"choices": null}',
    '{"choices": [{}]}',
    "{broken",
    "<html>",
]


@pytest.mark.parametrize("event", STRANGE)
async def test_a_stream_of_nothing_is_tried_again_and_has_broken_off_in_the_end(
    server: OpenAIServer, provider: OpenAIProvider, event: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(openai_provider, "BACKOFF_S", 0.01)
    server.answer = lambda _: Reply(events=(event,))
    with pytest.raises(AgentFailed, match="broke off: the model's server at"):
        await streamed(provider)

    assert len(server.requests) == 3


@pytest.mark.parametrize("streaming", [True, False])
async def test_an_answer_that_comes_too_late_is_a_missed_deadline(
    server: OpenAIServer, provider: OpenAIProvider, streaming: bool
) -> None:
    server.answer = lambda _: Reply(text="late", delay_s=30)
    hurried = msgspec.structs.replace(ASK, timeout_s=0.1)
    with pytest.raises(DeadlineExceeded):
        await (streamed(provider, hurried) if streaming else provider.complete(hurried))


@pytest.mark.slow
async def test_a_stream_that_dawdles_misses_its_deadline(server: OpenAIServer, provider: OpenAIProvider) -> None:
    await provider.complete(ASK)  # the first use imports the library, which takes time of its own
    server.script(Reply(text="word " * 500, pause_s=0.05))
    with pytest.raises(DeadlineExceeded):
        await streamed(provider, msgspec.structs.replace(ASK, timeout_s=0.5))

    await until(lambda: server.disconnects == 1, what="the client hung up")
