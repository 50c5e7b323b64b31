"""Exceptions of user code end only their run: neither the host nor another run is affected."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextvars import ContextVar
from typing import Any

import pytest
import structlog
from support.auctions import offer_to
from support.builders import call_for_bids
from support.logs import capture_logs
from support.phase_harness import Stage
from support.runs import run
from support.wait import until

from loom.agents.host.node_host import NodeHost
from loom.agents.llm.agent import Agent
from loom.agents.llm.config import AgentConfig
from loom.agents.tools import Tool, tool
from loom.schemas.errors import AgentFailed, LoomError
from loom.schemas.events import Done, ErrorEvent, TextDelta, ToolCallEnd
from loom.schemas.llm import CompletionParams, CompletionResult, StreamChunk, ToolCall
from loom.schemas.run import RunRequest
from loom.types import AgentNode, CapabilityProfile

CANARY = "Bearer sk-canary-0123456789"


def node(agent: Any, node_id: str = "n1") -> AgentNode:
    return AgentNode(id=node_id, agent=agent, capabilities=CapabilityProfile(scores={"code": 0.5}))


async def patient(description: str) -> str:
    await asyncio.sleep(0.05)
    return description


class Poison(BaseException):
    def __str__(self) -> str:
        raise KeyboardInterrupt


class HasPoisonedStream:
    @property
    def stream(self) -> Any:
        raise KeyboardInterrupt(CANARY)


class Refuses:
    def stream(self, _job: RunRequest) -> Any:
        raise SystemExit(CANARY)


class Streams:
    """Yields an answer, and raises where it is asked to."""

    def __init__(self, where: str, error: BaseException) -> None:
        self._where, self._error = where, error
        self._left: list[Any] = [TextDelta(text="a"), Done(content="a")]

    def stream(self, _job: RunRequest) -> "Streams":
        return self

    def __aiter__(self) -> "Streams":
        if self._where == "aiter":
            raise self._error
        return self

    async def __anext__(self) -> Any:
        if self._where == "anext":
            raise self._error
        if not self._left:
            raise StopAsyncIteration
        return self._left.pop(0)

    async def aclose(self) -> None:
        if self._where == "aclose":
            raise self._error


class Mute(LoomError):
    @property
    def message(self) -> str:
        raise SystemExit(CANARY)

    @message.setter
    def message(self, _value: str) -> None:
        pass


def raising(error: BaseException) -> Callable[[str], Any]:
    async def agent(description: str) -> str:
        raise error

    return agent


def raising_in_a_thread(error: BaseException) -> Callable[[str], Any]:
    def agent(description: str) -> str:
        raise error

    return agent


async def cancels_itself(description: str) -> str:
    task = asyncio.current_task()
    assert task is not None
    task.cancel()
    await asyncio.sleep(10)
    return description


async def waits_for_a_child_that_raises(description: str) -> str:
    async def child() -> None:
        raise Poison

    async with asyncio.TaskGroup() as group:
        group.create_task(child())
    return description


class Value:
    def __getattribute__(self, name: str) -> Any:
        raise Poison


AGENTS: dict[str, tuple[Any, str]] = {
    "KeyboardInterrupt": (raising(KeyboardInterrupt(CANARY)), "KeyboardInterrupt"),
    "SystemExit in a thread": (raising_in_a_thread(SystemExit(CANARY)), "SystemExit"),
    "GeneratorExit in a thread": (raising_in_a_thread(GeneratorExit(CANARY)), "GeneratorExit"),
    "StopIteration in a thread": (raising_in_a_thread(StopIteration(CANARY)), "StopIteration"),
    "a text that raises": (raising(Poison()), "Poison"),
    "a group": (raising(BaseExceptionGroup(CANARY, [KeyboardInterrupt()])), "BaseExceptionGroup"),
    "the property stream": (HasPoisonedStream(), "KeyboardInterrupt"),
    "the call of stream": (Refuses(), "SystemExit"),
    "the iterator": (Streams("aiter", KeyboardInterrupt(CANARY)), "KeyboardInterrupt"),
    "the next event": (Streams("anext", GeneratorExit(CANARY)), "GeneratorExit"),
    "closing": (Streams("aclose", KeyboardInterrupt(CANARY)), "KeyboardInterrupt"),
    "a stray cancellation": (raising(asyncio.CancelledError(CANARY)), "CancelledError"),
    "the message of a LoomError": (raising(Mute(CANARY)), "Mute"),
    "a returned value": (lambda description: Value(), "Poison"),  # noqa: ARG005 - an agent takes one argument
    "a child task": (waits_for_a_child_that_raises, "BaseExceptionGroup"),
}


@pytest.mark.parametrize(("agent", "named"), AGENTS.values(), ids=AGENTS)
async def test_any_exception_of_an_agent_fails_its_run_alone(stage: Stage, agent: Any, named: str) -> None:
    host = await stage.host([node(agent), node(patient, "n2")], slots=1)
    bystander = await run(stage, host, task_id="by", node_id="n2")
    with capture_logs() as logs:
        watcher = await run(stage, host)
        error = (await watcher.event("error")).error
        assert (await bystander.event("result")).result is not None
        await until(lambda: not host._queues.get_or_create("n1").busy, what="its slot is free")
    assert error is not None
    assert (error.code, error.message) == ("agent_failed", f"the agent raised {named}")
    assert b"canary" not in b"".join(watcher.bodies)
    assert "canary" not in repr(logs)


async def test_an_agent_that_cancels_its_own_run_has_failed(stage: Stage) -> None:
    host = await stage.host([node(cancels_itself)])
    error = (await (await run(stage, host)).event("error")).error
    assert error is not None
    assert (error.code, error.message) == ("agent_failed", "the agent cancelled its own run")


async def test_the_text_of_an_exception_is_in_the_log_without_secrets(stage: Stage) -> None:
    host = await stage.host([node(raising(RuntimeError(f"GET /x failed, Authorization: {CANARY}")))])
    with capture_logs() as logs:
        await (await run(stage, host)).event("error")
    (line,) = [line for line in logs if line["event"] == "agent_raised"]
    assert line["error"] == "RuntimeError: GET /x failed, Authorization: Bearer ***"
    assert (line["task_id"], line["node_id"], line["log_level"]) == ("t1", "n1", "warning")
    assert line["at"].startswith("test_user_code.py:")


class FailsByEvent:
    async def stream(self, _job: RunRequest) -> AsyncIterator[Any]:
        yield ErrorEvent(error=f"the shop refused {CANARY}")


@pytest.mark.parametrize(
    "agent", [raising(AgentFailed(f"the shop refused {CANARY}")), FailsByEvent()], ids=["raised", "event"]
)
async def test_a_message_meant_for_the_submitter_is_published_without_secrets(stage: Stage, agent: Any) -> None:
    host = await stage.host([node(agent)])
    error = (await (await run(stage, host)).event("error")).error
    assert error is not None
    assert error.message == "the shop refused Bearer ***"


class Node(AgentNode):
    def claim(self, domain: str) -> float:
        raise KeyboardInterrupt(domain)


async def test_a_node_that_raises_on_a_call_for_bids_does_not_end_its_host(stage: Stage) -> None:
    host = await stage.host([Node(id="n1", agent=patient)])
    assert (await offer_to(stage.bus, call_for_bids())).decline == "unqualified"
    await (await run(stage, host)).event("result")


# -- models and tools


class Model:
    """Asks for a tool, then answers; `where` raises."""

    def __init__(self, where: str = "", error: BaseException | None = None) -> None:
        self._where, self._error = where, error

    def _check(self, where: str) -> None:
        if where == self._where and self._error is not None:
            raise self._error

    async def complete(self, params: CompletionParams) -> CompletionResult:
        self._check("complete")
        return CompletionResult(content=params.messages[0].content, finish_reason="stop")

    def stream(self, params: CompletionParams) -> AsyncIterator[StreamChunk]:
        self._check("call")
        return self._pieces(params)

    async def _pieces(self, params: CompletionParams) -> AsyncIterator[StreamChunk]:
        self._check("stream")
        results = [message.content for message in params.messages if message.role == "tool"]
        if results or not params.tools:
            yield StreamChunk(text=results[0] if results else "answer", finish_reason="stop")
        else:
            yield StreamChunk(tool_calls=(ToolCall(id="1", name="work", arguments="{}"),), finish_reason="tool_calls")


@pytest.mark.parametrize("error", [KeyboardInterrupt(CANARY), GeneratorExit(), Poison(), RuntimeError(CANARY)])
@pytest.mark.parametrize("where", ["complete", "call", "stream"])
async def test_any_exception_of_a_provider_fails_its_run_alone(stage: Stage, error: BaseException, where: str) -> None:
    agent = Agent(Model(where, error), AgentConfig(stream=where != "complete"))
    host = await stage.host([node(agent), node(patient, "n2")], slots=1)
    watcher = await run(stage, host)
    failed = (await watcher.event("error")).error
    assert failed is not None
    assert failed.message == f"the model could not answer: its provider raised {type(error).__name__}"
    assert b"canary" not in b"".join(watcher.bodies)
    await (await run(stage, host, task_id="t2", node_id="n2")).event("result")


@pytest.mark.parametrize("error", [KeyboardInterrupt(CANARY), GeneratorExit(), Poison(), ValueError(CANARY)])
@pytest.mark.parametrize("threaded", [True, False])
async def test_a_model_gets_the_message_of_a_tools_exception_and_the_bus_its_type(
    stage: Stage, error: BaseException, threaded: bool
) -> None:
    def work() -> str:
        raise error

    async def work_async() -> str:
        raise error

    made = Tool(work) if threaded else Tool(work_async, name="work")
    host = await stage.host([node(Agent(Model(), tools=[made]))])
    watcher = await run(stage, host)
    result = (await watcher.event("result")).result
    assert result is not None
    assert result.content.startswith(f"Error: {type(error).__name__}")  # the model repeats what it saw
    (ended,) = [event.event for event in watcher.events if isinstance(event.event, ToolCallEnd)]
    assert ended.result == f"Error: the tool raised {type(error).__name__}"
    assert b"canary" not in b"".join(watcher.bodies)


# -- context variables

tenant: ContextVar[str] = ContextVar("tenant", default="none")


async def test_a_run_sees_the_context_of_its_host_and_nothing_of_another_run(stage: Stage) -> None:
    seen: list[str] = []

    @tool
    def work() -> str:
        """Work."""
        seen.append(tenant.get())
        tenant.set("of a tool")
        return "done"

    async def waits(job: RunRequest) -> str:
        seen.append(tenant.get())
        tenant.set(job.task_id)
        structlog.contextvars.bind_contextvars(user=job.task_id)
        await asyncio.sleep(0.01)
        return tenant.get()

    def threaded(job: RunRequest) -> str:
        seen.append(tenant.get())
        tenant.set(job.task_id)
        return tenant.get()

    async def pieces(job: RunRequest) -> AsyncIterator[str]:
        seen.append(tenant.get())
        tenant.set(job.task_id)
        yield tenant.get()

    tenant.set("of the program")
    agents = (waits, threaded, pieces, Agent(Model(), tools=[work]))
    host = await stage.host([node(agent, f"n{n}") for n, agent in enumerate(agents)], slots=1)
    tenant.set("of a caller")
    watchers = [await run(stage, host, task_id=f"t{n}", node_id=f"n{n % 4}") for n in range(12)]
    contents = [(await watcher.event("result")).result for watcher in watchers]
    assert seen == ["of the program"] * 12
    assert [each and each.content for each in contents] == [f"t{n}" if n % 4 < 3 else "done" for n in range(12)]
    assert tenant.get() == "of a caller"
    assert not structlog.contextvars.get_contextvars()


# -- output without end


async def endless_text(description: str) -> AsyncIterator[str]:
    while True:
        yield "the same again and again " * 40


async def endless_whitespace(description: str) -> AsyncIterator[str]:
    while True:
        yield " "


async def endless_nothing(description: str) -> AsyncIterator[str]:
    while True:
        yield ""


async def one_huge_piece(description: str) -> AsyncIterator[str]:
    while True:
        yield "x" * 10_000_000


class EndlessEvents:
    async def stream(self, _job: RunRequest) -> AsyncIterator[Any]:
        while True:
            yield TextDelta(text="")


@pytest.mark.parametrize(
    "agent",
    [endless_text, endless_whitespace, endless_nothing, one_huge_piece, EndlessEvents()],
    ids=["text", "whitespace", "nothing", "one huge piece", "events"],
)
async def test_an_agent_whose_output_does_not_end_is_stopped_and_delays_no_other(
    stage: Stage, agent: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loom.agents.protocol.MAX_TEXT_CHARS", 400_000)
    monkeypatch.setattr("loom.agents.protocol.MAX_EVENTS", 10_000)
    host = await stage.host([node(agent), node(patient, "n2")])
    watcher = await run(stage, host)
    await watcher.event("started")
    longest = 0.0
    while not watcher.has("error"):
        before = time.monotonic()
        await asyncio.sleep(0)
        longest = max(longest, time.monotonic() - before)
    error = (await watcher.event("error")).error
    assert error is not None
    assert error.code == "agent_failed"
    assert error.message.startswith("endless output: more than ")
    assert longest < 1
    await (await run(stage, host, task_id="t2", node_id="n2")).event("result")


async def huge(description: str) -> str:
    return "x" * 100_000_000


def huge_in_a_thread(description: str) -> str:
    return "ü" * 50_000_000


class HugeEnd:
    async def stream(self, _job: RunRequest) -> AsyncIterator[Any]:
        yield Done(content="x" * 100_000_000)


@pytest.mark.parametrize("agent", [huge, huge_in_a_thread, HugeEnd()], ids=["async", "thread", "stream"])
async def test_a_text_of_100_mb_is_cut_without_being_scanned(stage: Stage, agent: Any) -> None:
    host: NodeHost = await stage.host([node(agent)])
    watcher = await run(stage, host)
    result = (await watcher.event("result")).result
    assert result is not None
    assert result.truncated
    assert 30_000 < len(result.content) < 2**16
    assert sum(len(body) for body in watcher.bodies) < 500_000


async def test_a_finite_long_text_is_streamed_and_cut(stage: Stage) -> None:
    async def long(description: str) -> AsyncIterator[str]:
        for _ in range(500):
            yield "x" * 1000

    host = await stage.host([node(long)])
    watcher = await run(stage, host)
    result = (await watcher.event("result")).result
    assert result is not None
    assert result.truncated
    assert sum(len(e.event.text) for e in watcher.events if isinstance(e.event, TextDelta)) == 500_000
