import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest
from support.logs import capture_logs
from support.openai_server import Reply, Request, message_body
from support.providers import ASK, answered, serving

from loom.agents.llm.config import AgentConfig
from loom.agents.llm.openai.compatibility import Compatibility, adapt
from loom.agents.llm.openai.refusals import refusal_of
from loom.agents.llm.openai.requests import request_of
from loom.schemas.errors import AgentFailed
from loom.schemas.llm import CompletionParams, SystemMessage, ToolDefinition, UserMessage

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
TOOL = ToolDefinition(name="add", description="Add.")
STRUCTURED = CompletionParams(messages=ASK.messages, json_schema=SCHEMA, timeout_s=10)
PROMPTED = CompletionParams(messages=(SystemMessage("Be brief."), UserMessage("hi")), timeout_s=10)


def refused(message: str, param: str | None = None, code: str | None = None, status: int = 400) -> Reply:
    return Reply(status=status, body=json.dumps({"error": {"message": message, "param": param, "code": code}}))


def o_series(request: Request) -> Reply:
    if "max_tokens" in request.body:
        message = (
            "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead."
        )
        return refused(message, "max_tokens", "unsupported_parameter")
    if request.body.get("temperature", 1) != 1:
        message = "Unsupported value: 'temperature' does not support 0.7 with this model."
        return refused(message, "temperature", "unsupported_value")
    return Reply(text="ok")


def by_litellm(request: Request) -> Reply:
    if "temperature" in request.body:
        return refused("litellm.UnsupportedParamsError: O-series models don't support temperature=0.7.")
    return Reply(text="ok")


def foundry(request: Request) -> Reply:
    if "stream_options" in request.body:
        return refused("stream_options.include_usage: Extra inputs are not permitted", status=422)
    return Reply(text="ok")


def by_mistral(request: Request) -> Reply:
    if "stream_options" in request.body:
        detail = [{"loc": ["body", "stream_options", "include_usage"], "msg": "Extra inputs are not permitted"}]
        return Reply(status=422, body=json.dumps({"object": "error", "message": {"detail": detail}}))
    return Reply(text="ok")


def without_streams(request: Request) -> Reply:
    if request.body.get("stream"):
        return refused(
            "Unsupported value: 'stream' does not support true with this model.", "stream", "unsupported_value"
        )
    return Reply(text="ok") if "stream_options" not in request.body else refused("only allowed when stream is on")


def without_system(request: Request) -> Reply:
    if request.messages[0]["role"] == "system":
        message = "Unsupported value: 'messages[0].role' does not support 'system' with this model."
        return refused(message, "messages[0].role", "unsupported_value")
    return Reply(text="ok")


SENT = {"max_tokens", "temperature", "stream", "stream_options"}


@pytest.mark.parametrize(
    ("server", "refusals", "sent"),
    [
        (o_series, 2, {"max_completion_tokens", "stream", "stream_options"}),
        (by_litellm, 1, SENT - {"temperature"}),
        (foundry, 1, SENT - {"stream_options"}),
        (by_mistral, 1, SENT - {"stream_options"}),
        (without_streams, 1, {"max_tokens", "temperature"}),
    ],
)
async def test_a_refused_parameter_is_left_out_at_once_and_for_good(
    server: Callable[[Request], Reply], refusals: int, sent: set[str]
) -> None:
    with capture_logs() as logs:
        async with serving(answer=server) as (model, provider):
            for _ in range(3):
                assert (await answered(provider, stream=True)).content == "ok"

    assert len(model.requests) == refusals + 3
    assert model.requests[-1].body.keys() - {"model", "messages"} == sent
    assert [line["event"] for line in logs] == ["model_refuses_parameter"] * refusals


async def test_questions_at_the_same_time_learn_once() -> None:
    with capture_logs() as logs:
        async with serving(answer=o_series) as (model, provider):
            answers = await asyncio.gather(*(provider.complete(ASK) for _ in range(5)))

    assert [each.content for each in answers] == ["ok"] * 5
    assert {line["parameter"] for line in logs} == {"max_tokens", "temperature"}
    assert len(logs) == 2
    assert "max_completion_tokens" in model.requests[-1].body


async def test_a_system_prompt_that_is_refused_goes_with_the_user_message() -> None:
    async with serving(answer=without_system) as (model, provider):
        await provider.complete(PROMPTED)

    assert model.requests[-1].messages == [{"role": "user", "content": "Be brief.\n\nhi"}]


@pytest.mark.parametrize("known", ["json_schema", "json_object", "text"])
async def test_a_schema_that_cannot_be_sent_is_described(known: str) -> None:
    def server(request: Request) -> Reply:
        form = request.body.get("response_format", {"type": "text"})["type"]
        if known not in (form, "json_schema") and form != "text":
            return refused(f"Invalid parameter: 'response_format' of type '{form}' is not supported with this model.")
        return Reply(text="{}")

    async with serving(answer=server) as (model, provider):
        for _ in range(2):
            await provider.complete(STRUCTURED)

    last = model.requests[-1]
    assert last.body.get("response_format", {"type": "text"})["type"] == known
    assert ("JSON Schema" in last.messages[0]["content"]) is (known != "json_schema")
    assert len(model.requests) == 2 + ["json_schema", "json_object", "text"].index(known)


@pytest.mark.parametrize(
    "message",
    [
        "max_tokens is too large: 4096. This model supports at most 2048 completion tokens",
        "registry.ollama.ai/library/gemma:2b does not support tools",
        "This model does not support image input",
        "Unknown model 'tiny'",
        "Missing parameter 'tool_call_id'",
        "",
    ],
)
async def test_another_refusal_is_final(message: str) -> None:
    params = CompletionParams(messages=ASK.messages, tools=(TOOL,), timeout_s=10)
    async with serving(answer=lambda _: refused(message)) as (model, provider):
        with pytest.raises(AgentFailed, match="refused the request"):
            await answered(provider, params, stream=True)

    assert len(model.requests) == 1


async def test_a_server_that_refuses_every_variant_is_a_failure() -> None:
    def server(request: Request) -> Reply:
        return refused(f"Unsupported: {', '.join(sorted(request.body))} messages, stream, top_k")

    async with serving(answer=server, extra={"top_k": 3, "seed": 1}) as (model, provider):
        with pytest.raises(AgentFailed, match="refused the request"):
            await answered(provider, STRUCTURED, stream=True)

    assert len(model.requests) <= 9
    assert model.requests[-1].body.keys() >= {"model", "messages"}


def test_each_mend_changes_the_request() -> None:
    config = AgentConfig(extra={"top_k": 1}, reasoning_effort="low", tool_choice="auto")
    params = CompletionParams(messages=PROMPTED.messages, tools=(TOOL,), json_schema=SCHEMA)
    known, sent = Compatibility(), []
    for _ in range(20):
        request = request_of(config, params, known, stream=True)
        assert request not in sent
        sent.append(request)
        message = "Unsupported parameters: " + ", ".join(f"'{name}'" for name in request) + " and the system role"
        step = adapt(known, request, refusal_of({"message": message}, status=400, headers={}, now=0))
        if step is None:
            break
        known, _ = step
    assert sent[-1].keys() == {"model", "messages", "tools"}
    assert len(sent) < 20


@pytest.mark.parametrize("stream", [True, False])
async def test_fields_of_none_are_left_out(stream: bool) -> None:
    params = CompletionParams(messages=ASK.messages, temperature=None, max_tokens=None, timeout_s=10)
    async with serving(extra={"stream_options": None}) as (model, provider):
        await answered(provider, params, stream=stream)

    assert model.requests[0].body.keys() - {"stream"} == {"model", "messages"}


async def test_every_option_of_a_config_reaches_the_request() -> None:
    config: dict[str, Any] = {
        "extra": {"top_p": 0.9, "seed": 7, "temperature": 0.1, "max_completion_tokens": 50, "model": "other"},
        "headers": {"X-Team": "blue"},
        "reasoning_effort": "low",
        "tool_choice": "required",
    }
    params = CompletionParams(messages=ASK.messages, tools=(TOOL,), timeout_s=10)
    async with serving(**config) as (model, provider):
        await provider.complete(params)
        await provider.complete(ASK)

    first, second = model.requests
    assert first.headers["x-team"] == "blue"
    body = {name: value for name, value in first.body.items() if name not in ("messages", "tools")}
    assert body == {**config["extra"], "reasoning_effort": "low", "tool_choice": "required"}
    assert "tool_choice" not in second.body


@pytest.mark.parametrize("tools", [(), (TOOL,)])
async def test_options_of_tools_are_sent_only_with_tools(tools: tuple[ToolDefinition, ...]) -> None:
    params = CompletionParams(messages=ASK.messages, tools=tools, timeout_s=10)
    async with serving(extra={"parallel_tool_calls": False}, tool_choice="auto") as (model, provider):
        await provider.complete(params)

    assert ({"parallel_tool_calls", "tool_choice"} <= model.requests[0].body.keys()) is bool(tools)


async def test_a_custom_response_format_is_sent_unchanged() -> None:
    async with serving(Reply(text="{}"), extra={"response_format": "json"}) as (model, provider):
        await provider.complete(STRUCTURED)

    assert model.requests[0].body["response_format"] == "json"
    assert "JSON Schema" in model.requests[0].messages[0]["content"]


async def test_azure_gets_its_version_key_and_path() -> None:
    async with serving(Reply(body=message_body({"content": "hi"}))) as (model, _):
        root = model.base_url.removesuffix("/v1")
        for path in ("", "/openai/deployments/gpt", "/openai/v1", "/gateway"):
            async with serving() as (_, some):
                config = AgentConfig(api_key="the-key", base_url=root + path, api_version="2024-10-21", model="gpt")
                azure = type(some)(config)
                await azure.complete(ASK)
                await azure.aclose()

    version = "?api-version=2024-10-21"
    assert [request.path for request in model.requests] == [
        f"/openai/deployments/gpt/chat/completions{version}",
        f"/openai/deployments/gpt/chat/completions{version}",
        f"/openai/v1/chat/completions{version}",
        f"/gateway/deployments/gpt/chat/completions{version}",
    ]
    assert {request.headers["api-key"] for request in model.requests} == {"the-key"}
