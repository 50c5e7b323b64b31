"""An answer without text gives the reason, and text around an answer is removed."""

import time
from typing import Any

import pytest
from support.agents import JOB, MakeAgent, Scripted, add, answering, events_of, wanting
from support.logs import capture_logs
from support.openai_server import OpenAIServer, Reply, Request

from loom.agents.llm.openai.wrapped_json import MAX_CANDIDATES, json_text
from loom.agents.llm.prompt import acceptance, job_message
from loom.schemas.errors import AgentFailed, DeadlineExceeded, LoomError
from loom.schemas.llm import StreamChunk, ToolCall, Usage
from loom.schemas.run import RunRequest
from loom.schemas.task import Accept


@pytest.mark.parametrize("reply", [Reply(text=""), Reply(text="  "), Reply(tool_calls=(("add", "{}"),))])
async def test_an_end_without_any_text_is_a_failure(server: OpenAIServer, make: MakeAgent, reply: Reply) -> None:
    server.script(reply)
    with pytest.raises(AgentFailed, match="without an answer"):
        await events_of(make(add, max_steps=1))


async def test_a_stream_without_an_end_is_a_failure(server: OpenAIServer, make: MakeAgent) -> None:
    server.script(Reply(text="half an ans", finish_reason=None))
    with pytest.raises(AgentFailed, match="broke off") as caught:
        await events_of(make())

    assert caught.value.partial == "half an ans"


@pytest.mark.parametrize("streaming", [True, False])
async def test_an_answer_of_nothing_is_a_failure(server: OpenAIServer, make: MakeAgent, streaming: bool) -> None:
    server.script(Reply(events=('{"choices": []}',), done=True) if streaming else Reply(text="x", no_choices=True))
    with pytest.raises(AgentFailed):
        await make(stream=streaming).run(JOB)


async def test_an_answer_of_full_length_is_accepted_and_a_withheld_one_is_not(
    server: OpenAIServer, make: MakeAgent
) -> None:
    server.script(Reply(text="to be contin", finish_reason="length"), Reply(text="b", finish_reason="content_filter"))

    assert (await make().run(JOB)).content == "to be contin"
    with pytest.raises(AgentFailed, match="withheld"):
        await make().run(JOB)


ADD = ToolCall(id="a", name="add", arguments='{"a":2,"b":3}')
THOUGHT = StreamChunk(reasoning="hm")
CUT = StreamChunk(finish_reason="length")
STOP = StreamChunk(finish_reason="stop")


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        ([THOUGHT, CUT], r": its max_tokens \(4096\) went into reasoning: raise AgentConfig\(max_tokens=…\)"),
        ([StreamChunk(text="<think>hm"), CUT], r": its max_tokens \(4096\) went into reasoning: raise"),
        ([CUT], r": its max_tokens \(4096\) ended before any text \(hidden reasoning counts as well\): raise"),
        ([StreamChunk(refusal="I can't "), StreamChunk(refusal="help.\n"), STOP], ": it refused: I can't help.$"),
        ([THOUGHT, STOP], ": it wrote only reasoning$"),
        ([STOP], "$"),
        ([], "$"),
    ],
)
async def test_an_answer_without_text_gives_the_reason(answer: list[StreamChunk], why: str) -> None:
    with pytest.raises(AgentFailed, match="^the model ended without an answer" + why):
        await events_of(Scripted(answer).agent())


@pytest.mark.parametrize(
    ("answer", "why"),
    [([THOUGHT, CUT], "went into reasoning"), ([StreamChunk(refusal="No.", finish_reason="stop")], "it refused: No.")],
)
async def test_a_whole_answer_without_text_gives_the_reason(answer: list[StreamChunk], why: str) -> None:
    with pytest.raises(AgentFailed, match=why):
        await events_of(Scripted(answer).agent(stream=False))


async def test_reasoning_that_used_the_rest_of_the_budget_names_the_budget() -> None:
    job = RunRequest(task_id="t1", description="x", token_budget=500)
    answer = [THOUGHT, StreamChunk(finish_reason="length", usage=Usage(prompt_tokens=5, completion_tokens=400))]
    with pytest.raises(AgentFailed, match="tokens that the task's token_budget left went into reasoning"):
        await events_of(Scripted(answer).agent(), job)


async def test_rounds_that_went_into_tools_alone_name_the_limit() -> None:
    provider = Scripted(wanting(ADD), wanting(ADD))
    with pytest.raises(AgentFailed, match=r"its 2 rounds went into tool calls: raise AgentConfig\(max_steps=…\)"):
        await events_of(provider.agent(add, max_steps=2))


async def test_a_refusal_after_a_round_with_text_is_a_failure() -> None:
    provider = Scripted(wanting(ADD, text="Let me see."), [StreamChunk(refusal="No.", finish_reason="stop")])
    with pytest.raises(AgentFailed, match=r"it refused: No\."):
        await events_of(provider.agent(add))


async def test_an_answer_next_to_a_call_counts_when_the_last_turn_is_empty() -> None:
    provider = Scripted(wanting(ADD, text="It is five."), [STOP])

    assert (await provider.agent(add).run(JOB)).content == "It is five."


SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"port": {"type": "integer"}},
    "required": ["port"],
}
WANTS_JSON = RunRequest(task_id="t1", description="Which port?", accept=Accept(json_schema=SCHEMA))


async def test_the_request_has_the_accepted_schema_as_response_format(server: OpenAIServer, make: MakeAgent) -> None:
    assert (await make().run(WANTS_JSON)).content == '{"port": 1}'

    asked = server.requests[0]
    assert asked.body["response_format"]["json_schema"]["schema"] == SCHEMA
    assert "JSON alone" in asked.messages[-1]["content"]


async def test_with_tools_the_schema_is_in_the_prompt_alone(server: OpenAIServer, make: MakeAgent) -> None:
    server.script(Reply(tool_calls=(("add", '{"a":40,"b":40}'),)), Reply(text='The port is {"port": 80}.'))

    assert (await make(add).run(WANTS_JSON)).content == '{"port": 80}'
    for request in server.requests:
        assert "response_format" not in request.body
        assert "JSON alone" in request.messages[0]["content"]


async def test_a_server_that_refuses_response_formats_gets_the_schema_as_text_alone(
    server: OpenAIServer, make: MakeAgent
) -> None:
    def old(request: Request) -> Reply:
        if "response_format" in request.body:
            return Reply(status=400, body='{"error": {"message": "This response_format type is unavailable now"}}')
        return Reply(text='{"port": 80}')

    server.answer = old
    with capture_logs():
        assert (await make().run(WANTS_JSON)).content == '{"port": 80}'

    assert "response_format" not in server.requests[-1].body


async def test_a_provider_that_refuses_schemas_gets_one_more_request_without() -> None:
    provider = Scripted([AgentFailed("refused")], answering('{"port": 80}'))
    with capture_logs():
        assert (await provider.agent().run(WANTS_JSON)).content == '{"port": 80}'

    assert [asked.json_schema for asked in provider.asked] == [SCHEMA, None]


@pytest.mark.parametrize("failure", [AgentFailed("busy", retry_after_s=9.0), DeadlineExceeded("late")])
async def test_a_failure_with_another_cause_is_not_retried(failure: LoomError) -> None:
    provider = Scripted([failure])
    with pytest.raises(LoomError):
        await provider.agent().run(WANTS_JSON)

    assert len(provider.asked) == 1


async def test_a_refused_request_without_a_schema_is_not_sent_again(server: OpenAIServer, make: MakeAgent) -> None:
    server.answer = lambda _: Reply(status=400, body='{"error": {"message": "no such model"}}')
    with pytest.raises(AgentFailed, match="no such model"):
        await make().run(JOB)

    assert len(server.requests) == 1


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize(
    "text",
    [
        '```json\n{"port": 80}\n```',
        '<think>ok</think>{"port": 80}',
        '<think>{"port": 1}</think>Here it is:\n```\n{"port": 80}\n```\nAnything else?',
        'The answer is {"port": 80}.',
        ' {"port": 80}\n',
    ],
)
async def test_text_around_requested_json_is_removed(text: str, streaming: bool) -> None:
    result = await Scripted(answering(text)).agent(stream=streaming).run(WANTS_JSON)

    assert result.content == '{"port": 80}'


async def test_text_is_unchanged_without_a_json_schema() -> None:
    text = '```json\n{"port": 80}\n```'

    assert (await Scripted(answering(text)).agent().run(JOB)).content == text


@pytest.mark.parametrize(
    ("text", "schema", "found"),
    [
        ('{"a":1}', {}, '{"a":1}'),
        ('see [1]: {"a":1}', {"type": "object"}, '{"a":1}'),
        ('see {"a":1}: [1]', {"type": "array"}, "[1]"),
        ('{"a":1} or {"a":2}', {}, '{"a":1} or {"a":2}'),
        ('```\n{"a":1}\n``` or ```\n{"a":2}\n```', {}, '```\n{"a":1}\n``` or ```\n{"a":2}\n```'),
        ('```python\nx = {}\n```\n```json\n{"a":1}\n```', {}, '{"a":1}'),
        ('{not json} {"a":{"b":[]}}', {}, '{"a":{"b":[]}}'),
        ("```json\n7\n```", {"type": "integer"}, "7"),
        ("no JSON at all", {}, "no JSON at all"),
        ('{"a":NaN}', {}, '{"a":NaN}'),
        ('{"a":1', {}, '{"a":1'),
        ("", {}, ""),
        ('{"a":1} beside text', {"type": ["object", "null"]}, '{"a":1}'),
    ],
)
def test_the_one_json_value_of_a_text_is_found(text: str, schema: dict[str, Any], found: str) -> None:
    assert json_text(text, schema) == found


@pytest.mark.parametrize(
    "text",
    [
        "[" * 60_000,
        "{" * 60_000,
        '{"a":' * 10_000,
        "```json\n" * 10_000,
        "9" * 60_000,
        "```" + " " * 60_000 + "x",
        "```" + "\t" * 60_000 + "x",
        "``` " * 15_000 + "x",
    ],
)
def test_a_search_for_json_in_hostile_text_ends_soon(text: str) -> None:
    began = time.thread_time()

    assert json_text(text, {}) == text
    assert time.thread_time() - began < 1.0
    assert MAX_CANDIDATES < 100


def test_the_accepted_answers_are_described_in_words() -> None:
    accept = Accept(contains=("a\nb", "c"), pattern="^x+$", rubric="Be kind.", json_schema=SCHEMA)
    words = acceptance(accept)

    for part in ('"a\\nb","c"', "^x+$", "Be kind.", '"required":["port"]'):
        assert part in words
    assert job_message(RunRequest(task_id="t1", description="Do it.", accept=accept)) == f"Do it.\n\n{words}"


def test_nothing_is_added_where_any_answer_is_accepted() -> None:
    assert job_message(RunRequest(task_id="t1", description="Do it.", accept=Accept())) == "Do it."
