import asyncio
import gc
import json
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import AsyncIterator
from contextlib import ExitStack, aclosing
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.openai_server import ERROR_EVENT, OpenAIServer, Reply, sample, text_event
from support.wait import until

from loom.agents.llm import openai_provider
from loom.agents.llm.config import AgentConfig
from loom.agents.llm.openai_provider import OpenAIProvider, backoff_s, retry_after_s
from loom.schemas.errors import AgentFailed, DeadlineExceeded
from loom.schemas.llm import (
    CompletionParams,
    LLMProvider,
    Message,
    StreamChunk,
    SystemMessage,
    ToolCall,
    ToolDefinition,
    Usage,
    UserMessage,
)

KEY = "sk-very-secret"
ASK = CompletionParams(messages=(UserMessage("How do you do?"),), timeout_s=10)
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


def provider_for(base_url: str) -> OpenAIProvider:
    return OpenAIProvider(AgentConfig(api_key=KEY, base_url=base_url, model="tiny"))


async def streamed(provider: OpenAIProvider, params: CompletionParams = ASK) -> list[StreamChunk]:
    return [chunk async for chunk in provider.stream(params)]


def test_it_is_a_provider() -> None:
    assert isinstance(OpenAIProvider(), LLMProvider)


async def test_a_whole_answer_has_text_usage_and_reason(server: OpenAIServer, provider: OpenAIProvider) -> None:
    server.script(Reply(text="Very well.", usage=(7, 3)))
    result = await provider.complete(ASK)

    assert result.content == "Very well."
    assert result.usage == Usage(prompt_tokens=7, completion_tokens=3)
    assert result.finish_reason == "stop"


async def test_a_streamed_answer_comes_in_pieces_and_ends_with_usage_and_reason(
    server: OpenAIServer, provider: OpenAIProvider
) -> None:
    server.script(Reply(text="A text of more than one piece.", usage=(7, 3), no_choices=True))
    chunks = await streamed(provider)

    assert len(chunks) > 2
    assert "".join(chunk.text for chunk in chunks) == "A text of more than one piece."
    assert (chunks[-1].usage, chunks[-1].finish_reason) == (Usage(prompt_tokens=7, completion_tokens=3), "stop")


@pytest.mark.parametrize("streaming", [True, False])
async def test_tool_calls_arrive_whole_and_unchecked(
    server: OpenAIServer, provider: OpenAIProvider, streaming: bool
) -> None:
    server.script(Reply(tool_calls=(("add", '{"a": 1, "b": 2}'), ("look", "not json"))))
    calls = (await streamed(provider))[-1].tool_calls if streaming else (await provider.complete(ASK)).tool_calls

    assert calls == (
        ToolCall(id="call_0", name="add", arguments='{"a": 1, "b": 2}'),
        ToolCall(id="call_1", name="look", arguments="not json"),
    )


async def test_the_request_says_all_that_was_asked(server: OpenAIServer, provider: OpenAIProvider) -> None:
    call = ToolCall(id="c1", name="add", arguments="{}")
    params = CompletionParams(
        messages=(
            SystemMessage("Be brief."),
            UserMessage("1 + 1?"),
            Message(role="assistant", tool_calls=(call,)),
            Message(role="tool", content="2", tool_call_id="c1"),
        ),
        tools=(ToolDefinition(name="add", description="Add.", parameters={"type": "object", "properties": {}}),),
        temperature=0.1,
        max_tokens=99,
        json_schema={"type": "object"},
    )
    await streamed(provider, params)

    asked = server.requests[0]
    assert asked.headers["authorization"] == f"Bearer {KEY}"
    assert asked.body["model"] == "tiny"
    assert (asked.body["temperature"], asked.body["max_tokens"]) == (0.1, 99)
    assert [message["role"] for message in asked.messages] == ["system", "user", "assistant", "tool"]
    assert asked.messages[2]["tool_calls"][0]["function"] == {"name": "add", "arguments": "{}"}
    assert asked.messages[3]["tool_call_id"] == "c1"
    assert asked.body["tools"][0]["function"]["name"] == "add"
    assert asked.body["response_format"]["json_schema"]["schema"] == {"type": "object"}


async def test_an_answer_of_a_schema_can_be_asked_for(provider: OpenAIProvider) -> None:
    schema = {
        "type": "object",
        "properties": {"complexity": {"type": "number"}, "domains": {"type": "array", "items": {"type": "string"}}},
    }
    result = await provider.complete(msgspec.structs.replace(ASK, json_schema=schema))

    assert msgspec.json.decode(result.content) == sample(schema) == {"complexity": 0.5, "domains": ["general"]}


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
async def test_a_long_wait_is_left_to_whoever_called(
    server: OpenAIServer, provider: OpenAIProvider, streaming: bool
) -> None:
    patient = msgspec.structs.replace(ASK, timeout_s=3600)
    server.script(Reply(status=503, headers={"Retry-After": "6"}))
    async with asyncio.timeout(5):
        with pytest.raises(AgentFailed) as caught:
            await (streamed(provider, patient) if streaming else provider.complete(patient))

    assert caught.value.retry_after_s == 6 > openai_provider.PATIENCE_S
    assert len(server.requests) == 1


@pytest.mark.parametrize("headers", [{"Retry-After": "1"}, {"retry-after-ms": "300", "Retry-After": "60"}])
async def test_a_short_wait_the_server_asks_for_is_kept(
    server: OpenAIServer, provider: OpenAIProvider, headers: dict[str, str]
) -> None:
    asked_at: list[float] = []

    def busy_once(_: object) -> Reply:
        asked_at.append(time.monotonic())
        return Reply(text="now") if len(asked_at) > 1 else Reply(status=429, headers=headers)

    server.answer = busy_once

    assert (await provider.complete(ASK)).content == "now"
    assert asked_at[1] - asked_at[0] >= (retry_after_s({k.lower(): v for k, v in headers.items()}, now=0) or 0)


async def test_a_server_that_stays_busy_is_given_up_with_its_last_word(
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


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize("silent", [Reply(text="never", delay_s=30), Reply(text="never", silent_after=1)])
async def test_silence_is_tried_again(
    server: OpenAIServer, provider: OpenAIProvider, silent: Reply, streaming: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(openai_provider, "SILENCE_S", 0.2)
    monkeypatch.setattr(openai_provider, "BACKOFF_S", 0.01)
    server.answer = lambda _: Reply(text="here")
    server.script(silent if streaming else Reply(delay_s=30))
    text = "".join(c.text for c in await streamed(provider)) if streaming else (await provider.complete(ASK)).content

    assert text == "here"


@pytest.mark.parametrize(
    ("name", "said"), [("ReadTimeout", "said nothing"), ("ReadError", "connection"), ("ConnectTimeout", "be reached")]
)
async def test_an_error_the_library_lets_through_is_understood(
    server: OpenAIServer, provider: OpenAIProvider, name: str, said: str
) -> None:
    await provider.complete(ASK)
    error = type(name, (Exception,), {"__module__": "httpx"})()
    failure, curable = provider._failure(error)

    assert said in failure.message
    assert curable


async def test_silence_in_the_middle_is_a_failure(
    server: OpenAIServer, provider: OpenAIProvider, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(openai_provider, "SILENCE_S", 0.2)
    server.script(Reply(text="a text of several pieces", silent_after=3))
    with pytest.raises(AgentFailed, match=r"broke off: .* said nothing for 0\.2 s"):
        await streamed(provider)

    assert len(server.requests) == 1


async def test_a_server_out_of_reach_is_said_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openai_provider, "BACKOFF_S", 0.01)
    monkeypatch.setattr(openai_provider, "CONNECT_S", 0.2)
    with ExitStack() as stack:
        deaf = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        for _ in range(4):  # its queue is full: who comes now gets no answer at all
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(deaf.getsockname())
        provider = provider_for(f"http://127.0.0.1:{deaf.getsockname()[1]}/v1")
        with pytest.raises(AgentFailed, match=r"could not be reached within 0\.2 s"):
            await provider.complete(ASK)
        await provider.aclose()


@pytest.mark.parametrize("lost", [Reply(text="lost", cut_after=0), Reply(events=(ERROR_EVENT,))])
async def test_what_breaks_before_its_first_text_is_tried_again(
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


async def test_a_stream_that_just_ends_is_a_failure(server: OpenAIServer, provider: OpenAIProvider) -> None:
    server.script(Reply(text="half an ans", finish_reason=None))
    with pytest.raises(AgentFailed, match="broke off"):
        await streamed(provider)


@pytest.mark.parametrize("event", ['{"choices": []}', '{"choices": [{"index": 0, "delta": {}}]}'])
async def test_a_stream_of_nothing_is_a_failure(server: OpenAIServer, provider: OpenAIProvider, event: str) -> None:
    server.script(Reply(events=(event,)))
    with pytest.raises(AgentFailed, match="broke off"):
        await streamed(provider)


@pytest.mark.parametrize("event", ['"?"', "[1]", '{"choices": null}', '{"choices": [{}]}', "{broken", "<html>"])
async def test_a_stream_of_another_form_is_a_failure(
    server: OpenAIServer, provider: OpenAIProvider, event: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(openai_provider, "BACKOFF_S", 0.01)
    server.answer = lambda _: Reply(events=(event,))
    with pytest.raises(AgentFailed, match="the model's server at"):
        await streamed(provider)


@pytest.mark.parametrize("told", [(-1, 3), (1.5, 3), ("7", "3"), ([], {}), (None, None)])
async def test_nonsense_about_usage_does_not_spoil_an_answer(
    server: OpenAIServer, provider: OpenAIProvider, told: tuple[Any, Any]
) -> None:
    usage = dict(zip(("prompt_tokens", "completion_tokens"), told, strict=True))
    choice = {"index": 0, "message": {"role": "assistant", "content": "fine"}, "finish_reason": "stop"}
    server.script(Reply(body=json.dumps({"choices": [choice], "usage": usage})))
    result = await provider.complete(ASK)

    assert (result.content, result.usage) == ("fine", None)


async def test_what_a_server_says_of_its_failure_can_be_sent_on(server: OpenAIServer, provider: OpenAIProvider) -> None:
    server.script(Reply(status=400, body='{"error": {"message": "half a pair: \\ud83d"}}'))
    with pytest.raises(AgentFailed, match="half a pair: ") as caught:
        await provider.complete(ASK)

    assert caught.value.message.encode()


@pytest.mark.parametrize("body", ['{"hello": "world"}', "<html>Welcome!</html>", '{"choices": []}', "{broken"])
async def test_an_answer_of_another_form_is_a_failure(
    server: OpenAIServer, provider: OpenAIProvider, body: str
) -> None:
    server.script(Reply(body=body))
    with pytest.raises(AgentFailed, match="could not be read"):
        await provider.complete(ASK)


async def test_a_model_that_is_down_is_said_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openai_provider, "BACKOFF_S", 0.01)
    async with OpenAIServer() as gone:
        url = gone.base_url
    provider = provider_for(url)
    with pytest.raises(AgentFailed, match=r"the connection to the model's server at 127\.0\.0\.1:\d+ failed"):
        await provider.complete(ASK)
    await provider.aclose()


async def test_a_missing_key_is_said_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    with pytest.raises(AgentFailed, match="OPENAI_API_KEY"):
        await OpenAIProvider().complete(ASK)


async def test_a_server_of_ones_own_needs_no_key(server: OpenAIServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setenv("OPENAI_BASE_URL", server.base_url)
    provider = OpenAIProvider()

    assert (await provider.complete(ASK)).content == "You said: How do you do?"
    await provider.aclose()


async def test_a_cancelled_stream_hangs_up_at_once(server: OpenAIServer, provider: OpenAIProvider) -> None:
    server.script(Reply(text="word " * 100, pause_s=0.05))
    task = asyncio.create_task(streamed(provider))
    await until(lambda: server.requests, what="the server was asked")
    task.cancel()
    await asyncio.wait({task}, timeout=1)

    assert task.cancelled()
    await until(lambda: server.disconnects, within_s=1, what="the client hung up")


async def test_a_stream_nobody_reads_on_hangs_up_when_closed(server: OpenAIServer, provider: OpenAIProvider) -> None:
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

        assert answers == ["You said: How do you do?"] * 3
        assert len(provider._clients) == 1


def test_importing_it_does_not_import_openai() -> None:
    code = "import sys, loom.agents.llm.openai_provider; sys.exit('openai' in sys.modules)"

    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@given(tries=st.integers(1, 10), jitter=st.floats(0, 1, exclude_max=True))
def test_the_wait_doubles_give_or_take_a_quarter(tries: int, jitter: float) -> None:
    assert 0.75 <= backoff_s(tries, jitter) / 2 ** (tries - 1) <= 1.25


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({}, None),
        ({"retry-after": "7"}, 7.0),
        ({"retry-after": "7", "retry-after-ms": "250"}, 0.25),
        ({"retry-after": "Thu, 01 Jan 1970 00:01:40 GMT"}, 40.0),
        ({"retry-after": "Thu, 01 Jan 1970 00:00:10 GMT"}, 0.0),
        ({"retry-after": "Thu, 01 Jan 1970 02:00:07 GMT", "date": "Thu, 01 Jan 1970 02:00:00 GMT"}, 7.0),
    ],
)
def test_the_wait_a_server_asks_for_is_understood(headers: dict[str, str], expected: float | None) -> None:
    assert retry_after_s(headers, now=60.0) == expected


@given(st.text())
def test_no_retry_after_header_does_harm(text: str) -> None:
    wait = retry_after_s({"retry-after": text}, now=60.0)

    assert wait is None or 0 <= wait < float("inf")
