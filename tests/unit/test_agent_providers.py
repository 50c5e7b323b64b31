"""Any object with complete or stream is a provider, and its results are read leniently."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
from support.agents import JOB, MakeAgent, Scripted, add, done_of, events_of, only
from support.logs import capture_logs
from support.openai_server import OpenAIServer, Reply

from loom.agents.llm.agent import Agent
from loom.agents.llm.config import AgentConfig
from loom.schemas.base import encode
from loom.schemas.errors import AgentFailed
from loom.schemas.events import TextDelta
from loom.schemas.llm import CompletionParams, CompletionResult, StreamChunk, ToolCall, Usage
from loom.schemas.run import RunRequest


async def test_the_retry_after_of_the_models_server_reaches_the_caller(server: OpenAIServer, make: MakeAgent) -> None:
    server.script(Reply(status=429, headers={"Retry-After": "60"}))
    with pytest.raises(AgentFailed) as caught:
        await make().run(RunRequest(task_id="t1", description="x", remaining_s=3600))

    assert caught.value.retry_after_s == 60


class Broken:
    def __init__(self, error: BaseException) -> None:
        self._error = error

    async def complete(self, params: CompletionParams) -> CompletionResult:  # noqa: ARG002
        raise self._error

    async def stream(self, params: CompletionParams) -> AsyncIterator[StreamChunk]:  # noqa: ARG002
        yield StreamChunk(text="well, ")
        raise self._error


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize("error", [ValueError("boom"), TimeoutError(), asyncio.CancelledError(), SystemExit()])
async def test_every_exception_of_a_provider_is_a_failure(error: BaseException, streaming: bool) -> None:
    with pytest.raises(AgentFailed, match="the model could not answer"):
        await events_of(Agent(Broken(error), AgentConfig(stream=streaming)))


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize("reported", [{"prompt_tokens": -900}, {"prompt_tokens": "7"}, {"completion_tokens": 1.5}, {}])
async def test_nonsense_about_usage_is_replaced_by_an_estimate(reported: dict[str, Any], streaming: bool) -> None:
    class Boastful:
        async def complete(self, _params: CompletionParams) -> CompletionResult:
            return CompletionResult(content="fine", usage=Usage(**reported))

        async def stream(self, _params: CompletionParams) -> AsyncIterator[StreamChunk]:
            yield StreamChunk(text="fine", usage=Usage(**reported), finish_reason="stop")

    done = done_of(await events_of(Agent(Boastful(), AgentConfig(stream=streaming))))

    assert (done.content, done.usage.estimated) == ("fine", True)
    assert 0 < done.tokens_used < 50


async def test_half_a_surrogate_pair_does_not_spoil_a_conversation(server: OpenAIServer, make: MakeAgent) -> None:
    server.script(Reply(text="a\ud83d", tool_calls=(("add", '{"a":"\ud83d"}'),)), Reply(text="b\ude00"))
    with capture_logs():
        assert (await make(add).run(JOB)).content == "b?"


ADD = {"id": "a", "name": "add", "arguments": {"a": 2, "b": 3}}


@dataclass
class Piece:
    """A chunk of another library."""

    text: str | None = None
    reasoning: str | None = None
    tool_call: Any = None
    tool_calls: Any = None
    usage: Any = None
    finish_reason: str | None = None


@dataclass
class Call:
    """A tool call of another library."""

    id: str
    name: str
    arguments: str


@pytest.mark.parametrize(
    "pieces",
    [
        [StreamChunk(text="an "), StreamChunk(text="answer")],
        [StreamChunk(text="an "), StreamChunk(text="answer", finish_reason="stop")],
        [StreamChunk(text="an answer"), StreamChunk(text=None, reasoning=None)],  # type: ignore[arg-type]
        ["an ", "answer"],
        [{"text": "an "}, {"text": "answer", "finish_reason": None, "more": 1}],
        [Piece("an "), Piece("answer"), Piece(finish_reason="stop")],
    ],
)
async def test_a_stream_that_ends_is_an_answer_whatever_its_pieces(pieces: list[Any]) -> None:
    events = await events_of(Scripted(pieces).agent())

    assert "".join(event.text for event in only(TextDelta, events)) == "an answer"
    assert done_of(events).content == "an answer"


@pytest.mark.parametrize(
    "pieces",
    [
        [StreamChunk(tool_call=ToolCall(id="a", name="add", arguments='{"a":2,"b":3}'))],
        [StreamChunk(text=None, tool_call_delta={"name": "add"}), {"tool_call": ADD}],  # type: ignore[arg-type]
        [{"tool_calls": [ADD]}],
        [{"tool_calls": [{"id": "a", "type": "function", "function": ADD}]}],
        [Piece(tool_call=Call("a", "add", '{"a":2,"b":3}'))],
        [Piece(tool_calls=[Call("a", "add", '{"a":2,"b":3}')], finish_reason="tool_use")],
    ],
)
async def test_a_tool_call_may_come_in_any_of_these_forms(pieces: list[Any]) -> None:
    provider = Scripted(pieces, ["done"])
    await events_of(provider.agent(add))

    assert provider.asked[1].messages[-1].content == "5"


async def test_calls_may_arrive_one_by_one() -> None:
    calls = [ToolCall(id=f"c{n}", name="add", arguments=f'{{"a":{n},"b":0}}') for n in range(3)]
    provider = Scripted([StreamChunk(tool_call=call) for call in calls], ["done"])
    await events_of(provider.agent(add))

    assert [each.content for each in provider.asked[1].messages[-3:]] == ["0", "1", "2"]


@pytest.mark.parametrize(
    "answer",
    [
        CompletionResult(content="fine"),
        CompletionResult(content="fine", reasoning=None, tool_calls=None),  # type: ignore[arg-type]
        {"content": "fine"},
        "fine",
        SimpleNamespace(content="fine", usage={"prompt_tokens": 3, "completion_tokens": 2}),
    ],
)
@pytest.mark.parametrize("blocking", [True, False])
async def test_a_provider_may_have_complete_alone(answer: Any, blocking: bool) -> None:
    class Complete:
        async def complete(self, _params: CompletionParams) -> Any:
            return answer

    class Blocking:
        def complete(self, _params: CompletionParams) -> Any:
            return answer

    agent = Agent(Blocking() if blocking else Complete())  # type: ignore[arg-type]

    assert (await agent.run(JOB)).content == "fine"


async def test_usage_in_a_dict_is_accepted() -> None:
    answer = [{"text": "fine", "usage": {"prompt_tokens": 30, "completion_tokens": 20}}]
    done = done_of(await events_of(Scripted(answer).agent()))

    assert (done.tokens_used, done.usage.estimated) == (50, False)


async def test_a_provider_may_have_stream_alone() -> None:
    class Stream:
        async def stream(self, _params: CompletionParams) -> AsyncIterator[str]:
            yield "fine"

    agent = Agent(Stream(), AgentConfig(stream=False))  # type: ignore[arg-type]

    assert (await agent.run(JOB)).content == "fine"


async def test_stream_may_be_a_coroutine_that_returns_an_iterator() -> None:
    class Stream:
        async def stream(self, _params: CompletionParams) -> AsyncIterator[str]:
            async def pieces() -> AsyncIterator[str]:
                yield "fine"

            return pieces()

    assert (await Agent(Stream()).run(JOB)).content == "fine"  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("pieces", "sentence"),
    [
        ([7], "a chunk of the model's stream is of type int: a provider gives a StreamChunk, or text"),
        ([None], "a chunk of the model's stream is of type NoneType"),
        ([b"bytes"], "is of type bytes"),
        ([SimpleNamespace(choices=[])], "is of type SimpleNamespace"),
        ([{"text": 7}], "has text of type int"),
        ([StreamChunk(text=7)], "has text of type int"),  # type: ignore[arg-type]
        ([{"reasoning": ["x"]}], "has reasoning of type list"),
        ([{"tool_calls": "add"}], "has tool_calls of type str"),
        ([{"tool_calls": [7]}], "has a call of type int"),
        ([{"tool_calls": 7}], "has tool_calls of type int"),
    ],
)
async def test_anything_else_is_a_failure_with_a_sentence(pieces: list[Any], sentence: str) -> None:
    with pytest.raises(AgentFailed, match=sentence):
        await events_of(Scripted(pieces).agent())


async def test_a_provider_with_neither_method_is_a_failure_with_a_sentence() -> None:
    with pytest.raises(AgentFailed, match=r"has neither complete\(params\) nor stream\(params\)"):
        await events_of(Agent(object()))  # type: ignore[arg-type]


async def test_a_stream_that_is_not_an_async_iterator_is_a_failure_with_a_sentence() -> None:
    class Stream:
        def stream(self, _params: CompletionParams) -> list[str]:
            return ["fine"]

    with pytest.raises(AgentFailed, match="returned an object of type list: make it an async generator"):
        await events_of(Agent(Stream()))  # type: ignore[arg-type]


async def test_a_chunk_that_raises_when_it_is_read_is_a_failure() -> None:
    class Odd:
        @property
        def text(self) -> str:
            raise KeyboardInterrupt

    with pytest.raises(AgentFailed, match="its provider raised KeyboardInterrupt"):
        await events_of(Scripted([Odd()]).agent())


async def test_half_a_surrogate_pair_of_any_provider_is_replaced() -> None:
    call = ToolCall(id="\ud83d", name="a\ud83d", arguments="\ud83d")
    provider = Scripted([StreamChunk(text="x\ud83d", reasoning="\ud83d", tool_call=call)], ["y\ude00"])
    with capture_logs():
        events = await events_of(provider.agent(add))

    assert done_of(events).content == "y?"
    for event in events:
        encode(event)
    encode(provider.asked)


async def test_a_description_alone_can_be_streamed() -> None:
    assert done_of(await events_of(Scripted(["hello"]).agent(), "Say hello.")).content == "hello"


def test_a_chunk_keeps_its_single_call_among_its_calls() -> None:
    call = ToolCall(id="a", name="add")

    assert StreamChunk(tool_call=call).tool_calls == (call,)
    assert StreamChunk(tool_call=call, tool_calls=(call,)).tool_calls == (call,)
