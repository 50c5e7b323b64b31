import asyncio

import pytest
from support.agents import JOB, MakeAgent, add, done_of, events_of, only
from support.openai_server import OpenAIServer, Reply, Request

from loom.agents.llm.prompt import job_message
from loom.schemas.events import StepEnd, TextDelta, ToolCallStart
from loom.schemas.run import RunRequest


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
    assert (await make().run("Hello")).content == "You wrote: Hello"
    result = await make().run(JOB)

    assert result.content == f"You wrote: {JOB.description}"
    assert result.tokens > 0
    assert result.steps == 1


async def test_the_request_has_prompt_task_context_and_inputs(server: OpenAIServer, make: MakeAgent) -> None:
    job = RunRequest(task_id="t1", description="Sum up.", context={"lang": "de"}, inputs={"s1": "eins", "s2": "zwei"})
    await make(system_prompt="Be brief.").run(job)
    system, user = server.requests[0].messages

    assert system == {"role": "system", "content": "Be brief."}
    assert user["content"] == job_message(job)
    for part in ("Sum up.", '{"lang":"de"}', "[s1]\neins", "[s2]\nzwei"):
        assert part in user["content"]


async def test_concurrent_jobs_are_isolated(server: OpenAIServer, make: MakeAgent) -> None:
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
