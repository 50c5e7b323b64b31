import asyncio
import time
from dataclasses import replace
from typing import Any

import pytest
from support.logs import capture_logs
from support.openai_server import OpenAIServer
from support.providers import ASK, provider_for, serving

from loom import AgentConfig, OpenAIProvider, Runtime
from loom.agents.llm.openai.endpoints import Endpoint, endpoint_of
from loom.bus.logs.redaction import redact
from loom.runner.cli.entry import phase_model
from loom.runner.settings import Settings
from loom.schemas.errors import AgentFailed, LoomError
from loom.schemas.llm import CompletionParams, CompletionResult, StreamChunk


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("provider", "anthropic"),
        ("provider", None),
        ("model", ""),
        ("model", 7),
        ("system_prompt", None),
        ("max_steps", 0),
        ("max_steps", "3"),
        ("max_tokens", 0),
        ("max_tokens", 1.5),
        ("max_tokens", True),
        ("token_budget", None),
        ("temperature", 2.5),
        ("temperature", -1),
        ("temperature", float("nan")),
        ("temperature", "hot"),
        ("reasoning_effort", 3),
        ("tool_choice", ["auto"]),
        ("extra", [("a", 1)]),
        ("extra", {1: 2}),
        ("extra", {"messages": []}),
        ("extra", {"stream": False}),
        ("extra", {"x": object()}),
        ("extra", {"x": float("nan")}),
        ("tool_choice", {"x": object()}),
        ("headers", {"X Y": "z"}),
        ("headers", {"X": "a\nb"}),
        ("headers", {"X": 1}),
        ("headers", {"X": "ü"}),
        ("timeout_s", 0),
        ("timeout_s", float("inf")),
        ("connect_timeout_s", None),
        ("api_version", 2024),
        ("api_key", "sk-abc\nsk-def"),
        ("api_key", "\u201csk-abc\u201d"),
        ("api_key", b"sk-abc"),
        ("base_url", "127.0.0.1:8000/v1"),
        ("base_url", "localhost:8000/v1"),
        ("base_url", "ftp://host/v1"),
        ("base_url", "http://[::1"),
        ("base_url", "http://"),
        ("base_url", "http:/host/v1"),
        ("base_url", "http://host:port/v1"),
        ("base_url", "http://my host/v1"),
        ("base_url", 7),
    ],
)
def test_a_setting_that_cannot_be_used_is_named_at_once(setting: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"^{setting}\b"):
        AgentConfig(**{setting: value})


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("temperature", None),
        ("temperature", 0),
        ("max_tokens", None),
        ("tool_choice", {"type": "function", "function": {"name": "add"}}),
        ("extra", {"stream_options": None}),
        ("api_key", None),
        ("base_url", "HTTPS://host/v1"),
        ("base_url", "http://[::1]:8000/v1"),
        ("timeout_s", 1),
    ],
)
def test_a_setting_that_can_be_used_is_kept(setting: str, value: Any) -> None:
    assert getattr(AgentConfig(**{setting: value}), setting) == value


def test_an_unknown_provider_is_refused_with_the_possible_ones() -> None:
    with pytest.raises(ValueError, match=r"known: openai, .*complete.*stream"):
        AgentConfig(provider="anthropic")


def test_no_message_and_no_repr_holds_a_secret() -> None:
    config = AgentConfig(api_key="sk-secret", headers={"X-Key": "secret"}, extra={"token": "secret"})

    assert "secret" not in repr(config)
    for wrong in ({"api_key": "secret key"}, {"headers": {"X": "secret\n"}}, {"extra": {"stream": "secret"}}):
        with pytest.raises(ValueError, match=next(iter(wrong))) as caught:
            replace(config, **wrong)  # type: ignore[arg-type]
        assert "secret" not in str(caught.value)
    assert "secret" not in repr(endpoint_of(config, {}))


async def test_white_space_around_a_key_is_removed(monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving(api_key=" sk-abc\n") as (server, provider):
        await provider.complete(ASK)
        monkeypatch.setenv("OPENAI_API_KEY", "sk-env\n")
        other = provider_for(server.base_url, api_key=None)
        await other.complete(ASK)
        await other.aclose()

    assert [each.headers["authorization"] for each in server.requests] == ["Bearer sk-abc", "Bearer sk-env"]


@pytest.mark.parametrize(
    ("variable", "value"),
    [("OPENAI_BASE_URL", "127.0.0.1:8000/v1"), ("OPENAI_BASE_URL", "socks5://x"), ("OPENAI_API_KEY", "\u201csk\u201d")],
)
def test_a_variable_that_cannot_be_used_is_named_when_the_provider_is_made(
    variable: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(AgentFailed, match=f"^{variable} ") as caught:
        OpenAIProvider()

    assert caught.value.field == variable
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:1/v1")
    monkeypatch.setenv(variable, value)
    with capture_logs() as logs:
        assert phase_model(Settings()) is None
    assert [line["event"] for line in logs] == ["model_unusable"]


@pytest.mark.parametrize(
    ("variable", "value", "words"),
    [
        ("ALL_PROXY", "socks5://127.0.0.1:1", "socksio"),
        ("ALL_PROXY", "gopher://127.0.0.1:1", "proxy"),
        ("SSL_CERT_FILE", "/nowhere/ca.pem", "SSL_CERT_FILE"),
    ],
)
async def test_an_environment_that_prevents_connections_is_named_and_not_retried(
    variable: str, value: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    await asyncio.to_thread(__import__, "openai")
    async with serving() as (server, provider):
        monkeypatch.setenv(variable, value)
        started = time.monotonic()
        for _ in range(2):
            with pytest.raises(AgentFailed, match=words) as caught:
                await provider.complete(ASK)
        assert caught.value.field == "environment"
        assert time.monotonic() - started < 0.9
        monkeypatch.delenv(variable)
        assert (await provider.complete(ASK)).content == "You wrote: How do you do?"

    assert len(server.requests) == 1


@pytest.mark.parametrize("config", [AgentConfig(), AgentConfig(base_url="https://x.azure.com", api_version="1")])
async def test_a_missing_key_is_found_before_the_first_request(
    config: AgentConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL", "AZURE_OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    provider = OpenAIProvider(config)
    with pytest.raises(AgentFailed, match="needs an API key") as caught:
        await provider.complete(ASK)

    assert caught.value.field == "api_key"


AZURE = {"AZURE_OPENAI_ENDPOINT": "https://me.azure.com/", "AZURE_OPENAI_API_KEY": "az", "OPENAI_API_KEY": "oa"}


@pytest.mark.parametrize(
    ("config", "environment", "endpoint"),
    [
        (AgentConfig(), {"OPENAI_API_KEY": "k"}, Endpoint(url="https://api.openai.com/v1", key="k")),
        (
            AgentConfig(base_url="http://h/v1/?a=1&b="),
            {},
            Endpoint(url="http://h/v1", key="none", query={"a": "1", "b": ""}),
        ),
        (AgentConfig(base_url="http://h/v1", api_key="k"), AZURE, Endpoint(url="http://h/v1", key="k")),
        (AgentConfig(), {"OPENAI_BASE_URL": " http://h/v1\n"}, Endpoint(url="http://h/v1", key="none")),
        (
            AgentConfig(headers={"Authorization": "Basic abc"}),
            {},
            Endpoint(url="https://api.openai.com/v1", key="none", headers={"Authorization": "Basic abc"}),
        ),
        (
            AgentConfig(api_version="1"),
            AZURE,
            Endpoint(url="https://me.azure.com", key="az", query={"api-version": "1"}, azure=True),
        ),
        (
            AgentConfig(api_version="1", base_url="https://me.azure.com/openai/v1", api_key="k"),
            AZURE,
            Endpoint(
                url="https://me.azure.com/openai/v1", key="k", query={"api-version": "1"}, headers={"api-key": "k"}
            ),
        ),
    ],
)
def test_an_endpoint_is_that_of_the_config_then_of_the_environment(
    config: AgentConfig, environment: dict[str, str], endpoint: Endpoint
) -> None:
    assert endpoint_of(config, environment) == endpoint


def test_an_azure_version_without_an_address_is_named() -> None:
    with pytest.raises(AgentFailed, match="base_url"):
        endpoint_of(AgentConfig(api_version="1", api_key="k"), {})


async def test_nodes_of_one_runtime_may_have_different_models() -> None:
    async with OpenAIServer() as server:
        config = AgentConfig(model="big", base_url=server.base_url, system_prompt="Think.", max_steps=2)
        rt = Runtime(OpenAIProvider(replace(config, model="small")))
        with capture_logs() as logs:
            nodes = [rt.add_agent(name="a"), rt.add_agent(name="b", provider=OpenAIProvider(config), config=config)]
        for node in nodes:
            await node.agent.run("hello")
            await node.agent.provider.aclose()

    assert [request.body["model"] for request in server.requests] == ["small", "big"]
    assert [request.messages[0]["role"] for request in server.requests] == ["user", "system"]
    assert logs == []


def test_a_config_whose_model_has_no_effect_is_logged() -> None:
    rt = Runtime(OpenAIProvider(AgentConfig(model="small", api_key="k")))
    with capture_logs() as logs:
        rt.add_agent(name="a", config=AgentConfig(model="big", max_steps=2))

    assert [(line["event"], line["settings"]) for line in logs] == [("settings_without_effect", ["model"])]


class Foreign:
    async def complete(self, _: CompletionParams) -> CompletionResult:
        return CompletionResult(content="x", finish_reason="stop")

    async def stream(self, _: CompletionParams) -> Any:
        yield StreamChunk(text="x", finish_reason="stop")


def test_a_custom_provider_may_take_its_model_from_anywhere() -> None:
    with capture_logs() as logs:
        Runtime(Foreign()).add_agent(name="a", config=AgentConfig(model="big"))

    assert logs == []


@pytest.mark.parametrize(
    "given", [{"provider": Foreign()}, {"config": AgentConfig()}, {"tools": [len]}, {"system_prompt": ""}]
)
def test_options_without_effect_on_a_finished_agent_are_refused(given: dict[str, Any]) -> None:
    with pytest.raises(
        LoomError, match=f"leave out the agent or {next(iter(given))}: only an agent that add_agent makes"
    ):
        Runtime().add_agent(lambda _: "x", name="a", **given)


def test_the_advice_of_a_missing_key_survives_the_redaction_of_messages() -> None:
    with pytest.raises(AgentFailed) as caught:
        endpoint_of(AgentConfig(), {})

    assert redact(caught.value.message) == caught.value.message
    assert "OPENAI_API_KEY" in caught.value.message
