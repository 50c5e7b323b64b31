import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import aclosing, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import pytest
from support.wait import until

from loom.agents.function_agent import FunctionAgent, as_agent
from loom.agents.protocol import StreamingAgent, collect
from loom.schemas.base import MAX_CONTENT_BYTES, encode
from loom.schemas.errors import AgentFailed, BudgetExceeded, DeadlineExceeded, LoomError
from loom.schemas.events import AgentEvent, Done, ErrorEvent, TextDelta, ToolCallEnd
from loom.schemas.run import RunRequest
from loom.schemas.task import Accept

JOB = RunRequest(task_id="t1", description="count to 3", inputs={"a": "one"}, remaining_s=10)


async def events_of(agent: StreamingAgent, job: RunRequest = JOB) -> list[AgentEvent]:
    return [event async for event in agent.stream(job)]


def shout(text: str) -> str:
    return text.upper()


async def test_a_parameter_of_text_gets_the_description() -> None:
    assert (await collect(FunctionAgent(shout), JOB)).content == "COUNT TO 3"
    assert (await collect(FunctionAgent(lambda description: description[:5]), JOB)).content == "count"


async def test_any_other_parameter_gets_the_whole_job() -> None:
    async def first_input(job: RunRequest) -> str:
        return job.inputs["a"]

    assert (await collect(FunctionAgent(first_input), JOB)).content == "one"


async def test_the_events_of_a_run_are_its_text_and_last_done() -> None:
    events = await events_of(FunctionAgent(shout))

    assert [event.type for event in events] == ["step_start", "text_delta", "step_end", "done"]
    assert isinstance(events[-1], Done)
    assert (events[-1].content, events[-1].steps) == ("COUNT TO 3", 1)


async def test_an_async_generator_streams_its_pieces() -> None:
    async def count(text: str) -> AsyncIterator[str]:
        for n in range(1, int(text[-1]) + 1):
            yield f"{n} "

    events = await events_of(FunctionAgent(count))

    assert [event.text for event in events if isinstance(event, TextDelta)] == ["1 ", "2 ", "3 "]
    assert (await collect(FunctionAgent(count), JOB)).content == "1 2 3 "


async def test_a_long_text_comes_in_pieces_and_its_result_is_cut() -> None:
    agent = FunctionAgent(lambda job: "ü" * 100_000)  # noqa: ARG005 - an agent takes one argument
    deltas = [event for event in await events_of(agent) if isinstance(event, TextDelta)]
    result = await collect(agent, JOB)

    assert len(deltas) > 10
    assert len(encode(result.content)) <= MAX_CONTENT_BYTES
    assert result.truncated


async def test_a_value_that_is_not_text_becomes_json() -> None:
    @dataclass
    class Report:
        rows: int

    assert (await collect(FunctionAgent(lambda job: Report(3)), JOB)).content == '{"rows":3}'  # noqa: ARG005


async def test_a_callable_object_and_a_coroutine_behind_a_lambda_work() -> None:
    class Greeter:
        async def __call__(self, text: str) -> str:
            return f"hello {text}"

    assert (await collect(FunctionAgent(Greeter()), JOB)).content == "hello count to 3"
    assert (await collect(FunctionAgent(lambda job: Greeter()(job.domain)), JOB)).content == "hello "


async def test_a_sync_function_runs_off_the_loop_and_has_its_context_variables() -> None:
    tenant: ContextVar[str] = ContextVar("tenant")
    tenant.set("acme")
    entered, leave = threading.Event(), threading.Event()

    def block(text: str) -> str:
        entered.set()
        assert leave.wait(5), f"the loop is blocked: {text}"
        return tenant.get()

    running = asyncio.create_task(collect(FunctionAgent(block), JOB))
    await until(entered.is_set, what="the function began")
    leave.set()

    assert (await running).content == "acme"


@pytest.mark.parametrize("nothing", [None, "", "  \n"])
async def test_no_answer_is_a_failure(nothing: Any) -> None:
    with pytest.raises(AgentFailed, match="returned nothing"):
        await events_of(FunctionAgent(lambda job: nothing))  # noqa: ARG005


class Own(BaseException):
    pass


RAISED = [
    ValueError("no such\ncolumn"),
    ZeroDivisionError(),
    SystemExit(1),
    KeyboardInterrupt(),
    GeneratorExit(),
    Own("text"),
    BaseExceptionGroup("many", [KeyboardInterrupt()]),
    StopIteration(),
    StopAsyncIteration(),
    RecursionError(),
    MemoryError(),
    asyncio.CancelledError(),
]


@pytest.mark.parametrize("raised", RAISED, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("kind", ["sync", "async", "generator"])
async def test_an_exception_of_a_function_is_a_failure_with_its_type_alone(raised: BaseException, kind: str) -> None:
    def sync(job: RunRequest) -> str:
        raise raised

    async def coroutine(job: RunRequest) -> str:
        raise raised

    async def generator(job: RunRequest) -> AsyncIterator[str]:
        yield "so far so good"
        raise raised

    fn = {"sync": sync, "async": coroutine, "generator": generator}[kind]
    with pytest.raises(AgentFailed) as caught:
        await events_of(FunctionAgent(fn))
    assert caught.value.message == f"the agent raised {type(raised).__name__}"


async def test_a_value_json_cannot_carry_is_a_failure() -> None:
    with pytest.raises(AgentFailed, match="neither text nor JSON"):
        await events_of(FunctionAgent(lambda job: object()))  # noqa: ARG005


async def test_a_typed_error_passes_as_it_is() -> None:
    def broke(job: RunRequest) -> str:
        raise BudgetExceeded("nothing left")

    with pytest.raises(BudgetExceeded, match="nothing left"):
        await events_of(FunctionAgent(broke))


async def hang(text: str) -> str:
    await asyncio.Event().wait()
    return "never"


async def hang_midway(text: str) -> AsyncIterator[str]:
    yield text
    await asyncio.Event().wait()


async def deaf(text: str) -> AsyncIterator[str]:
    with suppress(asyncio.CancelledError):
        await asyncio.Event().wait()
    while True:
        yield text
        await asyncio.sleep(0)


@pytest.mark.parametrize("fn", [hang, hang_midway, deaf])
async def test_the_deadline_ends_a_run(fn: Any) -> None:
    hurried = RunRequest(task_id="t1", description="x", remaining_s=0.05)
    async with asyncio.timeout(20):
        with pytest.raises(DeadlineExceeded):
            await collect(FunctionAgent(fn), hurried)


@pytest.mark.parametrize("fn", [hang, hang_midway, lambda job: threading.Event().wait(30)])  # noqa: ARG005
async def test_cancelling_stops_at_once(fn: Any) -> None:
    task = asyncio.create_task(events_of(FunctionAgent(fn)))
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait({task}, timeout=1)

    assert task.cancelled()


async def test_closing_the_stream_closes_the_generator_behind_it() -> None:
    closed = asyncio.Event()

    async def count(text: str) -> AsyncIterator[str]:
        try:
            yield text
            yield text
        finally:
            closed.set()

    async with aclosing(FunctionAgent(count).stream(JOB)) as events:
        async for event in events:
            if isinstance(event, TextDelta):
                break

    assert closed.is_set()


@pytest.mark.parametrize("fn", [lambda: 1, lambda a, b: 1, max])  # noqa: ARG005
def test_a_function_that_cannot_take_a_job_is_refused(fn: Any) -> None:
    with pytest.raises(LoomError):
        FunctionAgent(fn)


def test_anything_with_a_stream_is_an_agent_and_a_function_becomes_one() -> None:
    agent = FunctionAgent(shout, tools=["loud"])

    assert as_agent(agent) is agent
    assert agent.tools == ("loud",)
    assert isinstance(as_agent(shout), FunctionAgent)


@pytest.mark.parametrize("thing", [None, 7, "agent", FunctionAgent])
def test_an_object_that_is_not_an_agent_is_refused_with_a_hint(thing: Any) -> None:
    with pytest.raises(LoomError, match="is not an agent"):
        as_agent(thing)


class Scripted:
    def __init__(self, *events: AgentEvent) -> None:
        self._events = events

    async def stream(self, job: RunRequest) -> AsyncIterator[AgentEvent]:  # noqa: ARG002
        for event in self._events:
            yield event


@pytest.mark.parametrize(
    "events", [(), (Done(),), (Done(content=" "),), (ErrorEvent(error="sorry"), Done(content="x"))]
)
async def test_an_error_event_or_an_empty_end_is_a_failure(events: tuple[AgentEvent, ...]) -> None:
    with pytest.raises(AgentFailed):
        await collect(Scripted(*events), JOB)


async def test_a_result_counts_the_tools_that_failed() -> None:
    ends = (ToolCallEnd(tool_call_id="1", failed=True), ToolCallEnd(tool_call_id="2"))

    assert (await collect(Scripted(*ends, Done(content="x", steps=2)), JOB)).tool_errors == 1


@pytest.mark.parametrize(
    ("schema", "text", "content"),
    [
        ({"type": "string"}, "yes", '"yes"'),
        ({"type": "string"}, '"yes"', '"yes"'),
        ({"type": "string"}, "5", '"5"'),
        ({"type": "string"}, 'a "word"\n', '"a \\"word\\"\\n"'),
        ({"type": "integer"}, "yes", "yes"),
        ({"type": ["string", "null"]}, "yes", "yes"),
        ({}, "yes", "yes"),
        (None, "yes", "yes"),
    ],
)
async def test_a_bare_text_becomes_a_json_string_for_a_string_schema(
    schema: dict[str, Any] | None, text: str, content: str
) -> None:
    async def pieces(_: str) -> AsyncIterator[str]:
        yield text

    job = RunRequest(task_id="t1", description="x", accept=Accept(json_schema=schema))

    assert (await collect(FunctionAgent(lambda _: text), job)).content == content
    assert (await collect(FunctionAgent(pieces), job)).content == content
