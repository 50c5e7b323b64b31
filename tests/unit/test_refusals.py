import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.openai_server import Reply
from support.providers import ASK, answered, serving

from loom.agents.llm.openai.refusals import MAX_REASON_CHARS, body_of, reason_of, refusal_message, refusal_of
from loom.schemas.errors import AgentFailed

SERVER = "the server"
OPENROUTER = {"message": "Provider returned error", "code": 400, "metadata": {"raw": '{"x": 1}', "provider_name": "P"}}


def described(body: Any, status: int | None, **more: Any) -> str:
    refusal = refusal_of(body, status=status, headers={}, now=0)
    return refusal_message(refusal, SERVER, **{"versioned": True, **more})


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        pytest.param({"error": {"message": "no such model", "type": "x", "code": None}}, "no such model", id="OpenAI"),
        pytest.param({"error": "model 'llama9' not found"}, "model 'llama9' not found", id="Ollama"),
        pytest.param({"detail": "Model is not loaded"}, "Model is not loaded", id="FastAPI"),
        pytest.param(
            {"detail": [{"loc": ["body", "max_tokens"], "msg": "too large"}, {"loc": ["body"], "msg": "odd"}]},
            "max_tokens: too large; odd",
            id="FastAPI, several",
        ),
        pytest.param([{"error": {"code": 400, "message": "no signature"}}], "no signature", id="Gemini"),
        pytest.param(
            {"object": "error", "message": {"detail": [{"loc": ["body", "stream_options"], "msg": "not permitted"}]}},
            "stream_options: not permitted",
            id="Mistral",
        ),
        pytest.param({"object": "error", "message": "too long", "code": 400}, "too long", id="vLLM"),
        pytest.param({"error": OPENROUTER}, 'Provider returned error: {"x": 1}', id="OpenRouter"),
        pytest.param({"type": "error", "error": {"type": "x", "message": "busy"}}, "busy", id="Anthropic"),
        pytest.param({"errors": [{"message": "one"}, "two"]}, "one; two", id="a list of errors"),
        pytest.param("404 page not found", "404 page not found", id="text"),
        pytest.param("<html>Bad Gateway</html>", "", id="HTML"),
        pytest.param({"error": {"message": ["not", {"msg": "odd"}]}}, "not; odd", id="a list as message"),
        pytest.param(None, "", id="nothing"),
        pytest.param(7, "", id="a number"),
        pytest.param({"error": {"message": " "}}, "", id="blank"),
    ],
)
def test_the_reason_is_found_in_each_form(body: Any, reason: str) -> None:
    assert reason_of(body) == reason


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ({"error": {"message": "no region"}}, 403, "the server refuses access (403): no region"),
        ({}, 403, "the server refuses access (403): check the API key"),
        (
            {"error": {"message": "Key sk-pro***********abcd is wrong."}},
            401,
            "the server refuses access (401): Key *** is wrong.",
        ),
        ({"error": {"message": "gone"}}, 404, "the server refused the request (404): gone"),
        ("404 page not found", 404, "the server does not know the path (404): 404 page not found; check base_url"),
        ({"detail": "Not Found"}, 404, "the server does not know the path (404): Not Found; check base_url"),
        ("<html>", 404, "the server does not know the path (404); check base_url"),
        ({"error": "x"}, 402, "the server refuses: the quota or the credit is used up (402): x"),
        ({"error": "x"}, 418, "the server refused the request (418): x"),
    ],
)
def test_a_refusal_is_described_for_people(body: Any, status: int, message: str) -> None:
    assert described(body, status) == message


def test_a_missing_version_is_named() -> None:
    assert described("404 page not found", 404, versioned=False).endswith("is /v1 missing in base_url?")


@pytest.mark.parametrize(
    ("key", "shown"),
    [("ollama", True), ("lm-studio", True), ("not-needed", True), ("abc123def", False), ("k" * 16, False)],
)
async def test_only_a_secret_key_is_redacted(key: str, shown: bool) -> None:
    reply = Reply(status=400, body=json.dumps({"error": f"the word {key} stands here"}))
    async with serving(reply, api_key=key, headers={"X-Secret": "another-1234"}) as (_, provider):
        with pytest.raises(AgentFailed) as caught:
            await provider.complete(ASK)

    assert (key in caught.value.message) is shown


async def test_a_header_is_never_repeated() -> None:
    reply = Reply(status=400, body=json.dumps({"error": "bad value another-1234"}))
    async with serving(reply, headers={"X-Secret": "another-1234"}) as (_, provider):
        with pytest.raises(AgentFailed, match=r"bad value \*\*\*"):
            await provider.complete(ASK)
        assert "another-1234" not in repr(provider.config)


RETRY_INFO = {"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": "34s"}
GEMINI = {"error": {"code": 429, "message": "You exceeded your current quota.", "details": [RETRY_INFO]}}


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(
    ("body", "headers", "wait"),
    [
        ([GEMINI], {}, 34),
        (GEMINI, {}, 34),
        ({"error": {"message": "Please try again in 20s."}}, {}, 20),
        ({"error": {"message": "busy"}}, {"x-ratelimit-reset-requests": "1m20s"}, 80),
        ({"error": {"message": "busy"}}, {"Retry-After": "20s"}, 20),
        ({"error": {"message": "busy", "metadata": {"retry_after": 12}}}, {}, 12),
    ],
)
async def test_a_wait_is_understood_wherever_it_stands(
    body: Any, headers: dict[str, str], wait: float, stream: bool
) -> None:
    reply = Reply(status=429, body=json.dumps(body), headers=headers)
    async with serving(reply) as (server, provider):
        with pytest.raises(AgentFailed) as caught:
            await answered(provider, stream=stream)

    assert caught.value.retry_after_s == wait
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    "error",
    [
        {"message": "You exceeded your current quota", "code": "insufficient_quota"},
        {"message": "You exceeded your current quota", "type": "insufficient_quota"},
        {"message": "Insufficient balance or no resource package."},
    ],
)
async def test_a_used_up_quota_is_not_retried(error: dict[str, str]) -> None:
    async with serving(Reply(status=429, body=json.dumps({"error": error}))) as (server, provider):
        with pytest.raises(AgentFailed, match=r"quota or the credit is used up \(429\)") as caught:
            await provider.complete(ASK)

    assert caught.value.retry_after_s is None
    assert len(server.requests) == 1


NAMES = ["error", "message", "detail", "code", "type", "loc", "msg", "metadata", "raw", "retryDelay", "param", "status"]
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.sampled_from(["20s", "429", "try again in 9s"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(NAMES), inner, max_size=5),
    max_leaves=20,
)


@given(
    body=JSON, status=st.none() | st.integers(400, 599), value=st.text() | st.sampled_from(["1e999", "-1", "9" * 40])
)
def test_any_error_of_a_server_becomes_a_short_sentence_and_a_wait(body: Any, status: int | None, value: str) -> None:
    headers = dict.fromkeys(("retry-after", "x-ratelimit-reset", "x-ratelimit-reset-tokens"), value)
    refusal = refusal_of(body, status=status, headers=headers, now=1e9)
    message = refusal_message(refusal, SERVER, versioned=False)

    assert len(message) < MAX_REASON_CHARS + 120
    assert message.encode()
    assert "\n" not in message
    assert refusal.wait_s is None or 0 <= refusal.wait_s < float("inf")


def test_a_reason_of_any_size_is_bounded() -> None:
    deep: Any = "core"
    for _ in range(500):
        deep = {"error": deep}
    wide = {"detail": [{"msg": "x" * 10_000}] * 10_000}

    assert reason_of(deep) == ""
    assert len(described(wide, 422)) < MAX_REASON_CHARS + 120
    assert body_of("[" * 100_000) == "[" * 100_000
