import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from typing import Any

import pytest
from support.logs import capture_logs
from support.openai_server import OpenAIServer, Reply, Request
from support.wait import until

from loom.agents.llm.agent import Agent
from loom.agents.llm.config import AgentConfig
from loom.agents.llm.openai_provider import OpenAIProvider
from loom.agents.llm.prompt import job_message
from loom.agents.llm.token_use import estimate_tokens
from loom.agents.llm.tool_calls import EVENT_RESULT_CHARS, PARALLEL_TOOLS
from loom.agents.tools import ToolContext, tool
from loom.schemas.errors import AgentFailed, BudgetExceeded, DeadlineExceeded, LoomError
from loom.schemas.events import AgentEvent, Done, StepEnd, TextDelta, ToolCallEnd, ToolCallStart
from loom.schemas.llm import CompletionParams, CompletionResult, StreamChunk, Usage
from loom.schemas.run import RunRequest

JOB = RunRequest(task_id="t1", attempt=2, description="What is 2 + 3?", remaining_s=10)

MakeAgent = Callable[..., Agent]


@tool
def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


@pytest.fixture
async def server() -> AsyncIterator[OpenAIServer]:
    async with OpenAIServer() as running:
        yield running


@pytest.fixture
async def make(server: OpenAIServer) -> AsyncIterator[MakeAgent]:
    provider = OpenAIProvider(AgentConfig(api_key="k", base_url=server.base_url))

    def build(*tools: Any, **config: Any) -> Agent:
        return Agent(provider, AgentConfig(**config), tools=tools)

    yield build
    await provider.aclose()


async def events_of(agent: Agent, job: RunRequest = JOB) -> list[AgentEvent]:
    return [event async for event in agent.stream(job)]


def done_of(events: list[AgentEvent]) -> Done:
    assert isinstance(events[-1], Done)
    return events[-1]


def only(kind: type, events: list[AgentEvent]) -> list[Any]:
    return [event for event in events if isinstance(event, kind)]


@pytest.mark.parametrize("streaming", [True, False])
async def test_an_answer_is_streamed_and_done_comes_last(
    server: OpenAIServer, make: MakeAgent, streaming: bool
) -> None:
    server.script(Reply(text="It is five.", usage=(20, 5)))
    events = await events_of(make(stream=streaming))

    assert "".join(event.text for event in only(TextDelta, events)) == "It is five."
    assert [event.type for event in events if event.type != "text_delta"] == ["step_start", "step_end", "done"]
    done = done_of(events)
    assert (done.content, done.steps, done.tokens_used) == ("It is five.", 1, 25)
    assert (done.usage.prompt_tokens, done.usage.completion_tokens, done.usage.total_tokens) == (20, 5, 25)
    assert ("stream" in server.requests[0].body and server.requests[0].body["stream"]) is streaming


async def test_run_returns_the_result_of_a_job_or_a_plain_description(make: MakeAgent) -> None:
    assert (await make().run("Hello")).content == "You said: Hello"
    result = await make().run(JOB)

    assert result.content == f"You said: {JOB.description}"
    assert result.tokens > 0
    assert result.steps == 1


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


async def test_calls_of_one_round_run_side_by_side(server: OpenAIServer, make: MakeAgent) -> None:
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


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (("add", '{"a": "two"}'), "the arguments are not valid"),
        (("add", "{a:"), "the arguments are not valid"),
        (("add", "[1, 2]"), "the arguments are not valid"),
        (("add", "null"), "the arguments are not valid"),
        (("subtract", "{}"), "there is no tool of that name; there are: add"),
    ],
)
async def test_a_mistaken_call_is_told_to_the_model(
    server: OpenAIServer, make: MakeAgent, call: tuple[str, str], told: str
) -> None:
    server.script(Reply(tool_calls=(call,)), Reply(text="sorry"))
    with capture_logs():
        result = await make(add).run(JOB)

    assert told in server.requests[1].messages[-1]["content"]
    assert result.tool_errors == 1


async def test_an_event_shows_a_long_result_in_part(server: OpenAIServer, make: MakeAgent) -> None:
    server.script(Reply(tool_calls=(("read", "{}"),)), Reply(text="long"))
    end = only(ToolCallEnd, await events_of(make(tool(name="read")(lambda: "x" * 5000))))[0]

    assert len(end.result) == EVENT_RESULT_CHARS
    assert len(server.requests[1].messages[-1]["content"]) == 5000


async def test_tools_learn_for_whom_they_run(server: OpenAIServer, make: MakeAgent) -> None:
    def whoami(context: ToolContext) -> str:
        return f"{context.key} {context.tool_context['user']} {context.remaining_s > 0}"

    server.script(Reply(tool_calls=(("whoami", "{}"),)), Reply(text="ok"))
    await make(whoami, tool_context={"user": "ann"}).run(JOB)

    assert server.requests[1].messages[-1]["content"] == "t1:2 ann True"


async def test_a_job_narrows_the_tools(server: OpenAIServer, make: MakeAgent) -> None:
    def multiply(a: int, b: int) -> int:
        return a * b

    agent = make(add, multiply)
    server.script(Reply(tool_calls=(("multiply", '{"a":2,"b":3}'),)), Reply(text="no"))
    await agent.run(RunRequest(task_id="t1", description="x", tools=("add",)))

    assert agent.tools == ("add", "multiply")
    assert [each["function"]["name"] for each in server.requests[0].body["tools"]] == ["add"]
    assert "there is no tool of that name" in server.requests[1].messages[-1]["content"]


def test_two_tools_of_one_name_are_refused() -> None:
    with pytest.raises(LoomError, match="one name"):
        Agent(OpenAIProvider(), tools=(add, add))


async def test_the_model_is_told_prompt_task_context_and_inputs(server: OpenAIServer, make: MakeAgent) -> None:
    job = RunRequest(task_id="t1", description="Sum up.", context={"lang": "de"}, inputs={"s1": "eins", "s2": "zwei"})
    await make(system_prompt="Be brief.").run(job)
    system, user = server.requests[0].messages

    assert system == {"role": "system", "content": "Be brief."}
    assert user["content"] == job_message(job)
    for part in ("Sum up.", '{"lang":"de"}', "[s1]\neins", "[s2]\nzwei"):
        assert part in user["content"]


async def test_jobs_at_the_same_time_never_see_each_other(server: OpenAIServer, make: MakeAgent) -> None:
    def two_rounds(request: Request) -> Reply:
        if any(message["role"] == "tool" for message in request.messages):
            return Reply(text=request.messages[0]["content"])
        return Reply(tool_calls=(("add", '{"a":1,"b":1}'),), delay_s=0.01)

    server.answer = two_rounds
    agent = make(add)
    results = await asyncio.gather(*(agent.run(f"secret {n}") for n in range(10)))

    assert [result.content for result in results] == [f"secret {n}" for n in range(10)]
    assert all(len(request.messages) <= 3 for request in server.requests)


async def test_the_last_round_runs_no_tools_and_its_text_counts(server: OpenAIServer, make: MakeAgent) -> None:
    server.script(Reply(text="About five.", tool_calls=(("add", "{}"),)))
    events = await events_of(make(add, max_steps=1))

    assert only(StepEnd, events)[0].reason == "max_steps"
    assert not only(ToolCallStart, events)
    assert done_of(events).content == "About five."


@pytest.mark.parametrize("reply", [Reply(text=""), Reply(text="  "), Reply(tool_calls=(("add", "{}"),))])
async def test_an_end_without_any_text_is_a_failure(server: OpenAIServer, make: MakeAgent, reply: Reply) -> None:
    server.script(reply)
    with pytest.raises(AgentFailed, match="without an answer"):
        await events_of(make(add, max_steps=1))


def repeating(server: OpenAIServer) -> None:
    """A model that wants the same call forever, differently written each time."""
    server.answer = lambda request: Reply(tool_calls=(("look", f'{{"where":{" " * len(request.messages)}"here"}}'),))


async def test_a_call_repeated_a_third_time_is_not_run_and_the_model_told(
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
    said = [message["content"] for message in server.requests[3].messages if message["role"] == "tool"]
    assert said[:2] == ["nothing", "nothing"]
    assert "not run: the same call 3 times in a row" in said[2]
    assert said[3] == "nothing"
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


async def test_a_round_of_other_calls_in_between_begins_anew(server: OpenAIServer, make: MakeAgent) -> None:
    calls = ['{"a":1,"b":1}', '{"a":1,"b":1}', '{"a":1,"b":2}'] * 2
    server.script(*(Reply(tool_calls=(("add", call),)) for call in calls), Reply(text="done"))

    assert (await make(add).run(JOB)).tool_errors == 0


async def test_tools_without_end_are_stopped_by_the_step_budget(server: OpenAIServer, make: MakeAgent) -> None:
    server.answer = lambda request: Reply(
        text="so far", tool_calls=(("add", f'{{"a":{len(request.messages)},"b":1}}'),)
    )
    result = await make(add, max_steps=4).run(JOB)

    assert (result.content, result.steps, len(server.requests)) == ("so far", 4, 4)


async def test_different_calls_are_no_circle(server: OpenAIServer, make: MakeAgent) -> None:
    server.script(*(Reply(tool_calls=(("add", f'{{"a":{n},"b":1}}'),)) for n in range(5)), Reply(text="done"))

    assert (await make(add).run(JOB)).steps == 6


async def test_a_stream_without_an_end_is_a_failure(server: OpenAIServer, make: MakeAgent) -> None:
    server.script(Reply(text="half an ans", finish_reason=None))
    with pytest.raises(AgentFailed, match="broke off") as caught:
        await events_of(make())

    assert caught.value.partial == "half an ans"


async def test_an_answer_without_end_is_a_failure(server: OpenAIServer, make: MakeAgent) -> None:
    server.script(Reply(text="word " * 10_000))
    with pytest.raises(AgentFailed, match="does not stop"):
        await make(max_tokens=10).run(JOB)

    await until(lambda: server.disconnects == 1, what="the client hung up")


@pytest.mark.parametrize("streaming", [True, False])
async def test_an_answer_of_nothing_is_a_failure(server: OpenAIServer, make: MakeAgent, streaming: bool) -> None:
    server.script(Reply(events=('{"choices": []}',)) if streaming else Reply(text="x", no_choices=True))
    with pytest.raises(AgentFailed):
        await make(stream=streaming).run(JOB)


async def test_a_wait_the_models_server_asks_for_reaches_the_caller(server: OpenAIServer, make: MakeAgent) -> None:
    server.script(Reply(status=429, headers={"Retry-After": "60"}))
    with pytest.raises(AgentFailed) as caught:
        await make().run(RunRequest(task_id="t1", description="x", remaining_s=3600))

    assert caught.value.retry_after_s == 60


async def test_an_answer_of_full_length_is_accepted_and_a_withheld_one_is_not(
    server: OpenAIServer, make: MakeAgent
) -> None:
    server.script(Reply(text="to be contin", finish_reason="length"), Reply(text="b", finish_reason="content_filter"))

    assert (await make().run(JOB)).content == "to be contin"
    with pytest.raises(AgentFailed, match="withheld"):
        await make().run(JOB)


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize("told", [None, (0, 0)])
async def test_cost_is_estimated_when_the_model_does_not_tell(
    server: OpenAIServer, make: MakeAgent, told: tuple[int, int] | None, streaming: bool
) -> None:
    server.script(Reply(text="x" * 400, usage=told))
    result = await make(stream=streaming).run(JOB)

    assert 100 <= result.completion_tokens <= 110
    assert result.prompt_tokens >= estimate_tokens(JOB.description)


async def test_a_budget_bounds_the_answer_that_is_asked_for(server: OpenAIServer, make: MakeAgent) -> None:
    await make().run(RunRequest(task_id="t1", description="Hi", token_budget=200))

    assert 0 < server.requests[0].body["max_tokens"] < 200


async def test_a_question_beyond_the_budget_is_never_asked(server: OpenAIServer, make: MakeAgent) -> None:
    with pytest.raises(BudgetExceeded):
        await make().run(RunRequest(task_id="t1", description="Hi " * 500, token_budget=50))

    assert not server.requests


async def test_an_overspent_budget_is_a_failure_with_what_there_is(server: OpenAIServer, make: MakeAgent) -> None:
    server.script(Reply(text="expensive", usage=(900, 200)))
    with pytest.raises(BudgetExceeded) as caught:
        await make().run(RunRequest(task_id="t1", description="Hi", token_budget=1000))

    assert caught.value.partial == "expensive"
    assert caught.value.task_id == "t1"


async def test_rounds_add_up_against_the_budget(server: OpenAIServer, make: MakeAgent) -> None:
    server.answer = lambda request: Reply(
        tool_calls=(("add", f'{{"a":{len(request.messages)},"b":1}}'),), usage=(300, 50)
    )
    with pytest.raises(BudgetExceeded):
        await make(add).run(RunRequest(task_id="t1", description="Hi", token_budget=1000))

    assert len(server.requests) == 2


async def test_a_conversation_that_outgrows_the_agent_is_the_agents_failure(
    server: OpenAIServer, make: MakeAgent
) -> None:
    server.script(Reply(tool_calls=(("read", "{}"),)))
    with pytest.raises(AgentFailed, match="outgrown"):
        await make(tool(name="read")(lambda: "x" * 8000), token_budget=1000).run(JOB)

    assert len(server.requests) == 1


@pytest.mark.parametrize("streaming", [True, False])
async def test_a_slow_model_misses_the_deadline(server: OpenAIServer, make: MakeAgent, streaming: bool) -> None:
    server.script(Reply(text="late", delay_s=30))
    with pytest.raises(DeadlineExceeded):
        await make(stream=streaming).run(RunRequest(task_id="t1", description="x", remaining_s=0.1))


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


class Broken:
    def __init__(self, error: BaseException) -> None:
        self._error = error

    async def complete(self, params: CompletionParams) -> CompletionResult:  # noqa: ARG002
        raise self._error

    async def stream(self, params: CompletionParams) -> AsyncIterator[StreamChunk]:  # noqa: ARG002
        yield StreamChunk(text="well, ")
        raise self._error


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize("error", [ValueError("boom"), TimeoutError(), asyncio.CancelledError(), SystemExit()])
async def test_whatever_a_provider_raises_is_a_failure(error: BaseException, streaming: bool) -> None:
    with pytest.raises(AgentFailed, match="the model could not answer"):
        await events_of(Agent(Broken(error), AgentConfig(stream=streaming)))


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize("told", [{"prompt_tokens": -900}, {"prompt_tokens": "7"}, {"completion_tokens": 1.5}, {}])
async def test_nonsense_about_usage_is_replaced_by_an_estimate(told: dict[str, Any], streaming: bool) -> None:
    class Boastful:
        async def complete(self, _params: CompletionParams) -> CompletionResult:
            return CompletionResult(content="fine", usage=Usage(**told))

        async def stream(self, _params: CompletionParams) -> AsyncIterator[StreamChunk]:
            yield StreamChunk(text="fine", usage=Usage(**told), finish_reason="stop")

    done = done_of(await events_of(Agent(Boastful(), AgentConfig(stream=streaming))))

    assert (done.content, done.usage.estimated) == ("fine", True)
    assert 0 < done.tokens_used < 50


async def test_half_a_surrogate_pair_does_not_spoil_a_conversation(server: OpenAIServer, make: MakeAgent) -> None:
    server.script(Reply(text="a\ud83d", tool_calls=(("add", '{"a":"\ud83d"}'),)), Reply(text="b\ude00"))
    with capture_logs():
        assert (await make(add).run(JOB)).content == "b?"


@pytest.mark.parametrize("limits", [{"max_steps": 0}, {"max_tokens": 0}, {"token_budget": -1}])
def test_a_limit_below_one_is_refused(limits: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(limits))):
        AgentConfig(**limits)  # type: ignore[arg-type]
