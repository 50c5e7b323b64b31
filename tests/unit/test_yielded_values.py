"""The values that an agent's stream may yield."""

import time
from collections.abc import AsyncIterator
from typing import Any

import pytest

from loom.agents.function_agent import FunctionAgent
from loom.agents.job import Job
from loom.agents.protocol import collect, failure_of, spent_by
from loom.agents.yielded_values import DELTA_CHARS, TYPES, events_of
from loom.schemas.base import decode, encode
from loom.schemas.errors import AgentFailed, InvalidTask
from loom.schemas.events import AgentEvent, Done, ReasoningDelta, TextDelta, TokenUsage, ToolCallEnd, ToolCallStart
from loom.schemas.run import RunRequest

JOB = RunRequest(task_id="t1", description="count to 3", remaining_s=10)


class Scripted:
    def __init__(self, *items: Any) -> None:
        self._items = items

    async def stream(self, job: RunRequest) -> AsyncIterator[Any]:  # noqa: ARG002
        for item in self._items:
            yield item


async def test_text_that_is_yielded_without_a_done_is_the_answer() -> None:
    events: list[Any] = []

    async def report(event: Any) -> None:
        events.append(event)

    result = await collect(Scripted("hello ", "wörld"), JOB, report)

    assert result.content == "hello wörld"
    assert events == [TextDelta(text="hello "), TextDelta(text="wörld")]


async def test_a_done_has_the_last_word_over_text_before_it() -> None:
    assert (await collect(Scripted("draft", Done(content="final")), JOB)).content == "final"


async def test_mappings_with_the_type_of_an_event_are_events() -> None:
    items = ({"type": "text_delta", "text": "a"}, {"type": "done", "content": "a", "steps": 2})
    result = await collect(Scripted(*items), JOB)

    assert (result.content, result.steps) == ("a", 2)
    assert {"text_delta", "done", "tool_call_start"} <= TYPES


async def test_content_that_is_not_text_becomes_json() -> None:
    assert (await collect(Scripted(Done(content={"a": 1})), JOB)).content == '{"a":1}'  # type: ignore[arg-type]
    assert (await collect(Scripted({"type": "done", "content": [1]}), JOB)).content == "[1]"


@pytest.mark.parametrize(
    ("item", "blamed"),
    [
        (7, "yielded a int: it must yield text or events"),
        (None, "yielded a NoneType"),
        ({"text": "x"}, "yielded a dict: it must yield text or events"),
        ({"type": "greeting"}, "yielded a dict: it must yield text or events"),
        (b"x", "yielded a bytes"),
        (TextDelta(text=5), "yielded a TextDelta that cannot be sent: Expected `str`, got `int` - at `$.text`"),  # type: ignore[arg-type]
        (ToolCallStart(tool_call_id=None, name="x"), "yielded a ToolCallStart that cannot be sent"),  # type: ignore[arg-type]
        (ToolCallStart(tool_call_id="1", name="x", input={"a": object()}), "a value that JSON cannot represent"),
        (ToolCallEnd(tool_call_id="1", result={"a": 1}), "yielded a ToolCallEnd that cannot be sent"),  # type: ignore[arg-type]
        ({"type": "step_start", "step": "one"}, "yielded a mapping of type step_start that cannot be sent"),
        (Done(content=object()), "not text"),  # type: ignore[arg-type]
        (Done(content="x", usage=TokenUsage(prompt_tokens="5")), "a count is not a number"),  # type: ignore[arg-type]
    ],
)
async def test_anything_else_fails_the_run_with_a_sentence(item: Any, blamed: str) -> None:
    with pytest.raises(AgentFailed) as caught:
        await collect(Scripted(item, Done(content="x")) if not isinstance(item, Done) else Scripted(item), JOB)

    assert blamed in caught.value.message


NOT_COUNTED: Any = TokenUsage(prompt_tokens=7, completion_tokens=None, estimated_cost=None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("done", "tokens"),
    [
        (Done(content="x", usage=None), 0),  # type: ignore[arg-type]
        (Done(content="x", usage=NOT_COUNTED), 7),
        (Done(content="x", steps=None, duration_ms=None), 0),  # type: ignore[arg-type]
    ],
)
async def test_an_invalid_count_is_absent(done: Done, tokens: int) -> None:
    async def answer(_text: str) -> AsyncIterator[Done]:
        yield done

    for agent in (Scripted(done), FunctionAgent(answer)):
        result = await collect(agent, JOB)
        assert (result.content, result.tokens, result.usd) == ("x", tokens, 0.0)


@pytest.mark.parametrize("usage", [None, NOT_COUNTED, TokenUsage(prompt_tokens=2**70)])
async def test_a_failure_keeps_its_message_with_any_usage(usage: Any) -> None:
    async def answer(job: Job) -> str:
        job.report(tokens=3)
        raise AgentFailed("no paper", spent=Done(content="half", usage=usage))

    with pytest.raises(AgentFailed, match="no paper") as caught:
        await collect(FunctionAgent(answer), JOB)
    spent = spent_by(caught.value)
    assert spent is not None
    assert spent.tokens == (10 if usage is NOT_COUNTED else 3)


def test_a_field_of_ten_million_characters_is_read_fast() -> None:
    error = InvalidTask("no such file", field="key=" * 2_500_000)
    began = time.thread_time()

    assert failure_of(error, JOB).field == "key=***"
    assert time.thread_time() - began < 0.2


HALF = "a\ud83d"


@pytest.mark.parametrize(
    "item",
    [
        HALF,
        TextDelta(text=HALF),
        ReasoningDelta(text=HALF),
        Done(content=HALF),
        ToolCallEnd(tool_call_id="1", name=HALF, result=HALF),
        ToolCallStart(tool_call_id="1", name="x", input={HALF: [HALF]}),
        {"type": "text_delta", "text": HALF},
    ],
    ids=lambda item: type(item).__name__,
)
async def test_half_a_surrogate_pair_does_not_break_a_run(item: Any) -> None:
    for event in events_of(item):
        assert b"a?" in encode(event)


def test_a_long_text_is_cut_into_pieces_a_message_carries() -> None:
    pieces = list(events_of(TextDelta(text="ü" * (DELTA_CHARS + 1))))
    assert [len(piece.text) for piece in pieces if isinstance(piece, TextDelta)] == [DELTA_CHARS, 1]


def test_plain_text_events_pass_as_they_are() -> None:
    event = TextDelta(text="hello")
    assert next(iter(events_of(event))) is event


async def test_a_stream_that_is_not_iterable_fails_the_run_with_a_sentence() -> None:
    class Lists:
        def stream(self, job: RunRequest) -> list[str]:  # noqa: ARG002
            return ["a"]

    with pytest.raises(AgentFailed, match="stream returned a list: make it an async generator"):
        await collect(Lists(), JOB)  # type: ignore[arg-type]


class Words(str):
    """A text of a library's class."""

    __slots__ = ()


@pytest.mark.parametrize(
    "item",
    [
        Words("a"),
        TextDelta(text=Words("a")),
        ReasoningDelta(text=Words("a")),
        ToolCallStart(tool_call_id=Words("c"), name=Words("a"), input={Words("k"): [Words("v")]}),
        {"type": Words("text_delta"), "text": Words("a")},
    ],
)
def test_subclasses_of_str_are_sent_as_text(item: Any) -> None:
    for event in events_of(item):
        assert decode(encode(event), AgentEvent) == event  # type: ignore[arg-type]  # a union of types
