"""A model's reasoning is shown apart from its answer, kept for the job, and absent from the result."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.agents import JOB, MakeAgent, Scripted, add, answering, done_of, events_of, only, wanting
from support.openai_server import OpenAIServer, Reply, Request

from loom.agents.llm.openai.thinking import ThinkBlock, without_thoughts
from loom.schemas.errors import AgentFailed
from loom.schemas.events import AgentEvent, ReasoningDelta, TextDelta
from loom.schemas.llm import StreamChunk, ToolCall

ADD = ToolCall(id="a", name="add", arguments='{"a":2,"b":3}')


def shown(events: list[AgentEvent]) -> tuple[str, str]:
    """Reasoning and text, joined."""
    return tuple("".join(each.text for each in only(kind, events)) for kind in (ReasoningDelta, TextDelta))  # type: ignore[return-value]


@pytest.mark.parametrize("streaming", [True, False])
async def test_reasoning_is_an_event_of_its_own(streaming: bool) -> None:
    answer = [
        StreamChunk(reasoning="Two and "),
        StreamChunk(reasoning="three."),
        StreamChunk(text="Five.", finish_reason="stop"),
    ]
    events = await events_of(Scripted(answer).agent(stream=streaming))

    assert shown(events) == ("Two and three.", "Five.")
    assert done_of(events).content == "Five."


@pytest.mark.parametrize("streaming", [True, False])
async def test_reasoning_goes_back_with_the_calls_it_led_to(streaming: bool) -> None:
    provider = Scripted(wanting(ADD, reasoning="I should add."), answering("5"))
    await events_of(provider.agent(add, stream=streaming))

    turn = provider.asked[1].messages[-2]
    assert (turn.role, turn.reasoning, turn.tool_calls) == ("assistant", "I should add.", (ADD,))


async def test_reasoning_of_every_round_goes_back() -> None:
    provider = Scripted(wanting(ADD, reasoning="first"), wanting(ADD, reasoning="second"), answering("5"))
    await events_of(provider.agent(add))

    assert [each.reasoning for each in provider.asked[2].messages if each.role == "assistant"] == ["first", "second"]


@pytest.mark.parametrize("thoughts", [{"reasoning": "hm " * 400}, {"text": f"<think>{'hm ' * 400}</think>"}])
async def test_reasoning_counts_as_written_where_the_model_does_not_count(thoughts: dict[str, str]) -> None:
    answer = [StreamChunk(**thoughts), StreamChunk(text="5", finish_reason="stop")]
    done = done_of(await events_of(Scripted(answer).agent()))

    assert 300 <= done.usage.completion_tokens <= 320


async def test_reasoning_without_end_is_a_failure() -> None:
    provider = Scripted([StreamChunk(reasoning="hm " * 100)] * 100)
    with pytest.raises(AgentFailed, match="does not stop"):
        await events_of(provider.agent(max_tokens=10))


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize("size", [1, 3, 100])
async def test_a_block_of_thoughts_is_reasoning_and_no_part_of_the_answer(size: int, streaming: bool) -> None:
    text = "<think>secret {x}</think>\n42"
    pieces = [StreamChunk(text=text[at : at + size]) for at in range(0, len(text), size)]
    events = await events_of(Scripted([*pieces, StreamChunk(finish_reason="stop")]).agent(stream=streaming))

    assert shown(events) == ("secret {x}", "42")
    assert done_of(events).content == "42"


async def test_a_block_of_thoughts_before_a_call_stays_out_of_the_history() -> None:
    provider = Scripted(wanting(ADD, text="<think>add them</think>Adding."), answering("5"))
    await events_of(provider.agent(add))

    assert provider.asked[1].messages[-2].content == "Adding."


@pytest.mark.parametrize(
    ("text", "thoughts", "answer"),
    [
        ("42", "", "42"),
        ("  42 ", "", "  42 "),
        ("<think>a</think>42", "a", "42"),
        (" \n<think>a</think>\n\n 42 ", "a", "42 "),
        ("<think>a</think><think>b</think>42", "ab", "42"),
        ("<think>never closed", "never closed", ""),
        ("<think>a</thi", "a</thi", ""),
        ("<think></think>", "", ""),
        ("<thin ice", "", "<thin ice"),
        ("<thi", "", "<thi"),
        ("use <think> and </think>", "", "use <think> and </think>"),
        ("<think>a</think>b <think>c</think>", "a", "b <think>c</think>"),
    ],
)
def test_thoughts_are_removed_at_the_start_alone(text: str, thoughts: str, answer: str) -> None:
    assert without_thoughts(text) == (thoughts, answer)


@given(st.lists(st.sampled_from(["<think>", "</think>", "<", "think", ">", "/", " ", "\n", "a", "<thi", "nk>"])))
def test_a_text_in_pieces_is_shown_like_the_whole_text(pieces: list[str]) -> None:
    block = ThinkBlock()
    parts = [*map(block.split, pieces), block.rest()]

    assert ("".join(part[0] for part in parts), "".join(part[1] for part in parts)) == without_thoughts("".join(pieces))


async def test_a_run_of_a_reasoning_model_holds_its_answer_alone() -> None:
    result = (
        await Scripted([StreamChunk(reasoning="hm", text="<think>so</think>5", finish_reason="stop")]).agent().run(JOB)
    )

    assert result.content == "5"


def stream_of(*deltas: dict[str, Any], finish_reason: str) -> Reply:
    """A streamed answer of these deltas."""
    choices = [{"index": 0, "delta": delta} for delta in deltas]
    choices.append({"index": 0, "delta": {}, "finish_reason": finish_reason})
    return Reply(events=tuple(json.dumps({"choices": [choice]}) for choice in choices), done=True)


def call_of(**fields: Any) -> dict[str, Any]:
    function = {"name": "add", "arguments": '{"a":2,"b":3}'}
    return {"tool_calls": [{"index": 0, "id": "x", "type": "function", "function": function, **fields}]}


async def test_a_server_that_wants_its_reasoning_back_gets_it(server: OpenAIServer, make: MakeAgent) -> None:
    def deepseek(request: Request) -> Reply:
        turns = [message for message in request.messages if message.get("tool_calls")]
        if not turns:
            return stream_of({"reasoning_content": "I should add."}, call_of(), finish_reason="tool_calls")
        if turns[0].get("reasoning_content") != "I should add.":
            return Reply(status=400, body='{"error": {"message": "Missing `reasoning_content`"}}')
        return Reply(text="5")

    server.answer = deepseek
    events = await events_of(make(add))

    assert shown(events) == ("I should add.", "5")


async def test_a_server_that_wants_a_signature_back_gets_it(server: OpenAIServer, make: MakeAgent) -> None:
    signature = {"google": {"thought_signature": "SIG"}}

    def gemini(request: Request) -> Reply:
        turns = [message for message in request.messages if message.get("tool_calls")]
        if not turns:
            return stream_of(call_of(extra_content=signature), finish_reason="tool_calls")
        if turns[0]["tool_calls"][0].get("extra_content") != signature:
            return Reply(status=400, body='{"error": {"message": "a thought_signature is missing"}}')
        return Reply(text="5")

    server.answer = gemini

    assert (await make(add).run(JOB)).content == "5"
