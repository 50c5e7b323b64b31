"""Costs reported by user code, and their way into the result."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from msgspec.structs import replace

from loom import Answer, Job
from loom.agents.function_agent import FunctionAgent
from loom.agents.protocol import collect, spent_by
from loom.schemas.base import decode, encode
from loom.schemas.errors import AgentFailed, BudgetExceeded, LoomError
from loom.schemas.events import Done, TextDelta, TokenUsage
from loom.schemas.run import RunRequest
from loom.schemas.task import RunResult

JOB = RunRequest(task_id="t1", description="count to 3", remaining_s=10)
LIMITED = replace(JOB, token_budget=10)


async def cost(fn: Callable[..., Any], job: RunRequest = JOB) -> tuple[int, int, float]:
    result = await collect(FunctionAgent(fn), job)
    return result.prompt_tokens, result.completion_tokens, result.usd


@pytest.mark.parametrize(
    ("tools", "allowed", "usable"),
    [
        ((), None, {"a", "b", "c"}),
        (("a", "b"), None, {"a", "b"}),
        ((), ("b", "c"), {"b", "c"}),
        (("a", "b"), ("b", "c"), {"b"}),
        ((), (), set()),
        (("a",), (), set()),
    ],
)
def test_a_job_allows_the_tools_that_both_of_its_lists_have(
    tools: tuple[str, ...], allowed: tuple[str, ...] | None, usable: set[str]
) -> None:
    job = Job.of(decode(encode(replace(JOB, tools=tools, tools_allowed=allowed)), RunRequest))
    assert {name for name in "abc" if job.allows(name)} == usable


async def test_a_function_reports_tokens_and_dollars() -> None:
    async def reports(job: Job) -> str:
        job.report(prompt_tokens=5, completion_tokens=2, cost_usd=0.5)
        job.report(tokens=3, cost_usd=0.25)
        return "done"

    assert await cost(reports) == (5, 5, 0.75)


async def test_a_sync_function_reports_from_its_thread_and_from_threads_of_its_own() -> None:
    def reports(job: Job) -> str:
        threads = [threading.Thread(target=job.report, kwargs={"prompt_tokens": 1}) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        job.report(completion_tokens=1)
        return "done"

    assert await cost(reports) == (8, 1, 0.0)


async def test_generators_report_between_their_pieces() -> None:
    def sync(job: Job) -> Iterator[str]:
        yield "a"
        job.report(prompt_tokens=1)
        yield "b"
        job.report(completion_tokens=2)

    async def coroutine(job: Job) -> AsyncIterator[str]:
        for piece in sync(job):
            yield piece

    assert await cost(sync) == await cost(coroutine) == (1, 2, 0.0)


async def test_an_object_with_stream_reports_besides_what_its_last_event_carries() -> None:
    class Streams:
        async def stream(self, job: Job) -> AsyncIterator[Any]:
            job.report(prompt_tokens=1)
            yield TextDelta(text="x")
            yield Done(content="x", usage=TokenUsage(prompt_tokens=2, completion_tokens=3, estimated_cost=0.5))

    result = await collect(Streams(), JOB)  # type: ignore[arg-type]

    assert (result.prompt_tokens, result.completion_tokens, result.usd) == (3, 3, 0.5)


@pytest.mark.parametrize(
    "usage",
    [
        {"prompt_tokens": 5, "completion_tokens": 2},
        {"input_tokens": 5, "output_tokens": 2, "total_tokens": 7},
        SimpleNamespace(prompt_tokens=5, completion_tokens=None, total_tokens=7),
        TokenUsage(prompt_tokens=5, completion_tokens=2, total_tokens=7),
    ],
)
async def test_an_answer_carries_its_usage_in_any_usual_form(usage: Any) -> None:
    assert await cost(lambda text: Answer({"text": text}, usage=usage, cost_usd=0.1)) == (5, 2, 0.1)


async def test_the_content_of_an_answer_may_be_any_value() -> None:
    assert (await collect(FunctionAgent(lambda text: Answer({"n": [len(text)]})), JOB)).content == '{"n":[10]}'


async def test_an_answer_that_is_yielded_adds_its_text_and_its_costs() -> None:
    def pieces(text: str) -> Iterator[Any]:
        yield text[:5]
        yield Answer("!", usage={"total_tokens": 4})

    result = await collect(FunctionAgent(pieces), JOB)
    assert (result.content, result.tokens) == ("count!", 4)


async def test_the_result_of_an_agent_that_a_function_has_run_is_an_answer() -> None:
    inner = RunResult(content="inner", prompt_tokens=3, completion_tokens=1, usd=0.5)
    assert await cost(lambda text: inner) == (3, 1, 0.5)  # noqa: ARG005
    assert (await collect(FunctionAgent(lambda text: inner), JOB)).content == "inner"  # noqa: ARG005


async def test_a_report_beyond_the_budget_is_raised_in_the_agent_and_ends_the_run() -> None:
    raised: list[LoomError] = []

    def greedy(job: Job) -> Iterator[str]:
        yield "so far"
        try:
            job.report(prompt_tokens=8, completion_tokens=4, cost_usd=1)
        except BudgetExceeded as error:
            raised.append(error)
            raise

    with pytest.raises(BudgetExceeded, match="the task's 10 tokens are spent: 12 were used") as caught:
        await collect(FunctionAgent(greedy), LIMITED)
    spent = spent_by(caught.value)

    assert len(raised) == 1
    assert spent is not None
    assert (spent.content, spent.prompt_tokens, spent.completion_tokens, spent.usd) == ("so far", 8, 4, 1)


async def test_an_agent_that_swallows_the_error_ends_as_budget_exceeded_all_the_same() -> None:
    def greedy(job: Job) -> str:
        try:
            job.report(tokens=11)
        except BudgetExceeded:
            return "all the same"
        return "never"

    with pytest.raises(BudgetExceeded) as caught:
        await collect(FunctionAgent(greedy), LIMITED)
    spent = spent_by(caught.value)
    assert spent is not None
    assert (spent.content, spent.tokens) == ("all the same", 11)


async def test_an_answer_beyond_the_budget_ends_as_budget_exceeded_with_its_costs() -> None:
    with pytest.raises(BudgetExceeded) as caught:
        await collect(FunctionAgent(lambda text: Answer(text, usage={"total_tokens": 11})), LIMITED)
    spent = spent_by(caught.value)
    assert spent is not None
    assert spent.tokens == 11


async def test_the_budget_itself_may_be_spent() -> None:
    assert await cost(lambda text: Answer(text, usage={"total_tokens": 10}), LIMITED) == (0, 10, 0)


async def test_a_failed_run_keeps_what_it_has_reported() -> None:
    async def fails(job: Job) -> str:
        job.report(prompt_tokens=7)
        raise ValueError("x")

    with pytest.raises(AgentFailed, match="ValueError") as caught:
        await collect(FunctionAgent(fails), JOB)
    spent = spent_by(caught.value)
    assert spent is not None
    assert spent.prompt_tokens == 7


@pytest.mark.parametrize(
    "facts",
    [
        {"tokens": -1},
        {"prompt_tokens": 1.5},
        {"completion_tokens": "3"},
        {"cost_usd": -0.1},
        {"cost_usd": "1"},
        {"cost_usd": float("nan")},
        {"tokens": 2**60},
    ],
)
def test_a_senseless_report_is_refused_with_the_name_of_the_argument(facts: dict[str, Any]) -> None:
    with pytest.raises(AgentFailed, match=next(iter(facts))):
        Job.of(JOB).report(**facts)
    with pytest.raises(AgentFailed):
        Answer("x", usage={"total_tokens": -1})


async def test_runs_of_one_request_do_not_share_their_costs() -> None:
    async def reports(job: Job) -> str:
        await asyncio.sleep(0)
        job.report(tokens=1)
        return "x"

    assert await asyncio.gather(cost(reports), cost(reports)) == [(0, 1, 0), (0, 1, 0)]


def test_a_job_is_a_run_request_and_reads_as_one() -> None:
    job = Job.of(LIMITED)

    assert isinstance(job, RunRequest)
    assert (job.key, job.token_budget) == ("t1:1", 10)
    assert decode(encode(job), RunRequest) == LIMITED
