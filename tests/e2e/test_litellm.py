"""Agents and the provider with a real litellm proxy, in front of a server that plays a reasoning model."""

import json
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import Any

import pytest
from support.environments import python_of
from support.litellm_proxy import UPSTREAM_KEY, LitellmProxy, litellm_proxy
from support.openai_server import Answerer, OpenAIServer, Reply, Request

from loom import Agent, AgentConfig, OpenAIProvider, Runtime, TaskAd
from loom.bus.bus import Bus
from loom.schemas.errors import AgentFailed
from loom.schemas.events import Done, ReasoningDelta, TextDelta, ToolCallEnd
from loom.schemas.llm import CompletionParams, UserMessage
from loom.schemas.run import RunRequest
from loom.types import CapabilityProfile

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]  # the environment is made on first use, the proxy is slow

REASONING, ANSWER = "Let me think.", "Forty-two."
USAGE = {"prompt_tokens": 7, "completion_tokens": 9, "completion_tokens_details": {"reasoning_tokens": 5}}

# litellm knows what o3-mini refuses and refuses it itself; of another model it passes everything on.
MODELS = ("o3-mini", "reasoner-of-the-house")
KNOWN, UNKNOWN = MODELS


@pytest.fixture(scope="session")
def model_server() -> Iterator[OpenAIServer]:
    with OpenAIServer() as server:
        yield server


@pytest.fixture(scope="session")
def proxy(model_server: OpenAIServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LitellmProxy]:
    python = python_of("litellm")
    models = {name: (f"openai/{name}", model_server.base_url) for name in MODELS}
    models["gone"] = ("openai/gone", "http://127.0.0.1:9/v1")
    with litellm_proxy(python, tmp_path_factory.mktemp("litellm"), models) as running:
        yield running


@pytest.fixture
def upstream(model_server: OpenAIServer) -> OpenAIServer:
    """The server behind the proxy, reset."""
    model_server.answer = refuses_parameters(lambda request: turn(request, content=ANSWER))
    model_server.requests.clear()
    return model_server


@pytest.fixture
async def provider_of(proxy: LitellmProxy) -> AsyncIterator[Callable[..., OpenAIProvider]]:
    made: list[OpenAIProvider] = []

    def provider_of(model: str, key: str = proxy.key) -> OpenAIProvider:
        made.append(OpenAIProvider(AgentConfig(model=model, api_key=key, base_url=proxy.base_url)))
        return made[-1]

    yield provider_of
    for each in made:
        await each.aclose()


def refuses_parameters(answer: Answerer) -> Answerer:
    """Refuse the parameters that OpenAI's reasoning models refuse, and otherwise answer."""

    def refuse_or_answer(request: Request) -> Reply:
        if "max_tokens" in request.body:
            return refusal(400, "Unsupported parameter: 'max_tokens' is not supported with this model.", "max_tokens")
        if request.body.get("temperature", 1) != 1:
            words = "Unsupported value: 'temperature' does not support 0.7 with this model."
            return refusal(400, words, "temperature")
        return answer(request)

    return refuse_or_answer


def turn(request: Request, *, content: str = "", tool_calls: Sequence[dict[str, Any]] = ()) -> Reply:
    """One turn of a model that reasons first: an answer, or calls of tools."""
    reason = "tool_calls" if tool_calls else "stop"
    if not request.body.get("stream"):
        message = {"role": "assistant", "content": content or None, "reasoning_content": REASONING}
        message |= {"tool_calls": list(tool_calls)} if tool_calls else {}
        choice = {"index": 0, "message": message, "finish_reason": reason}
        return Reply(body=json.dumps({**HEAD, "object": "chat.completion", "choices": [choice], "usage": USAGE}))
    pieces: list[dict[str, Any]] = [{"role": "assistant", "content": ""}]
    pieces += [{"reasoning_content": piece} for piece in REASONING.partition(" ")]
    pieces += [{"content": piece} for piece in content.partition("-") if piece]
    pieces += [{"tool_calls": [call]} for call in tool_calls]
    return Reply(events=(*map(chunk, pieces), chunk({}, finish_reason=reason), chunk(None, usage=USAGE), "[DONE]"))


HEAD = {"id": "c1", "created": 1, "model": "reasoner"}


def chunk(delta: dict[str, Any] | None, *, finish_reason: str | None = None, **more: Any) -> str:
    choices = [] if delta is None else [{"index": 0, "delta": delta, "finish_reason": finish_reason}]
    return json.dumps({**HEAD, "object": "chat.completion.chunk", "choices": choices, **more})


def refusal(
    status: int, message: str, param: str | None = None, code: str = "unsupported_parameter", *, passing: bool = True
) -> Reply:
    error = {"message": message, "type": "invalid_request_error", "param": param, "code": code}
    return Reply(status=status, body=json.dumps({"error": error}), headers={"Retry-After": "0"} if passing else {})


def refused(upstream: OpenAIServer) -> list[str]:
    """Return the received parameters that the model's server refuses, in order."""
    bodies = [request.body for request in upstream.requests]
    return [name for body in bodies for name in ("max_tokens", "temperature") if name in body]


@pytest.mark.parametrize("model", MODELS)
async def test_a_job_of_a_reasoning_model_ends_with_its_answer(
    phases: Bus, upstream: OpenAIServer, provider_of: Callable[..., OpenAIProvider], model: str
) -> None:
    rt = Runtime(provider=provider_of(model))
    rt.add_agent(name="thinker", capabilities=CapabilityProfile(scores={"x": 0.9}))
    async with rt:
        handle = await rt.publish(TaskAd(domain="x", description="What is it?", estimated_complexity=0.1, timeout_s=60))
        events = [delta.event async for delta in handle.events()]
        result = await handle.result(30)

        assert (result.state, result.content, result.attempts) == ("succeeded", ANSWER, 1), result.error
        assert "".join(each.text for each in events if isinstance(each, TextDelta)) == ANSWER
        assert "".join(each.text for each in events if isinstance(each, ReasoningDelta)) == REASONING
        assert (result.prompt_tokens, result.completion_tokens) == (7, 9)


@pytest.mark.parametrize("model", MODELS)
async def test_a_whole_answer_has_the_reasoning_next_to_it(
    upstream: OpenAIServer, provider_of: Callable[..., OpenAIProvider], model: str
) -> None:
    agent = Agent(provider_of(model), AgentConfig(stream=False))
    events = [event async for event in agent.stream(RunRequest(task_id="t", description="What is it?"))]

    assert "".join(each.text for each in events if isinstance(each, ReasoningDelta)) == REASONING
    assert isinstance(events[-1], Done)
    assert (events[-1].content, events[-1].usage.completion_tokens) == (ANSWER, 9)


@pytest.mark.parametrize("stream", [True, False])
async def test_reasoning_goes_back_with_the_calls_it_led_to(
    upstream: OpenAIServer, provider_of: Callable[..., OpenAIProvider], stream: bool
) -> None:
    calls = [
        {"index": n, "id": f"c{n}", "type": "function", "function": {"name": "add", "arguments": call}}
        for n, call in enumerate(('{"a": 1, "b": 2}', '{"a": 3, "b": 4}'))
    ]

    def wants_its_reasoning_back(request: Request) -> Reply:
        """Call a tool twice; then, as some reasoning models do, refuse a conversation that lacks the reasoning."""
        *_, asked = [None, *(each for each in request.messages if each["role"] == "assistant")]
        if asked is None:
            return turn(request, tool_calls=calls)
        if asked.get("reasoning_content") != REASONING:
            return refusal(400, "Missing `reasoning_content` in the assistant message.", "messages")
        return turn(request, content=ANSWER)

    def add(a: int, b: int) -> int:
        return a + b

    upstream.answer = refuses_parameters(wants_its_reasoning_back)
    agent = Agent(provider_of(UNKNOWN), AgentConfig(stream=stream), tools=[add])
    events = [event async for event in agent.stream(RunRequest(task_id="t", description="What is it?"))]

    assert sorted(each.result for each in events if isinstance(each, ToolCallEnd)) == ["3", "7"]
    assert isinstance(events[-1], Done)
    assert events[-1].content == ANSWER
    results = [each["content"] for each in upstream.requests[-1].messages if each["role"] == "tool"]
    assert results == ["3", "7"]


@pytest.mark.parametrize("model", MODELS)
async def test_a_refused_parameter_is_sent_to_a_model_once(
    upstream: OpenAIServer, provider_of: Callable[..., OpenAIProvider], model: str
) -> None:
    provider = provider_of(model)
    question = CompletionParams(messages=(UserMessage("What is it?"),), timeout_s=30)
    await provider.complete(question)
    upstream.requests.clear()
    answer = await provider.complete(question)

    assert answer.content == ANSWER
    assert (len(upstream.requests), refused(upstream)) == (1, [])


@pytest.mark.parametrize(
    ("status", "reason", "stream", "tries"),
    [
        (400, "This model's maximum context length is 128000 tokens", True, 1),
        (400, "This model's maximum context length is 128000 tokens", False, 1),
        (429, "You exceeded your current quota, please check your plan and billing details", True, 1),
        (429, "Rate limit reached for tokens per minute", True, 3),
        (503, "The engine is overloaded", False, 3),
    ],
)
async def test_an_error_keeps_the_reason_of_the_model_s_server(
    upstream: OpenAIServer,
    provider_of: Callable[..., OpenAIProvider],
    status: int,
    reason: str,
    stream: bool,
    tries: int,
) -> None:
    upstream.answer = lambda _: refusal(status, reason, code="", passing=tries > 1)
    agent = Agent(provider_of(UNKNOWN), AgentConfig(stream=stream))
    with pytest.raises(AgentFailed) as caught:
        await agent.run(RunRequest(task_id="t", description="What is it?", remaining_s=30))

    assert reason in caught.value.message
    assert str(status) in caught.value.message
    assert len(upstream.requests) == tries


async def test_an_answer_that_breaks_off_behind_the_proxy_keeps_the_reason(
    upstream: OpenAIServer, provider_of: Callable[..., OpenAIProvider]
) -> None:
    stopped = json.dumps({"error": {"message": "the engine stopped", "type": "server_error"}})
    upstream.answer = lambda _: Reply(events=(chunk({"role": "assistant", "content": "Forty"}), stopped))
    agent = Agent(provider_of(UNKNOWN))
    with pytest.raises(AgentFailed, match=r"broke off.*the engine stopped") as caught:
        await agent.run(RunRequest(task_id="t", description="What is it?", remaining_s=30))

    assert isinstance(caught.value.spent, Done)
    assert caught.value.spent.content == "Forty"


async def test_a_key_that_the_model_s_server_refuses_is_named_and_not_repeated(
    upstream: OpenAIServer, provider_of: Callable[..., OpenAIProvider]
) -> None:
    upstream.answer = lambda _: refusal(401, f"Incorrect API key provided: {UPSTREAM_KEY}", code="invalid_api_key")
    with pytest.raises(AgentFailed, match="401") as caught:
        await provider_of(UNKNOWN).complete(CompletionParams(messages=(UserMessage("x"),), timeout_s=30))

    assert "key" in caught.value.message
    assert UPSTREAM_KEY not in caught.value.message


async def test_a_key_unknown_to_the_proxy_is_refused_with_the_message_of_the_proxy(
    proxy: LitellmProxy, upstream: OpenAIServer, provider_of: Callable[..., OpenAIProvider]
) -> None:
    with pytest.raises(AgentFailed, match=r"\(400\): No connected db"):  # litellm's answer without a database of keys
        await provider_of(UNKNOWN, "sk-wrong").complete(CompletionParams(messages=(UserMessage("x"),), timeout_s=30))

    assert upstream.requests == []


async def test_a_model_that_the_proxy_does_not_have_is_named(provider_of: Callable[..., OpenAIProvider]) -> None:
    with pytest.raises(AgentFailed, match="Invalid model name passed in model=missing"):
        await provider_of("missing").complete(CompletionParams(messages=(UserMessage("x"),), timeout_s=30))


async def test_a_model_whose_server_is_down_is_named_as_the_cause(provider_of: Callable[..., OpenAIProvider]) -> None:
    with pytest.raises(AgentFailed, match=r"500.*Connection error"):
        await provider_of("gone").complete(CompletionParams(messages=(UserMessage("x"),), timeout_s=30))
