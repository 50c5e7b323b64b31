"""The history sent back to a model is accepted by strict servers, for any text of the model."""

import asyncio
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.agents import JOB, MakeAgent, Scripted, add, answering, as_openai, events_of, history_fault, only, wanting
from support.logs import capture_logs
from support.openai_server import OpenAIServer, Reply, Request

from loom.agents.llm.history import CallIds, alternating, legal_call
from loom.agents.llm.tool_round import MAX_CALLS
from loom.agents.tools import tool
from loom.agents.tools.names import legal_name
from loom.schemas.events import ToolCallEnd, ToolCallStart
from loom.schemas.llm import AssistantMessage, StreamChunk, ToolCall, UserMessage

BROKEN_CALLS = {
    "no arguments": ("now", ""),
    "blank arguments": ("now", "  \n"),
    "arguments cut short": ("now", '{"a":'),
    "a comma too many": ("now", '{"a":1,}'),
    "arguments that are an array": ("now", "[1]"),
    "arguments that are null": ("now", "null"),
    "arguments that are a text": ("now", '"{}"'),
    "arguments twice": ("now", "{}{}"),
    "not a number": ("now", '{"a":NaN}'),
    "a raw line break in a text": ("now", '{"a":"\n"}'),
    "deep nesting": ("now", '{"a":' + "[" * 5000),
    "half a surrogate pair": ("now", '{"a":"\\ud83d"}'),
    "a name with a dot": ("functions.now", "{}"),
    "an empty name": ("", "{}"),
    "a name of a template": ("now<|channel|>json", "{}"),
    "a name of other letters": ("时间", "{}"),
    "a very long name": ("n" * 500, "{}"),
}


@tool
def now() -> str:
    """The time."""
    return "noon"


def strict(call: tuple[str, str]) -> Any:
    """A server that refuses a conversation with a broken call in it, as vLLM, llama.cpp and OpenAI do."""

    def answer(request: Request) -> Reply:
        fault = history_fault(request.messages)
        if fault:
            return Reply(status=400, body=json.dumps({"error": {"message": fault}}))
        return Reply(text="it is noon") if len(request.messages) > 1 else Reply(tool_calls=(call,))

    return answer


@pytest.mark.parametrize("call", BROKEN_CALLS.values(), ids=BROKEN_CALLS)
async def test_a_broken_call_does_not_spoil_the_conversation(
    server: OpenAIServer, make: MakeAgent, call: tuple[str, str]
) -> None:
    server.answer = strict(call)
    with capture_logs():
        assert (await make(now).run(JOB)).content == "it is noon"

    assert len(server.requests) == 2


async def test_the_result_of_a_broken_call_names_its_fault(server: OpenAIServer, make: MakeAgent) -> None:
    server.script(Reply(tool_calls=(("add", '{"a":'), ("functions.add", "{}"))), Reply(text="sorry"))
    with capture_logs():
        await make(add).run(JOB)

    *_, turn, first, second = server.requests[1].messages
    assert [call["function"]["arguments"] for call in turn["tool_calls"]] == ["{}", "{}"]
    assert "the arguments are not valid" in first["content"]
    assert "there is no tool of that name; there are: add" in second["content"]


async def test_a_call_cut_at_the_most_tokens_is_explained(server: OpenAIServer, make: MakeAgent) -> None:
    server.script(Reply(tool_calls=(("add", '{"a": 1, "b'),), finish_reason="length"), Reply(text="5"))
    with capture_logs():
        await make(add, max_tokens=4).run(JOB)

    assert "cut at its token limit" in server.requests[1].messages[-1]["content"]


async def test_calls_with_a_shared_or_missing_id_get_unique_ids() -> None:
    calls = [
        ToolCall(id=each, name="add", arguments=f'{{"a":{n},"b":0}}') for n, each in enumerate(["x", "x", "", "y"])
    ]
    provider = Scripted(wanting(*calls), wanting(calls[0]), answering("done"))
    events = await events_of(provider.agent(add))

    ids = [start.tool_call_id for start in only(ToolCallStart, events)]
    assert ids[0] == "x"
    assert ids[3] == "y"
    assert all(ids)
    assert len(set(ids)) == 5
    assert {end.tool_call_id: end.result for end in only(ToolCallEnd, events)}[ids[2]] == "2"
    assert history_fault(as_openai(provider.asked[-1])) == ""


async def test_calls_past_the_most_of_one_turn_are_answered_by_an_error() -> None:
    ran = []

    def work(n: int) -> None:
        ran.append(n)

    calls = [ToolCall(id=f"c{n}", name="work", arguments=f'{{"n":{n}}}') for n in range(MAX_CALLS + 6)]
    provider = Scripted(wanting(*calls), answering("done"))
    await events_of(provider.agent(tool(work)))

    results = [each.content for each in provider.asked[1].messages if each.role == "tool"]
    assert sorted(ran) == list(range(MAX_CALLS))
    assert [f"at most {MAX_CALLS} calls" in each for each in results] == [False] * MAX_CALLS + [True] * 6


async def test_fields_next_to_a_call_are_sent_back_unless_they_cannot_be_sent() -> None:
    signed = ToolCall(id="a", name="now", extra={"extra_content": {"google": {"thought_signature": "SIG"}}})
    broken = ToolCall(id="b", name="now", extra={"text": "\ud83d"})
    provider = Scripted(wanting(signed, broken), answering("done"))
    await events_of(provider.agent(now))

    sent = provider.asked[1].messages[-3].tool_calls
    assert [call.extra for call in sent] == [signed.extra, {}]


texts = st.text(alphabet=st.characters(codec=None), max_size=20)
calls = st.builds(
    ToolCall,
    id=texts | st.sampled_from(["x", "y"]),
    name=texts | st.just("now"),
    arguments=texts | st.sampled_from(["{}", '{"a":1}', "null", '{"a"']),
)


@settings(max_examples=60, deadline=None)
@given(rounds=st.lists(st.tuples(st.lists(calls, min_size=1, max_size=4), texts, texts), min_size=1, max_size=3))
def test_no_answer_of_a_model_makes_the_conversation_illegal(rounds: list[tuple[list[ToolCall], str, str]]) -> None:
    answers = [wanting(*wanted, text=text, reasoning=reasoning) for wanted, text, reasoning in rounds]
    provider = Scripted(*answers, answering("done"))
    with capture_logs():
        asyncio.run(events_of(provider.agent(now)))

    assert [history_fault(as_openai(asked)) for asked in provider.asked] == [""] * (len(rounds) + 1)


@pytest.mark.parametrize(
    ("name", "legal"),
    [("now", "now"), ("a.b c", "a_b_c"), ("", "unnamed"), ("时间", "unnamed"), ("..", "unnamed"), ("x" * 65, "x" * 64)],
)
def test_a_name_is_mended_to_letters_digits_and_two_signs(name: str, legal: str) -> None:
    assert legal_name(name) == legal


def test_a_legal_call_stays_as_its_model_wrote_it() -> None:
    call = ToolCall(id="a", name="now", arguments='{ "a" : 1 }', extra={"k": 1})

    assert legal_call(call, "a") == call


def test_only_a_duplicate_or_empty_id_is_replaced() -> None:
    ids = CallIds()

    assert [ids.unique(each) for each in ("call00001", "a", "a", "", " ")] == [
        "call00001",
        "a",
        "call00002",
        "call00003",
        "call00004",
    ]


def test_neighbouring_turns_of_one_role_are_joined() -> None:
    turns = [UserMessage("a"), UserMessage("b"), AssistantMessage("c"), UserMessage("d")]

    assert [turn.content for turn in alternating(turns)] == ["a\n\nb", "c", "d"]


async def test_a_turn_without_text_and_calls_never_goes_back() -> None:
    provider = Scripted(wanting(ToolCall(id="a", name="now")), [StreamChunk(finish_reason="stop")])
    agent = provider.agent(now)
    with pytest.raises(Exception, match="without an answer"):
        await events_of(agent)

    assert all(each.content or each.tool_calls for asked in provider.asked for each in asked.messages)
