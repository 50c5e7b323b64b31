import json
import subprocess
import sys
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest
from support.openai_server import OpenAIServer, Reply, sample
from support.providers import ASK, KEY, provider_for, streamed

from loom.agents.llm.openai.openai_provider import OpenAIProvider
from loom.schemas.errors import AgentFailed
from loom.schemas.llm import (
    CompletionParams,
    LLMProvider,
    Message,
    SystemMessage,
    ToolCall,
    ToolDefinition,
    Usage,
    UserMessage,
)


@pytest.fixture
async def server() -> AsyncIterator[OpenAIServer]:
    async with OpenAIServer() as running:
        yield running


@pytest.fixture
async def provider(server: OpenAIServer) -> AsyncIterator[OpenAIProvider]:
    made = provider_for(server.base_url)
    yield made
    await made.aclose()


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


async def test_the_request_has_every_given_parameter(server: OpenAIServer, provider: OpenAIProvider) -> None:
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


async def test_a_schema_of_the_answer_can_be_requested(provider: OpenAIProvider) -> None:
    schema = {
        "type": "object",
        "properties": {"complexity": {"type": "number"}, "domains": {"type": "array", "items": {"type": "string"}}},
    }
    result = await provider.complete(msgspec.structs.replace(ASK, json_schema=schema))

    assert msgspec.json.decode(result.content) == sample(schema) == {"complexity": 0.5, "domains": ["general"]}


@pytest.mark.parametrize("counts", [(-1, 3), (1.5, 3), ("7", "3"), ([], {}), (None, None)])
async def test_nonsense_about_usage_does_not_spoil_an_answer(
    server: OpenAIServer, provider: OpenAIProvider, counts: tuple[Any, Any]
) -> None:
    usage = dict(zip(("prompt_tokens", "completion_tokens"), counts, strict=True))
    choice = {"index": 0, "message": {"role": "assistant", "content": "fine"}, "finish_reason": "stop"}
    server.script(Reply(body=json.dumps({"choices": [choice], "usage": usage})))
    result = await provider.complete(ASK)

    assert (result.content, result.usage) == ("fine", None)


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize(
    ("body", "why"),
    [
        ('{"hello": "world"}', "could not be read: it has no choices"),
        ("<html>Welcome!</html>", "is a web page: check base_url"),
        ('{"choices": []}', "could not be read: it has no choices"),
        ('{"choices": null}', "could not be read: it has no choices"),
        ("{broken", "could not be read: it is not JSON"),
    ],
)
async def test_an_answer_of_another_form_is_a_failure(
    server: OpenAIServer, provider: OpenAIProvider, body: str, why: str, streaming: bool
) -> None:
    server.script(Reply(body=body))
    with pytest.raises(AgentFailed, match=f"the answer of the model's server at .* {why}"):
        await (streamed(provider) if streaming else provider.complete(ASK))

    assert len(server.requests) == 1


def test_importing_it_does_not_import_openai() -> None:
    code = "import sys, loom.agents.llm.openai.openai_provider; sys.exit('openai' in sys.modules)"

    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
