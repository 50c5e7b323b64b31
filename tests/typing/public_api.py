"""The types of the public API, as a type checker sees them: `mypy tests/typing/public_api.py`. Nothing here runs."""

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any, assert_type

import loom
from loom import (
    Agent,
    AgentConfig,
    AgentFailed,
    AgentNode,
    BestRejected,
    CapabilityProfile,
    Done,
    Job,
    LoomError,
    OpenAIProvider,
    RejectedResult,
    RunResult,
    Runtime,
    TaskAd,
    TaskHandle,
    TaskResult,
    TextDelta,
    Tool,
    ToolContext,
    delegate,
    tool,
)


@dataclass
class Report:
    """The type of an answer."""

    total: float


async def tasks(runtime: Runtime, ad: TaskAd) -> None:
    """Answers have the type that `returns` names."""
    async with runtime as opened:
        assert_type(opened, Runtime)
    assert_type(await runtime.submit("count"), str)
    assert_type(await runtime.submit(ad, returns=int), int)
    assert_type(await runtime.submit({"description": "count"}, returns=Report), Report)
    assert_type(await runtime.submit(ad, returns=list[int]), list[int])
    assert_type(await runtime.submit(ad, cancel_with_caller=True), str)
    assert_type(runtime.submit_sync(ad, 5.0), str)
    assert_type(runtime.submit_sync(ad, returns=Report), Report)
    assert_type(await runtime.submit_many([ad, "count", {"description": "count"}]), list[TaskResult])
    await runtime.submit(3)  # type: ignore[call-overload]


async def handles(runtime: Runtime, ad: TaskAd) -> None:
    """A published task has a handle."""
    handle = await runtime.publish(ad)
    assert_type(handle, TaskHandle)
    assert_type(handle.task_id, str)
    assert_type(await handle.result(), TaskResult)
    assert_type(await handle.content(), str)
    assert_type(await handle.status(), TaskResult)


def nodes(runtime: Runtime) -> None:
    """A node comes from a function, an agent or a provider."""
    assert_type(runtime.add_agent(str.upper, name="upper", domains=["text"]), AgentNode)
    assert_type(runtime.remove_agent("upper").capabilities, CapabilityProfile)


async def agents(job: Job) -> None:
    """An agent of a model streams events and returns a result."""
    provider = OpenAIProvider(AgentConfig(model="m"))
    agent = Agent(provider, tools=[shout, area])
    assert_type(await agent.run("count"), RunResult)
    async for event in agent.stream(job):
        if isinstance(event, TextDelta):
            assert_type(event.text, str)
        if isinstance(event, Done):
            assert_type(event.tokens_used, int)
    job.report(prompt_tokens=3, cost_usd=0.5)
    assert_type(job.messages[0].content, str)


async def streaming(job: Job) -> AsyncIterator[TextDelta | Done]:
    """A streaming agent may yield events."""
    yield TextDelta(text=job.description)
    yield Done(content=job.description)


async def delegation() -> None:
    """`delegate` is a tool: a model may call it, and Python code as well."""
    assert_type(delegate, Tool)
    answer: str = await delegate("count", domain="numbers")
    assert_type(answer, str)


@tool
def shout(text: str) -> str:
    """Return the text in capitals."""
    return text.upper()


@tool(name="area", timeout_s=2)
async def area(width: float, ctx: ToolContext) -> float:
    """Return the area of a square."""
    return width * width


assert_type(shout, Tool)
assert_type(area, Tool)


def errors(error: LoomError) -> None:
    """Errors have typed attributes."""
    assert_type(error.code, str)
    assert_type(error.task_id, str | None)
    assert_type(error.retry_after_s, float | None)
    if isinstance(error, RejectedResult):
        assert_type(error.best_rejected, BestRejected | None)
    if isinstance(error, AgentFailed):
        assert_type(error.partial, str | None)
        assert_type(error.spent, Done | None)
    error.facts  # type: ignore[attr-defined]  # noqa: B018
    LoomError("why", retry_afer_s=3)  # type: ignore[call-arg]
    AgentFailed("why", tsk_id="t")  # type: ignore[call-arg]


def names() -> Any:
    """A name that is not exported is an error."""
    return loom.Runtme  # type: ignore[attr-defined]
