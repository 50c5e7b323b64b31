"""The limits of a job, and its cost, which is known after every kind of end."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from msgspec.structs import replace
from support.agents import JOB, MakeAgent, Scripted, add, events_of, wanting
from support.logs import capture_logs
from support.openai_server import OpenAIServer, Reply
from support.wait import until

from loom.agents.llm.agent import Agent
from loom.agents.llm.config import AgentConfig
from loom.agents.llm.token_use import estimate_tokens
from loom.agents.tools import tool
from loom.schemas.errors import AgentFailed, BudgetExceeded, DeadlineExceeded, LoomError
from loom.schemas.llm import CompletionParams, StreamChunk, ToolCall, Usage
from loom.schemas.run import RunRequest


async def test_an_answer_without_end_is_a_failure(server: OpenAIServer, make: MakeAgent) -> None:
    server.script(Reply(text="word " * 10_000))
    with pytest.raises(AgentFailed, match="does not stop"):
        await make(max_tokens=10).run(JOB)

    await until(lambda: server.disconnects == 1, what="the client hung up")


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize("reported", [None, (0, 0)])
async def test_cost_is_estimated_when_the_model_reports_no_usage(
    server: OpenAIServer, make: MakeAgent, reported: tuple[int, int] | None, streaming: bool
) -> None:
    server.script(Reply(text="x" * 400, usage=reported))
    result = await make(stream=streaming).run(JOB)

    assert 100 <= result.completion_tokens <= 110
    assert result.prompt_tokens >= estimate_tokens(JOB.description)


async def test_a_budget_bounds_the_length_of_the_requested_answer(server: OpenAIServer, make: MakeAgent) -> None:
    await make().run(RunRequest(task_id="t1", description="Hi", token_budget=200))

    assert 0 < server.requests[0].body["max_tokens"] < 200


async def test_a_request_beyond_the_budget_is_never_sent(server: OpenAIServer, make: MakeAgent) -> None:
    with pytest.raises(BudgetExceeded):
        await make().run(RunRequest(task_id="t1", description="Hi " * 500, token_budget=50))

    assert not server.requests


async def test_an_overspent_budget_is_a_failure_with_the_answer_so_far(server: OpenAIServer, make: MakeAgent) -> None:
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
    with pytest.raises(AgentFailed, match="exceeds the agent's token_budget"):
        await make(tool(name="read")(lambda: "x" * 8000), token_budget=1000).run(JOB)

    assert len(server.requests) == 1


@pytest.mark.parametrize("streaming", [True, False])
async def test_a_slow_model_misses_the_deadline(server: OpenAIServer, make: MakeAgent, streaming: bool) -> None:
    server.script(Reply(text="late", delay_s=30))
    with pytest.raises(DeadlineExceeded):
        await make(stream=streaming).run(RunRequest(task_id="t1", description="x", remaining_s=0.1))


@pytest.mark.parametrize("limits", [{"max_steps": 0}, {"max_tokens": 0}, {"token_budget": -1}])
def test_a_limit_below_one_is_refused(limits: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(limits))):
        AgentConfig(**limits)  # type: ignore[arg-type]


def costing(answer: list[StreamChunk], prompt: int, completion: int) -> list[StreamChunk]:
    """Return `answer` with its token usage."""
    usage = Usage(prompt_tokens=prompt, completion_tokens=completion)
    return [*answer[:-1], replace(answer[-1], usage=usage)]


ADD = ToolCall(id="a", name="add", arguments='{"a":2,"b":3}')


async def failure_of(agent: Agent, job: RunRequest = JOB) -> LoomError:
    with pytest.raises(LoomError) as caught:
        await agent.run(job)
    return caught.value


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize(
    "last",
    [
        [ValueError("gone")],
        [AgentFailed("the model's server failed (500)")],
        [DeadlineExceeded("late")],
        [KeyboardInterrupt()],
    ],
)
async def test_a_provider_that_fails_last_does_not_hide_the_spent_tokens(last: list[Any], streaming: bool) -> None:
    provider = Scripted(costing(wanting(ADD, text="One moment."), 1000, 500), last)
    error = await failure_of(provider.agent(add, stream=streaming))

    assert (error.spent.usage.prompt_tokens, error.spent.usage.completion_tokens) == (1000, 500)
    assert (error.spent.steps, error.partial) == (2, "One moment.")


async def test_an_answer_that_breaks_off_counts_as_far_as_it_came() -> None:
    error = await failure_of(Scripted([StreamChunk(text="word " * 400), OSError("reset")]).agent())

    assert 500 <= error.spent.usage.completion_tokens <= 520
    assert error.spent.usage.prompt_tokens > 0
    assert error.spent.usage.estimated


async def test_a_request_without_an_answer_costs_nothing() -> None:
    error = await failure_of(Scripted([OSError("no route")]).agent())

    assert error.spent.tokens_used == 0


@pytest.mark.parametrize(
    "answer",
    [
        [StreamChunk(text="part", finish_reason="content_filter")],
        [StreamChunk(reasoning="hm", finish_reason="length")],
        [StreamChunk(refusal="No.", finish_reason="stop")],
    ],
)
async def test_a_useless_answer_is_paid_for(answer: list[StreamChunk]) -> None:
    error = await failure_of(Scripted(costing(answer, 1000, 500)).agent())

    assert error.spent.tokens_used == 1500


async def test_a_budget_that_ends_the_job_shows_the_spent_tokens() -> None:
    provider = Scripted(costing(wanting(ADD), 300, 50), costing(wanting(ADD), 600, 100))
    error = await failure_of(provider.agent(add), RunRequest(task_id="t1", description="Hi", token_budget=1000))

    assert error.code == "budget_exceeded"
    assert error.spent.tokens_used == 1050


async def test_a_budget_too_small_for_the_next_request_shows_the_spent_tokens() -> None:
    provider = Scripted(costing(wanting(ADD), 500, 100))
    error = await failure_of(provider.agent(add), RunRequest(task_id="t1", description="Hi", token_budget=700))

    assert error.code == "budget_exceeded"
    assert error.spent.tokens_used == 600


@pytest.mark.parametrize("where", ["tool", "stream"])
async def test_a_missed_deadline_does_not_hide_the_spent_tokens(where: str) -> None:
    class Slow(Scripted):
        async def stream(self, params: CompletionParams) -> AsyncIterator[Any]:
            if self.asked:
                await asyncio.Event().wait()
            async for piece in super().stream(params):
                yield piece

    async def wait() -> None:
        if where == "tool":
            await asyncio.Event().wait()

    provider = Slow(costing(wanting(ToolCall(id="a", name="wait"), text="So far."), 1000, 500))
    with capture_logs():
        error = await failure_of(provider.agent(wait), RunRequest(task_id="t1", description="x", remaining_s=0.2))

    assert error.code == "deadline_exceeded"
    assert (error.spent.tokens_used, error.partial) == (1500, "So far.")


async def test_every_round_counts_towards_a_circles_cost() -> None:
    provider = Scripted(*[costing(wanting(ADD), 10, 5)] * 5)
    error = await failure_of(provider.agent(add))

    assert (error.code, error.spent.tokens_used) == ("agent_failed", 75)


async def test_calls_without_end_are_a_failure() -> None:
    provider = Scripted([StreamChunk(tool_call=replace(ADD, id=str(n))) for n in range(1000)])
    with pytest.raises(AgentFailed, match="does not stop"):
        await events_of(provider.agent(add, max_tokens=10))


async def test_a_whole_answer_above_the_requested_length_is_an_answer() -> None:
    result = (
        await Scripted([StreamChunk(text="x" * 100_000, finish_reason="stop")])
        .agent(stream=False, max_tokens=10)
        .run(JOB)
    )

    assert result.truncated


async def test_a_stream_without_end_is_a_failure_also_where_complete_was_wanted() -> None:
    class Endless:
        async def stream(self, _params: CompletionParams) -> AsyncIterator[str]:
            while True:
                yield "word "

    with pytest.raises(AgentFailed, match="does not stop"):
        await events_of(Agent(Endless(), AgentConfig(stream=False, max_tokens=10)))  # type: ignore[arg-type]
