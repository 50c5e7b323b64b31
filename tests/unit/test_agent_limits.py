import pytest
from support.agents import JOB, MakeAgent, add
from support.openai_server import OpenAIServer, Reply
from support.wait import until

from loom.agents.llm.config import AgentConfig
from loom.agents.llm.token_use import estimate_tokens
from loom.agents.tools import tool
from loom.schemas.errors import AgentFailed, BudgetExceeded, DeadlineExceeded
from loom.schemas.run import RunRequest


async def test_an_answer_without_end_is_a_failure(server: OpenAIServer, make: MakeAgent) -> None:
    server.script(Reply(text="word " * 10_000))
    with pytest.raises(AgentFailed, match="does not stop"):
        await make(max_tokens=10).run(JOB)

    await until(lambda: server.disconnects == 1, what="the client hung up")


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


@pytest.mark.parametrize("limits", [{"max_steps": 0}, {"max_tokens": 0}, {"token_budget": -1}])
def test_a_limit_below_one_is_refused(limits: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(limits))):
        AgentConfig(**limits)  # type: ignore[arg-type]
