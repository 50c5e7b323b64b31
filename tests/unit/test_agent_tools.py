import asyncio
from contextlib import aclosing
from typing import Any

import pytest
from support.agents import JOB, MakeAgent, Scripted, add, answering, done_of, events_of, only, wanting
from support.logs import capture_logs
from support.openai_server import OpenAIServer, Reply

from loom.agents.llm.agent import Agent
from loom.agents.llm.openai.openai_provider import OpenAIProvider
from loom.agents.llm.tool_round import EVENT_RESULT_CHARS, PARALLEL_TOOLS
from loom.agents.tools import Tool, ToolContext, ToolResult, tool
from loom.schemas.errors import AgentFailed, DeadlineExceeded, LoomError
from loom.schemas.events import StepEnd, ToolCallEnd, ToolCallStart
from loom.schemas.llm import ToolCall
from loom.schemas.run import RunRequest


async def test_tools_run_until_the_model_answers(server: OpenAIServer, make: MakeAgent) -> None:
    server.script(
        Reply(tool_calls=(("add", '{"a":2,"b":3}'), ("add", '{"a":1,"b":1}')), usage=(10, 4)),
        Reply(text="5 and 2", usage=(30, 2)),
    )
    events = await events_of(make(add))

    starts, ends = only(ToolCallStart, events), only(ToolCallEnd, events)
    assert [(start.name, start.input) for start in starts] == [("add", {"a": 2, "b": 3}), ("add", {"a": 1, "b": 1})]
    assert {end.tool_call_id: end.result for end in ends} == {"call_0": "5", "call_1": "2"}
    assert [end.reason for end in only(StepEnd, events)] == ["tool_use", "complete"]
    assert done_of(events).tokens_used == 46
    answers = [message for message in server.requests[1].messages if message["role"] == "tool"]
    assert [(answer["tool_call_id"], answer["content"]) for answer in answers] == [("call_0", "5"), ("call_1", "2")]
    assert server.requests[1].messages[-3]["tool_calls"][0]["function"]["name"] == "add"


async def test_calls_of_one_round_run_concurrently(server: OpenAIServer, make: MakeAgent) -> None:
    both = asyncio.Barrier(2)

    async def meet(name: str) -> str:
        await both.wait()
        return name

    server.script(Reply(tool_calls=(("meet", '{"name":"a"}'), ("meet", '{"name":"b"}'))), Reply(text="met"))

    assert (await make(meet).run(JOB)).content == "met"


async def test_no_more_than_eight_calls_run_at_a_time(server: OpenAIServer, make: MakeAgent) -> None:
    running, most = 0, 0

    async def work() -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        for _ in range(5):
            await asyncio.sleep(0)
        running -= 1

    server.script(Reply(tool_calls=(("work", "{}"),) * 20), Reply(text="done"))
    await make(work).run(JOB)

    assert most == PARALLEL_TOOLS == 8


@pytest.mark.slow
@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (("add", '{"a": "two"}'), "the arguments are not valid"),
        (("add", "{a:"), "the arguments are not valid"),
        (("add", "[1, 2]"), "the arguments are not valid"),
        (("add", "null"), "the arguments are not valid"),
        (("subtract", "{}"), "there is no tool of that name; there are: add"),
    ],
)
async def test_a_mistaken_call_is_reported_to_the_model(
    server: OpenAIServer, make: MakeAgent, call: tuple[str, str], reason: str
) -> None:
    server.script(Reply(tool_calls=(call,)), Reply(text="sorry"))
    with capture_logs():
        result = await make(add).run(JOB)

    assert reason in server.requests[1].messages[-1]["content"]
    assert result.tool_errors == 1


async def test_an_event_shows_a_long_result_in_part(server: OpenAIServer, make: MakeAgent) -> None:
    server.script(Reply(tool_calls=(("read", "{}"),)), Reply(text="long"))
    end = only(ToolCallEnd, await events_of(make(tool(name="read")(lambda: "x" * 5000))))[0]

    assert len(end.result) == EVENT_RESULT_CHARS
    assert len(server.requests[1].messages[-1]["content"]) == 5000


async def test_tools_receive_the_key_and_the_context_of_their_run(server: OpenAIServer, make: MakeAgent) -> None:
    def whoami(context: ToolContext) -> str:
        return f"{context.key} {context.tool_context['user']} {context.remaining_s > 0}"

    server.script(Reply(tool_calls=(("whoami", "{}"),)), Reply(text="ok"))
    await make(whoami, tool_context={"user": "ann"}).run(JOB)

    assert server.requests[1].messages[-1]["content"] == "t1:2:1 ann True"


async def test_a_job_narrows_the_tools(server: OpenAIServer, make: MakeAgent) -> None:
    def multiply(a: int, b: int) -> int:
        return a * b

    agent = make(add, multiply)
    server.script(Reply(tool_calls=(("multiply", '{"a":2,"b":3}'),)), Reply(text="no"))
    await agent.run(RunRequest(task_id="t1", description="x", tools=("add",)))

    assert agent.tools == ("add", "multiply")
    assert [each["function"]["name"] for each in server.requests[0].body["tools"]] == ["add"]
    assert "there is no tool of that name" in server.requests[1].messages[-1]["content"]


@pytest.mark.parametrize(
    ("allowed", "offered"), [(None, ["add", "multiply"]), (("multiply", "shell"), ["multiply"]), ((), [])]
)
async def test_a_model_gets_no_tool_that_the_task_does_not_allow(
    server: OpenAIServer, make: MakeAgent, allowed: tuple[str, ...] | None, offered: list[str]
) -> None:
    def multiply(a: int, b: int) -> int:
        return a * b

    server.script(Reply(text="6"))
    await make(add, multiply).run(RunRequest(task_id="t1", description="x", tools_allowed=allowed))

    assert [each["function"]["name"] for each in server.requests[0].body.get("tools", ())] == offered


def test_two_tools_of_one_name_are_refused() -> None:
    with pytest.raises(LoomError, match="the same name"):
        Agent(OpenAIProvider(), tools=(add, add))


def repeating(server: OpenAIServer) -> None:
    """A model that wants the same call forever, differently written each time."""
    server.answer = lambda request: Reply(tool_calls=(("look", f'{{"where":{" " * len(request.messages)}"here"}}'),))


async def test_a_third_equal_call_is_not_run_and_is_reported_to_the_model(
    server: OpenAIServer, make: MakeAgent
) -> None:
    ran = []

    def look(where: str) -> str:
        ran.append(where)
        return "nothing"

    call = ("look", '{"where":"here"}')
    server.script(*(Reply(tool_calls=(call,)),) * 2, Reply(tool_calls=(call, ("look", '{"where":"there"}'))))
    result = await make(look).run(JOB)

    assert ran == ["here", "here", "there"]
    results = [message["content"] for message in server.requests[3].messages if message["role"] == "tool"]
    assert results[:2] == ["nothing", "nothing"]
    assert "not run: the same call 3 times in a row" in results[2]
    assert results[3] == "nothing"
    assert result.tool_errors == 1


async def test_the_same_call_five_rounds_running_is_a_failure(server: OpenAIServer, make: MakeAgent) -> None:
    ran = []

    def look(where: str) -> str:
        ran.append(where)
        return "nothing"

    repeating(server)
    with pytest.raises(AgentFailed, match="turns in circles: the same call of look 5 rounds running"):
        await make(look).run(JOB)

    assert ran == ["here", "here"]
    assert len(server.requests) == 5


async def test_a_round_of_other_calls_in_between_resets_the_count(server: OpenAIServer, make: MakeAgent) -> None:
    calls = ['{"a":1,"b":1}', '{"a":1,"b":1}', '{"a":1,"b":2}'] * 2
    server.script(*(Reply(tool_calls=(("add", call),)) for call in calls), Reply(text="done"))

    assert (await make(add).run(JOB)).tool_errors == 0


async def test_tools_without_end_are_stopped_by_the_step_budget(server: OpenAIServer, make: MakeAgent) -> None:
    server.answer = lambda request: Reply(
        text="so far", tool_calls=(("add", f'{{"a":{len(request.messages)},"b":1}}'),)
    )
    result = await make(add, max_steps=4).run(JOB)

    assert (result.content, result.steps, len(server.requests)) == ("so far", 4, 4)


async def test_different_calls_are_not_a_repetition(server: OpenAIServer, make: MakeAgent) -> None:
    server.script(*(Reply(tool_calls=(("add", f'{{"a":{n},"b":1}}'),)) for n in range(5)), Reply(text="done"))

    assert (await make(add).run(JOB)).steps == 6


async def test_a_slow_tool_misses_the_deadline(server: OpenAIServer, make: MakeAgent) -> None:
    began = asyncio.Event()

    async def wait() -> None:
        began.set()
        await asyncio.Event().wait()

    agent = make(wait)
    await agent.run("warm up")  # the first use imports openai, which takes time of its own
    server.script(Reply(tool_calls=(("wait", "{}"),)))
    with pytest.raises(DeadlineExceeded), capture_logs():
        await agent.run(RunRequest(task_id="t1", description="x", remaining_s=0.5))

    assert began.is_set()


@pytest.mark.parametrize("by", ["cancel", "aclose"])
async def test_stopping_stops_a_running_tool_at_once(server: OpenAIServer, make: MakeAgent, by: str) -> None:
    began, stopped = asyncio.Event(), asyncio.Event()

    async def work() -> None:
        began.set()
        try:
            await asyncio.Event().wait()
        finally:
            stopped.set()

    server.script(Reply(tool_calls=(("work", "{}"), ("quick", "{}"))))
    agent = make(work, tool(name="quick")(lambda: "done"))

    if by == "cancel":
        task = asyncio.create_task(events_of(agent))
        async with asyncio.timeout(5):
            await began.wait()
        task.cancel()
        await asyncio.wait({task}, timeout=1)
        assert task.cancelled()
    else:
        async with asyncio.timeout(5), aclosing(agent.stream(JOB)) as events:
            async for event in events:
                if isinstance(event, ToolCallEnd):
                    break
    assert stopped.is_set()


@pytest.mark.slow
async def test_a_tool_that_resists_cancelling_is_left_behind(server: OpenAIServer, make: MakeAgent) -> None:
    began, release = asyncio.Event(), asyncio.Event()

    async def stubborn() -> None:
        began.set()
        while not release.is_set():
            try:
                await release.wait()
            except asyncio.CancelledError:
                continue

    server.script(Reply(tool_calls=(("stubborn", "{}"),)))
    task = asyncio.create_task(events_of(make(stubborn)))
    async with asyncio.timeout(5):
        await began.wait()
    task.cancel()
    await asyncio.wait({task}, timeout=1)
    release.set()

    assert task.cancelled()


class Unprintable(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no words")

    __repr__ = __str__


class Odd(BaseException):
    pass


@pytest.mark.parametrize(
    "error",
    [
        ValueError("plain"),
        Unprintable(),
        Odd("own"),
        GeneratorExit(),
        KeyboardInterrupt(),
        SystemExit(3),
        StopIteration(),
        StopAsyncIteration(),
        asyncio.CancelledError(),
        ExceptionGroup("several", [Unprintable()]),
    ],
    ids=lambda error: type(error).__name__,
)
@pytest.mark.parametrize("threaded", [True, False])
async def test_every_exception_of_a_tool_is_a_result_and_the_run_continues(
    error: BaseException, threaded: bool
) -> None:
    def work() -> str:
        raise error

    async def work_async() -> str:
        raise error

    provider = Scripted(wanting(ToolCall(id="a", name="work")), answering("I see."))
    with capture_logs():
        result = await provider.agent(tool(work) if threaded else tool(name="work")(work_async)).run(JOB)

    assert (result.content, result.tool_errors) == ("I see.", 1)
    assert provider.asked[1].messages[-1].content.startswith(f"Error: {type(error).__name__}")


async def test_arguments_too_deep_for_an_event_are_not_shown() -> None:
    def work(a: Any) -> int:
        return len(a)

    deep = ToolCall(id="a", name="work", arguments='{"a":' + "[" * 100 + "]" * 100 + "}")
    provider = Scripted(wanting(deep), answering("done"))
    with capture_logs():
        events = await events_of(provider.agent(tool(work)))

    assert only(ToolCallStart, events)[0].input == {}
    assert provider.asked[1].messages[-1].content == "1"


async def test_each_call_of_a_job_has_its_own_key_even_among_equal_calls(server: OpenAIServer, make: MakeAgent) -> None:
    paid: list[tuple[str, str]] = []

    @tool
    async def pay(to: str, context: ToolContext) -> str:
        paid.append((context.key, context.call_id))
        return "paid"

    rounds = (
        Reply(tool_calls=(("pay", '{"to":"ann"}'), ("pay", '{"to":"bob"}'), ("pay", '{"to":"bob"}'))),
        Reply(tool_calls=(("pay", '{"to":"eve"}'),)),
        Reply(text="done"),
    )
    for _ in range(2):  # the same attempt, run again
        server.script(*rounds)
        await make(pay).run(JOB)

    assert [key for key, _ in paid] == ["t1:2:1", "t1:2:2", "t1:2:3", "t1:2:4"] * 2
    assert [key for key, _ in paid[:4]] == [key for key, _ in paid[4:]]
    assert len({call_id for _, call_id in paid[:4]}) == 4


async def test_a_call_that_is_refused_counts_for_the_keys_of_those_after_it(
    server: OpenAIServer, make: MakeAgent
) -> None:
    def key(context: ToolContext) -> str:
        return context.key

    server.script(Reply(tool_calls=(("unknown", "{}"), ("key", "{}"))), Reply(text="done"))
    await make(key).run(JOB)

    assert server.requests[1].messages[-1]["content"] == "t1:2:2"


class Raising(Tool):
    async def run(self, _arguments: str, _context: ToolContext) -> ToolResult:
        raise ValueError("out of paper")


class Returning(Tool):
    async def run(self, _arguments: str, _context: ToolContext) -> Any:
        return {"pages": 3}


class Leaving(Tool):
    async def run(self, _arguments: str, _context: ToolContext) -> ToolResult:
        raise SystemExit(3)


async def cancels_itself() -> str:
    task = asyncio.current_task()
    assert task is not None
    task.cancel()
    await asyncio.sleep(60)
    return ""


@pytest.mark.parametrize(
    ("made", "shown"),
    [
        (Raising(lambda: "", name="work"), "Error: ValueError: out of paper"),
        (Returning(lambda: "", name="work"), '{"pages":3}'),
        (Leaving(lambda: "", name="work"), "Error: SystemExit: 3"),
        (Tool(cancels_itself, name="work"), "Error: the tool cancelled itself"),
        (Tool(lambda: ToolResult("done", failed=None), name="work"), "done"),  # type: ignore[arg-type]
        (Tool(lambda: ToolResult("done", published=5), name="work"), "done"),  # type: ignore[arg-type]
        (Tool(lambda: ToolResult(5), name="work"), "5"),  # type: ignore[arg-type]
    ],
)
async def test_the_model_continues_after_any_tool_failure(made: Tool, shown: str) -> None:
    provider = Scripted(wanting(ToolCall(id="a", name="work", arguments="{}")), answering("on"))
    result = await provider.agent(made).run(JOB)

    assert result.content == "on"
    assert provider.asked[1].messages[-1].content == shown
