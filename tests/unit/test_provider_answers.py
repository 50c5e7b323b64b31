import json
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.openai_server import Reply, Request, delta_event, message_body, text_event
from support.providers import ASK, answered, serving, streamed

from loom.agents.llm.openai import openai_provider
from loom.agents.llm.openai.answers import AnswerReader, BrokeOff, Unreadable
from loom.agents.llm.openai.refusals import ErrorReply
from loom.schemas.errors import AgentFailed, LoomError
from loom.schemas.llm import CompletionParams, Message, ToolCall, Usage, UserMessage

USAGE = {"prompt_tokens": 9, "completion_tokens": 3, "total_tokens": 12}
END = delta_event({}, "stop")
THINKING = {"type": "thinking", "thinking": [{"type": "text", "text": "hmm"}]}
BOTH = pytest.mark.parametrize("stream", [True, False])


@pytest.fixture(autouse=True)
def _hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openai_provider, "BACKOFF_S", 0.01)


@pytest.mark.slow
@pytest.mark.parametrize(
    "odd",
    [
        pytest.param(delta_event(None, content_filter_offsets={"check_offset": 1}), id="delta null"),
        pytest.param('{"choices": null, "usage": null}', id="choices null"),
        pytest.param('{"usage": {"prompt_tokens": 9, "completion_tokens": 3}}', id="usage alone"),
        pytest.param('{"choices": [{"index": 0}]}', id="no delta"),
        pytest.param('{"choices": [null, 3]}', id="choices that are none"),
        pytest.param('{"type": "ping"}', id="ping"),
        pytest.param("[]", id="a list"),
        pytest.param('"text"', id="a text"),
        pytest.param("{broken", id="broken"),
        pytest.param('{"error": null, "choices": []}', id="error null"),
        pytest.param(delta_event({"content": None, "tool_calls": None, "function_call": None}), id="nulls"),
        pytest.param(delta_event({"tool_calls": [{"index": 0, "function": None}]}), id="function null"),
        pytest.param(delta_event({"content": []}), id="no parts"),
        pytest.param(delta_event({"content": [{"type": "image_url", "image_url": {}}]}), id="an image"),
        pytest.param('{"choices": [{"index": 1, "delta": {"content": "another choice"}}]}', id="another choice"),
        pytest.param(
            '{"choices": [{"index": 0, "message": {"content": "hello world"}}]}', id="the whole message at the end"
        ),
    ],
)
async def test_an_event_that_carries_nothing_is_skipped(odd: str) -> None:
    events = (text_event("hello"), odd, text_event(" world"), odd, END)
    async with serving(Reply(events=events)) as (_, provider):
        answer = await answered(provider, stream=True)

    assert (answer.content, answer.finish_reason, answer.tool_calls) == ("hello world", "stop", ())


@BOTH
@pytest.mark.parametrize(
    ("error", "words", "asked"),
    [
        pytest.param({"error": {"message": "Rate limit upstream", "code": 429}}, None, 2, id="OpenRouter, busy"),
        pytest.param({"error": {"message": "Provider failed", "code": "502"}}, None, 2, id="a number in a text"),
        pytest.param({"error": {"message": "slow down", "type": "rate_limit_error"}}, None, 2, id="a kind"),
        pytest.param({"error": "the engine crashed"}, None, 2, id="a text"),
        pytest.param([{"error": {"code": 503, "message": "overloaded"}}], None, 2, id="Gemini"),
        pytest.param(
            {"object": "error", "message": "max context is 4096", "code": 400},
            r"refused the request \(400\): max context is 4096",
            1,
            id="vLLM",
        ),
        pytest.param(
            {"error": "Unexpected endpoint or method. (POST /chat/completions)"},
            "does not know the path: Unexpected endpoint or method",
            1,
            id="LM Studio",
        ),
        pytest.param(
            {"error": {"message": "bad tool", "type": "invalid_request_error"}}, r"\(400\): bad tool", 1, id="refused"
        ),
    ],
)
async def test_an_error_with_the_status_of_a_success_is_an_error(
    error: Any, words: str | None, asked: int, stream: bool
) -> None:
    for reply in (Reply(body=json.dumps(error)), Reply(events=(json.dumps(error),), done=True)):
        if reply.events and not stream:
            continue
        async with serving(reply, Reply(text="better")) as (server, provider):
            if words is None:
                assert (await answered(provider, stream=stream)).content == "better"
            else:
                with pytest.raises(AgentFailed, match=words):
                    await answered(provider, stream=stream)
            assert len(server.requests) == asked


async def test_an_address_without_its_version_is_named_as_a_cause() -> None:
    async with serving(Reply(body='{"error": "Unexpected endpoint or method."}')) as (server, _):
        base_url = server.base_url.removesuffix("/v1")
        async with serving() as (_, unused):
            other = type(unused)(type(unused.config)(api_key="k", base_url=base_url))
            with pytest.raises(AgentFailed, match=r"is /v1 missing in base_url\?"):
                await other.complete(ASK)
            await other.aclose()


@pytest.mark.parametrize("reason", [None, ""])
@pytest.mark.parametrize("usage", [(), (json.dumps({"choices": [], "usage": USAGE}),)])
async def test_an_end_mark_is_an_end_without_a_finish_reason(reason: str | None, usage: tuple[str, ...]) -> None:
    events = (delta_event({"content": "hello"}, reason), delta_event({"content": ""}, reason), *usage)
    async with serving(Reply(events=events, done=True)) as (server, provider):
        answer = await answered(provider, stream=True)

    assert (answer.content, answer.finish_reason) == ("hello", "stop")
    assert answer.usage == (Usage(prompt_tokens=9, completion_tokens=3) if usage else None)
    assert len(server.requests) == 1


async def test_calls_before_an_end_mark_are_calls() -> None:
    fragment = {"index": 0, "id": "x", "function": {"name": "add", "arguments": '{"a":1}'}}
    async with serving(Reply(events=(delta_event({"tool_calls": [fragment]}),), done=True)) as (_, provider):
        answer = await answered(provider, stream=True)

    assert (answer.tool_calls[0].name, answer.finish_reason) == ("add", "tool_calls")


async def test_an_answer_is_complete_however_its_connection_ends() -> None:
    events = (text_event("hello"), END, text_event(""))
    async with serving(Reply(events=events, cut_after=2)) as (_, provider):
        assert (await answered(provider, stream=True)).content == "hello"


async def test_text_before_a_break_is_attached_to_the_error() -> None:
    async with serving(Reply(text="half an answer of some length", cut_after=3)) as (_, provider):
        with pytest.raises(AgentFailed, match="broke off") as caught:
            await streamed(provider)

    assert caught.value.partial == "half an answer o"


@BOTH
@pytest.mark.parametrize(
    ("parts", "text", "reasoning"),
    [
        ([THINKING, {"type": "text", "text": "42"}], "42", "hmm"),
        ([{"type": "text", "text": "4"}, "2"], "42", ""),
        ({"type": "text", "text": "42"}, "42", ""),
        ([{"type": "output_text", "text": {"value": "42"}}], "42", ""),
        ([{"type": "reasoning", "text": "hmm"}, {"type": "text", "text": "42"}], "42", "hmm"),
        ({"answer": 42}, '{"answer": 42}', ""),
        (42, "42", ""),
    ],
)
async def test_content_in_parts_is_text(parts: Any, text: str, reasoning: str, stream: bool) -> None:
    reply = (
        Reply(events=(delta_event({"content": parts}), END)) if stream else Reply(body=message_body({"content": parts}))
    )
    async with serving(reply) as (_, provider):
        answer = await answered(provider, stream=stream)

    assert (answer.content, answer.reasoning) == (text, reasoning)


@BOTH
@pytest.mark.parametrize(
    ("arguments", "taken"),
    [({"a": 5}, '{"a": 5}'), ("null", "{}"), (None, ""), ("", ""), (json.dumps('{"a": 5}'), '{"a": 5}'), ([1], "[1]")],
)
async def test_arguments_are_accepted_in_any_form(arguments: Any, taken: str, stream: bool) -> None:
    calls = {"tool_calls": [{"index": 0, "id": "x", "function": {"name": "add", "arguments": arguments}}]}
    whole = Reply(body=message_body(calls, "tool_calls"))
    async with serving(Reply(events=(delta_event(calls), END)) if stream else whole) as (_, provider):
        answer = await answered(provider, stream=stream)

    assert [(call.id, call.name, call.arguments) for call in answer.tool_calls] == [("x", "add", taken)]


@BOTH
@pytest.mark.parametrize("field", ["reasoning_content", "reasoning", "thinking"])
async def test_reasoning_is_kept_apart_from_the_text(field: str, stream: bool) -> None:
    written = {field: "I should add.", "content": None}
    events = (delta_event(written), text_event("3"), END)
    whole = Reply(body=message_body({field: "I should add.", "content": "3"}))
    async with serving(Reply(events=events) if stream else whole) as (_, provider):
        answer = await answered(provider, stream=stream)

    assert (answer.content, answer.reasoning) == ("3", "I should add.")


@BOTH
async def test_a_length_that_went_into_reasoning_can_be_recognised(stream: bool) -> None:
    written = {"reasoning_content": "hmm", "content": None}
    whole = Reply(body=message_body(written, "length"))
    async with serving(Reply(events=(delta_event(written, "length"),)) if stream else whole) as (_, provider):
        answer = await answered(provider, stream=stream)

    assert (answer.content, answer.reasoning, answer.finish_reason) == ("", "hmm", "length")


@BOTH
async def test_a_refusal_is_kept(stream: bool) -> None:
    written = {"refusal": "I can't help with that.", "content": None}
    reply = Reply(events=(delta_event(written), END)) if stream else Reply(body=message_body(written))
    async with serving(reply) as (_, provider):
        assert (await answered(provider, stream=stream)).refusal == "I can't help with that."


async def test_a_server_that_streams_unasked_or_does_not_stream_is_understood() -> None:
    async with serving(Reply(body="data: " + text_event("hello") + "\n\ndata: [DONE]\n\n")) as (_, provider):
        assert (await provider.complete(ASK)).content == "hello"
    async with serving(Reply(body=message_body({"content": "hello"}, usage=USAGE))) as (_, provider):
        answer = await answered(provider, stream=True)

    assert (answer.content, answer.usage) == ("hello", Usage(prompt_tokens=9, completion_tokens=3))


async def test_usage_inside_a_choice_counts() -> None:
    async with serving(Reply(events=(text_event("x"), delta_event({}, "stop", usage=USAGE)))) as (_, provider):
        assert (await answered(provider, stream=True)).usage == Usage(prompt_tokens=9, completion_tokens=3)


def history(call: ToolCall, reasoning: str = "") -> CompletionParams:
    turns = (
        UserMessage("1?"),
        Message(role="assistant", tool_calls=(call,), reasoning=reasoning),
        Message(role="tool", content="1", tool_call_id=call.id),
    )
    return CompletionParams(messages=turns, timeout_s=10)


async def test_fields_next_to_a_call_are_sent_back_with_it() -> None:
    signature = {"extra_content": {"google": {"thought_signature": "SIG"}}}
    fragment = {"index": 0, "id": "x", "function": {"name": "add", "arguments": "{}"}, **signature}
    async with serving(Reply(events=(delta_event({"tool_calls": [fragment]}, "tool_calls"),))) as (server, provider):
        [call] = (await answered(provider, stream=True)).tool_calls
        await provider.complete(history(call))

    [back] = server.requests[1].messages[1]["tool_calls"]
    assert back == {"id": "x", "type": "function", "function": {"name": "add", "arguments": "{}"}, **signature}


async def test_details_of_reasoning_go_back_with_the_message() -> None:
    details = [{"type": "reasoning.encrypted", "data": "abc"}, {"type": "reasoning.text", "text": "hmm"}]
    fragment = {"index": 0, "id": "x", "function": {"name": "add", "arguments": "{}"}}
    pieces = (delta_event({"reasoning_details": [each]}) for each in details)
    events = (*pieces, delta_event({"tool_calls": [fragment], "reasoning_details": None}, "tool_calls"))
    async with serving(Reply(events=events)) as (server, provider):
        [call] = (await answered(provider, stream=True)).tool_calls
        await provider.complete(history(call))

    turn = server.requests[1].messages[1]
    assert turn["reasoning_details"] == details
    assert turn["tool_calls"] == [{"id": "x", "type": "function", "function": {"name": "add", "arguments": "{}"}}]


@BOTH
@pytest.mark.parametrize(
    ("field", "back"), [("reasoning_content", {"reasoning_content": "hmm"}), ("reasoning", {}), ("thinking", {})]
)
async def test_reasoning_goes_back_only_where_it_came_as_reasoning_content(
    field: str, back: dict[str, str], stream: bool
) -> None:
    call = ToolCall(id="x", name="add", arguments="{}")
    written = {field: "hmm", "content": "1"}
    reply = Reply(events=(delta_event(written), END)) if stream else Reply(body=message_body(written))
    async with serving(reply) as (server, provider):
        await answered(provider, stream=stream)
        await provider.complete(history(call, "hmm"))

    turn = server.requests[1].messages[1]
    assert {name: turn[name] for name in ("reasoning_content", "reasoning", "thinking") if name in turn} == back


def missing(request: Request) -> Reply:
    """A server that requires the reasoning of earlier turns."""
    if "reasoning_content" in request.messages[1]:
        return Reply(text="fine")
    return Reply(status=400, body='{"error": {"message": "Missing `reasoning_content` field at message index 1."}}')


def refusing(request: Request) -> Reply:
    """A server that sends reasoning and refuses it."""
    if "reasoning_content" in request.messages[1]:
        return Reply(status=400, body='{"error": {"message": "reasoning_content is not allowed in input messages"}}')
    return Reply(body=message_body({"content": "fine", "reasoning_content": "hmm"}))


@pytest.mark.parametrize("answer", [missing, refusing])
async def test_reasoning_goes_back_as_a_refusal_demands(answer: Callable[[Request], Reply]) -> None:
    asked = history(ToolCall(id="x", name="add", arguments="{}"), "hmm")
    async with serving(answer=answer) as (server, provider):
        for _ in range(3):
            assert (await provider.complete(asked)).content == "fine"

    assert len(server.requests) == 4


NAMES = ["choices", "delta", "message", "content", "index", "finish_reason", "usage", "error", "object", "type", "text"]
NAMES += ["tool_calls", "function", "name", "arguments", "reasoning_content", "refusal", "id", "code", "detail"]
VALUES = ["", "error", "stop", "<think>", "{}", "text", "thinking", "prompt_tokens"]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from(VALUES),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(NAMES), inner, max_size=4),
    max_leaves=15,
)
EVENT = JSON | st.builds(
    lambda part, more, whole: {"choices": [{"index": 0, "message" if whole else "delta": part}], **more},
    JSON,
    st.dictionaries(st.sampled_from(NAMES[5:10]), JSON, max_size=2),
    st.booleans(),
)


@settings(max_examples=60)
@given(events=st.lists(EVENT, max_size=5), ended=st.booleans(), whole=st.booleans())
def test_any_json_of_a_server_is_read_or_refused(events: list[Any], ended: bool, whole: bool) -> None:
    reader = AnswerReader()
    try:
        chunks = [chunk for event in events if (chunk := reader.read(event))]
        chunks.append(reader.last(ended=ended, whole=whole))
    except (LoomError, ErrorReply, Unreadable, BrokeOff):
        return
    for chunk in chunks:
        assert (chunk.text + chunk.reasoning + chunk.refusal + (chunk.finish_reason or "")).encode() is not None
        assert chunk.usage is None or chunk.usage.total_tokens > 0


@settings(max_examples=30)
@given(event=EVENT)
async def test_the_provider_raises_only_errors_of_loom(event: Any) -> None:
    reply = Reply(events=(json.dumps(event).replace("\n", ""),), done=True)
    async with serving(reply) as (_, provider):
        for ask in (streamed(provider), provider.complete(ASK)):
            with suppress(LoomError):
                await ask
