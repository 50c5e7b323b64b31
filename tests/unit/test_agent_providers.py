import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from support.agents import JOB, MakeAgent, add, done_of, events_of
from support.logs import capture_logs
from support.openai_server import OpenAIServer, Reply

from loom.agents.llm.agent import Agent
from loom.agents.llm.config import AgentConfig
from loom.schemas.errors import AgentFailed
from loom.schemas.llm import CompletionParams, CompletionResult, StreamChunk, Usage
from loom.schemas.run import RunRequest


async def test_a_wait_the_models_server_asks_for_reaches_the_caller(server: OpenAIServer, make: MakeAgent) -> None:
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
async def test_whatever_a_provider_raises_is_a_failure(error: BaseException, streaming: bool) -> None:
    with pytest.raises(AgentFailed, match="the model could not answer"):
        await events_of(Agent(Broken(error), AgentConfig(stream=streaming)))


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize("told", [{"prompt_tokens": -900}, {"prompt_tokens": "7"}, {"completion_tokens": 1.5}, {}])
async def test_nonsense_about_usage_is_replaced_by_an_estimate(told: dict[str, Any], streaming: bool) -> None:
    class Boastful:
        async def complete(self, _params: CompletionParams) -> CompletionResult:
            return CompletionResult(content="fine", usage=Usage(**told))

        async def stream(self, _params: CompletionParams) -> AsyncIterator[StreamChunk]:
            yield StreamChunk(text="fine", usage=Usage(**told), finish_reason="stop")

    done = done_of(await events_of(Agent(Boastful(), AgentConfig(stream=streaming))))

    assert (done.content, done.usage.estimated) == ("fine", True)
    assert 0 < done.tokens_used < 50


async def test_half_a_surrogate_pair_does_not_spoil_a_conversation(server: OpenAIServer, make: MakeAgent) -> None:
    server.script(Reply(text="a\ud83d", tool_calls=(("add", '{"a":"\ud83d"}'),)), Reply(text="b\ude00"))
    with capture_logs():
        assert (await make(add).run(JOB)).content == "b?"
