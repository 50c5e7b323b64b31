"""Phases read the same answers as agents, from any provider."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from support.agents import Scripted

from loom.agents.llm.guarded_provider import GuardedProvider
from loom.schemas.errors import AgentFailed, DeadlineExceeded
from loom.schemas.llm import CompletionParams, CompletionResult, StreamChunk, UserMessage

ASK = CompletionParams(messages=(UserMessage("How good is it?"),))


async def complete(provider: Any, params: CompletionParams = ASK) -> CompletionResult:
    return await GuardedProvider(provider).complete(params)


async def test_thoughts_before_an_answer_are_removed() -> None:
    answer = await complete(Scripted([StreamChunk(text='<think>hm</think>{"score": 1}', finish_reason="stop")]))

    assert (answer.content, answer.finish_reason) == ('{"score": 1}', "stop")


async def test_an_answer_in_a_dict_is_read() -> None:
    class Plain:
        async def complete(self, _params: CompletionParams) -> dict[str, Any]:
            return {"content": "fine", "usage": {"prompt_tokens": 3, "completion_tokens": 2}}

    answer = await complete(Plain())

    assert answer.content == "fine"
    assert answer.usage is not None
    assert answer.usage.total_tokens == 5


async def test_a_provider_may_have_stream_alone() -> None:
    class Stream:
        async def stream(self, _params: CompletionParams) -> AsyncIterator[str]:
            yield "fi"
            yield "ne"

    assert (await complete(Stream())).content == "fine"


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(1), GeneratorExit()])
async def test_an_exception_that_would_end_the_process_fails_the_request_alone(error: BaseException) -> None:
    with pytest.raises(AgentFailed, match=f"the model's provider raised {type(error).__name__}"):
        await complete(Scripted([error]))


async def test_an_exception_passes_unchanged() -> None:
    with pytest.raises(OSError, match="gone"):
        await complete(Scripted([OSError("gone")]))


async def test_a_question_ends_when_its_time_is_up() -> None:
    class Silent:
        async def stream(self, _params: CompletionParams) -> AsyncIterator[str]:
            await asyncio.Event().wait()
            yield ""

    with pytest.raises(DeadlineExceeded):
        await complete(Silent(), CompletionParams(messages=ASK.messages, timeout_s=0.05))
