"""Agents and the provider with a real llama.cpp server."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace
from support.environments import python_of
from support.llamacpp_server import KEY, LlamaServer, llamacpp_server, scripted_model, tool_call
from support.wait import until

from loom import Agent, AgentConfig, OpenAIProvider, Runtime, TaskAd, tool
from loom.agents.protocol import collect
from loom.bus.bus import Bus
from loom.schemas.errors import AgentFailed
from loom.schemas.events import AgentEvent, Done, ReasoningDelta, TextDelta, ToolCallEnd, ToolCallStart
from loom.schemas.llm import CompletionParams, StreamChunk, ToolDefinition, UserMessage
from loom.schemas.run import RunRequest
from loom.schemas.task import Accept
from loom.types import CapabilityProfile

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]  # the environment is made on first use

HELLO = ("Hello", " from", " llama.cpp.")
CHAINS = {
    "hello": HELLO,
    "think": ("<think>\n", "Hm, hm.", "\n</think>\n\n", "Thought", " through."),
    "tools": (
        *tool_call("add", '{"a": 1, "b": 2}'),
        "\n",
        *tool_call("greet", '{"who": "Ada"}')[:2],
        "}\n</tool_call>\n",
    ),
    "cut": (
        '<tool_call>\n{"name": "note", ',
        '"arguments": {"text": "',
        "one",
        " two",
        " three",
        " four",
        '"}}</tool_call>',
    ),
    "plan": (
        "<think>\nFirst,",
        " a plan.",
        " </think>\n\n",
        '<tool_call>\n{"name": "choose", ',
        '"arguments": {"size": "small"}',
        "\n}</tool_call>",
    ),
    "after_tools": ("The", " tools", " have", " answered."),
}
OPENINGS = {"choose": ('<tool_call>\n{"name": "choose", "arguments": ',), "size": ('{"size": ',)}
SCHEMA = {
    "type": "object",
    "properties": {"size": {"enum": ["small", "large"]}},
    "required": ["size"],
    "additionalProperties": False,
}
LOOPS = {"endless": ("tick ", "tock ")}


@pytest.fixture(scope="session")
def python() -> Path:
    return python_of("llamacpp")


@pytest.fixture(scope="session")
def model(python: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return scripted_model(
        python, tmp_path_factory.mktemp("models") / "scripted.gguf", CHAINS, loops=LOOPS, openings=OPENINGS
    )


@pytest.fixture
async def server(python: Path, model: Path, tmp_path: Path) -> AsyncIterator[LlamaServer]:
    async with llamacpp_server(python, model, tmp_path) as running:
        yield running


@pytest.fixture
async def provider(server: LlamaServer) -> AsyncIterator[OpenAIProvider]:
    made = provider_for(server)
    yield made
    await made.aclose()


def provider_for(server: LlamaServer, key: str = KEY, **more: Any) -> OpenAIProvider:
    return OpenAIProvider(AgentConfig(model="scripted", api_key=key, base_url=server.base_url, **more))


def asking(text: str, **more: Any) -> CompletionParams:
    return CompletionParams(messages=(UserMessage(text),), timeout_s=20, **more)


def job(text: str) -> RunRequest:
    return RunRequest(task_id="t", description=text, remaining_s=20)


async def streamed(provider: OpenAIProvider, params: CompletionParams) -> list[StreamChunk]:
    return [chunk async for chunk in provider.stream(params)]


async def test_a_whole_answer_has_text_usage_and_reason(provider: OpenAIProvider) -> None:
    answer = await provider.complete(asking("[hello]"))

    assert (answer.content, answer.finish_reason) == ("".join(HELLO), "stop")
    assert answer.usage is not None
    assert (answer.usage.completion_tokens, answer.usage.prompt_tokens > 0) == (len(HELLO) + 1, True)


async def test_a_stream_comes_token_by_token_and_ends_with_usage_and_reason(provider: OpenAIProvider) -> None:
    chunks = await streamed(provider, asking("[hello]"))

    assert [chunk.text for chunk in chunks if chunk.text] == list(HELLO)
    assert chunks[-1].finish_reason == "stop"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == len(HELLO) + 1


async def test_a_cut_answer_is_known_by_its_reason(provider: OpenAIProvider) -> None:
    chunks = await streamed(provider, asking("[endless]", max_tokens=4))

    assert ("".join(chunk.text for chunk in chunks), chunks[-1].finish_reason) == ("tick tock tick tock ", "length")


async def test_an_answer_is_held_to_a_schema(provider: OpenAIProvider) -> None:
    answer = await provider.complete(asking("[size]", json_schema=SCHEMA))

    assert answer.content.translate(str.maketrans("", "", " \n\t")) in ('{"size":"small"}', '{"size":"large"}')


@pytest.mark.parametrize("stream", [True, False])
async def test_tools_called_in_one_round_run_concurrently(provider: OpenAIProvider, stream: bool) -> None:
    both = asyncio.Barrier(2)

    @tool
    async def add(a: int, b: int) -> int:
        """Add two numbers."""
        await both.wait()
        return a + b

    @tool
    async def greet(who: str) -> str:
        """Greet a person."""
        await both.wait()
        return f"Hello, {who}!"

    agent = Agent(provider, AgentConfig(stream=stream), tools=[add, greet])
    events = [event async for event in agent.stream(job("[tools]"))]

    assert [(each.name, each.input) for each in events if isinstance(each, ToolCallStart)] == [
        ("add", {"a": 1, "b": 2}),
        ("greet", {"who": "Ada"}),
    ]
    ends = {each.name: (each.result, each.failed) for each in events if isinstance(each, ToolCallEnd)}
    assert ends == {"add": ("3", False), "greet": ("Hello, Ada!", False)}
    done = events[-1]
    assert isinstance(done, Done)
    assert (done.content, done.steps) == ("The tools have answered.", 2)
    assert done.usage.completion_tokens == len(CHAINS["tools"]) + len(CHAINS["after_tools"]) + 2
    assert not done.usage.estimated


async def test_a_call_cut_by_the_token_limit_fails_alone_and_the_conversation_continues(
    provider: OpenAIProvider,
) -> None:
    noted = []

    @tool
    def note(text: str) -> str:
        """Write a note."""
        noted.append(text)
        return "written"

    agent = Agent(provider, AgentConfig(max_tokens=len(CHAINS["cut"]) - 1), tools=[note])
    events = [event async for event in agent.stream(job("[cut]"))]

    assert [each.failed for each in events if isinstance(each, ToolCallEnd)] == [True]
    assert noted == []
    assert isinstance(events[-1], Done)
    assert events[-1].content == "The tools have answered."


async def test_a_model_with_tool_choice_required_calls_a_tool_as_its_schema_demands(server: LlamaServer) -> None:
    provider = provider_for(server, tool_choice="required", extra={"top_k": 0, "seed": 7})
    wanted = asking("[choose]", tools=(ToolDefinition(name="choose", parameters=SCHEMA),))
    answer = await provider.complete(wanted)
    await provider.aclose()

    assert answer.tool_calls
    assert {call.name for call in answer.tool_calls} == {"choose"}
    assert all(json.loads(call.arguments)["size"] in ("small", "large") for call in answer.tool_calls)


@pytest.mark.parametrize("stream", [True, False])
async def test_reasoning_is_kept_apart_from_the_answer(provider: OpenAIProvider, stream: bool) -> None:
    agent = Agent(provider, AgentConfig(stream=stream))
    events = [event async for event in agent.stream(job("[think]"))]

    assert "".join(each.text for each in events if isinstance(each, ReasoningDelta)).strip() == "Hm, hm."
    assert "".join(each.text for each in events if isinstance(each, TextDelta)) == "Thought through."
    assert isinstance(events[-1], Done)
    assert events[-1].content == "Thought through."


@pytest.mark.parametrize(
    "accept",
    [
        None,
        Accept(json_schema={"type": "object", "required": ["size"]}),
    ],
)
async def test_a_reasoning_model_calls_a_tool_and_continues(provider: OpenAIProvider, accept: Accept | None) -> None:
    chosen = []

    @tool
    def choose(size: str) -> str:
        """Choose a size."""
        chosen.append(size)
        return "chosen"

    agent = Agent(provider, AgentConfig(max_tokens=500), tools=[choose])
    events = [event async for event in agent.stream(replace(job("[plan]"), accept=accept))]

    assert "".join(each.text for each in events if isinstance(each, ReasoningDelta)).strip() == "First, a plan."
    assert chosen == ["small"]
    assert isinstance(events[-1], Done)
    assert events[-1].steps == 2


async def test_a_wrong_key_is_named_as_the_cause(server: LlamaServer) -> None:
    wrong = provider_for(server, key="sk-wrong")
    with pytest.raises(AgentFailed, match=r"401") as caught:
        await wrong.complete(asking("[hello]"))
    await wrong.aclose()

    assert "API key" in caught.value.message.replace("Key", "key")
    assert "sk-wrong" not in caught.value.message


@pytest.mark.parametrize("stream", [True, False])
async def test_a_question_longer_than_the_context_fails_with_the_servers_reason(
    provider: OpenAIProvider, stream: bool
) -> None:
    agent = Agent(provider, AgentConfig(stream=stream))
    with pytest.raises(AgentFailed, match=r"400.*exceeds the available context size \(4096 tokens\)"):
        await agent.run(job("[hello]" + "x" * 5000))


async def test_a_server_that_dies_during_an_answer_is_a_failure_with_the_partial_text(
    server: LlamaServer, provider: OpenAIProvider
) -> None:
    agent = Agent(provider, AgentConfig(max_tokens=100_000))

    async def kill_at_first_word(event: AgentEvent) -> None:
        if isinstance(event, TextDelta):
            await server.kill()

    with pytest.raises(AgentFailed, match="broke off") as caught:
        await collect(agent, job("[endless]"), kill_at_first_word)

    assert isinstance(caught.value.spent, Done)
    assert caught.value.spent.content.startswith("tick ")


async def test_a_task_whose_server_died_succeeds_once_the_server_is_back(
    phases: Bus, python: Path, model: Path, tmp_path: Path
) -> None:
    recovered = scripted_model(python, tmp_path / "recovered.gguf", {"endless": HELLO})
    async with AsyncExitStack() as stack:
        server = await stack.enter_async_context(llamacpp_server(python, model, tmp_path, context=65_536))
        rt = Runtime(provider=provider_for(server), config=AgentConfig(max_tokens=60_000))
        for name in ("one", "another", "third"):
            rt.add_agent(name=name, capabilities=CapabilityProfile(scores={"x": 0.9}))
        await stack.enter_async_context(rt)
        handle = await rt.publish(TaskAd(domain="x", description="[endless]", estimated_complexity=0.1, timeout_s=60))
        async for delta in handle.events():
            if isinstance(delta.event, TextDelta):
                await server.kill()
                await stack.enter_async_context(llamacpp_server(python, recovered, tmp_path, port=server.port))
                break
        result = await handle.result(40)

    assert (result.state, result.content) == ("succeeded", "".join(HELLO)), result.error
    assert result.attempts > 1


async def test_a_cancelled_task_stops_the_model(phases: Bus, python: Path, model: Path, tmp_path: Path) -> None:
    async with llamacpp_server(python, model, tmp_path, context=65_536) as server:
        rt = Runtime(provider=provider_for(server), config=AgentConfig(max_tokens=60_000))
        rt.add_agent(name="one", capabilities=CapabilityProfile(scores={"x": 0.9}))
        async with rt:
            handle = await rt.publish(TaskAd(domain="x", description="[endless]", timeout_s=60))
            async for delta in handle.events():
                if isinstance(delta.event, TextDelta):
                    await handle.cancel()
                    break
            await until(lambda: "stop: cancel task" in server.process.err, what="the server gives up its task")
