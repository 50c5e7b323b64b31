"""The context of a run: how a host passes it to agents, and what agents report to it."""

from collections.abc import AsyncIterator
from typing import Any

import pytest
from support.agents import JOB

from loom import Agent, CompletionParams, CompletionResult, Job
from loom.agents.function_agent import FunctionAgent
from loom.agents.protocol import StreamingAgent, collect
from loom.agents.run_context import RunContext, as_current_run, current_run
from loom.schemas.events import AgentEvent, Done
from loom.schemas.llm import Usage
from loom.schemas.run import RunRequest


class Recorder(RunContext):
    """A run context that records the reported tokens."""

    def __init__(self) -> None:
        self.reports: list[int] = []

    @property
    def delegated_tokens(self) -> int:
        return 0

    def report_tokens(self, tokens: int) -> None:
        self.reports.append(tokens)

    async def delegate(self, task: str, domain: str, token_budget: int | None, context: dict[str, Any]) -> str:
        raise NotImplementedError


class Model:
    """A provider whose answers cost 12 tokens."""

    async def complete(self, _params: CompletionParams) -> CompletionResult:
        return CompletionResult(content="fine", usage=Usage(prompt_tokens=10, completion_tokens=2))


class WithContext:
    """An agent whose `stream` takes the context of its run."""

    async def stream(self, _job: RunRequest, *, run_context: RunContext | None = None) -> AsyncIterator[AgentEvent]:
        yield Done(content="none" if run_context is None else "given")


class WithoutContext:
    """An agent whose `stream` takes the job only."""

    async def stream(self, _job: RunRequest) -> AsyncIterator[AgentEvent]:
        yield Done(content="works")


@pytest.mark.parametrize(
    ("agent", "run_context", "content"),
    [(WithContext(), Recorder(), "given"), (WithContext(), None, "none"), (WithoutContext(), Recorder(), "works")],
)
async def test_a_run_context_is_passed_to_agents_with_a_parameter_of_this_name(
    agent: StreamingAgent, run_context: RunContext | None, content: str
) -> None:
    assert (await collect(agent, JOB, run_context=run_context)).content == content


async def test_an_agent_reports_its_tokens_to_the_context_that_its_host_passes() -> None:
    recorder = Recorder()
    await collect(Agent(Model()), JOB, run_context=recorder)
    assert recorder.reports == [12]


async def test_an_agent_within_a_function_reports_its_tokens_to_the_calling_run() -> None:
    async def answer(text: str) -> str:
        return (await Agent(Model()).run(text)).content

    recorder = Recorder()
    with as_current_run(recorder):
        await collect(FunctionAgent(answer), JOB)
    assert recorder.reports == [12]


async def test_the_costs_that_a_job_reports_are_those_of_the_calling_run() -> None:
    def answer(job: Job) -> str:
        job.report(tokens=3)
        job.report(tokens=4)
        return "fine"

    recorder = Recorder()
    with as_current_run(recorder):
        await collect(FunctionAgent(answer), JOB)
    assert recorder.reports == [3, 7]


async def test_outside_of_runs_there_is_no_current_run() -> None:
    with as_current_run(Recorder()):
        assert current_run() is not None
    assert current_run() is None
