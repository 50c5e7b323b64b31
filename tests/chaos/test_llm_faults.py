"""Models that fail in every way, behind real agents on a real bus: each task ends with the right result or error."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
from support.builders import ad
from support.openai_server import ERROR_EVENT, OpenAIServer, Reply, Request, text_event
from support.phase_harness import Stage
from support.services import running_phases
from support.wait import until

from loom.agents.llm.agent import Agent
from loom.agents.llm.config import AgentConfig
from loom.agents.llm.openai import openai_provider
from loom.agents.llm.openai.openai_provider import OpenAIProvider
from loom.agents.tools import tool
from loom.bus import task_client
from loom.bus.bus import Bus
from loom.compat.planner import TaskPlanner
from loom.phases.sense.timings import SenseTimings
from loom.runner.services import running_nodes
from loom.runner.timings import ServiceTimings
from loom.schemas.task import TaskAd, TaskResult
from loom.types import AgentNode, CapabilityProfile

WITHIN_S = 30.0
PAGE = "<html><body><h1>502 Bad Gateway</h1>" + "x" * 5000 + "</body></html>"
CALLS = ("add", '{"a": 2, "b": 3}')


@tool
def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


@tool(timeout_s=0.1)
async def hang() -> None:
    """Never return."""
    await asyncio.Event().wait()


@tool
def burst() -> None:
    """Raise."""
    raise OSError("the disk is on fire")


@tool
def flood() -> str:
    """Return a text above the limit."""
    return "é" * 1_000_000


@tool
def opaque() -> object:
    """Return a value that JSON cannot carry."""
    return object()


def wanting(name: str, arguments: str = "{}") -> Reply:
    return Reply(tool_calls=((name, arguments),), usage=(20, 5))


def last_message(request: Request) -> str:
    """Return the last message that the model has received."""
    return str(request.messages[-1]["content"])


def echo(request: Request) -> Reply:
    """Reply with the result of a tool."""
    return Reply(text=last_message(request)[:100], usage=(20, 5))


@dataclass(frozen=True, kw_only=True)
class Fault:
    """The replies of a model, and the expected end of the task."""

    replies: Sequence[Reply | Callable[[Request], Reply]]
    """In order; the last one repeats."""
    state: str = "failed"
    code: str = "agent_failed"
    contains: str = ""
    """Part of the answer, or of the error's message."""
    requests: int = 1
    """The number of requests to the model."""
    retry_after_s: float | None = None
    ad: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    patience_s: float = 30.0
    """How long the provider lets its server be silent."""


def succeeds(*replies: Reply | Callable[[Request], Reply], contains: str, requests: int, **facts: Any) -> Fault:
    return Fault(replies=replies, state="succeeded", code="", contains=contains, requests=requests, **facts)


def fails(*replies: Reply | Callable[[Request], Reply], contains: str, **facts: Any) -> Fault:
    return Fault(replies=replies, contains=contains, **facts)


FINE = Reply(text="fine", usage=(20, 5))
FAULTS: dict[str, Fault] = {
    # -- the server is busy or broken
    "429 in seconds": succeeds(Reply(status=429, headers={"Retry-After": "1"}), FINE, contains="fine", requests=2),
    "429 in milliseconds": succeeds(
        Reply(status=429, headers={"retry-after-ms": "20"}), FINE, contains="fine", requests=2
    ),
    "429 until a past date": succeeds(
        Reply(status=429, headers={"Retry-After": "Thu, 01 Jan 2026 00:00:00 GMT"}), FINE, contains="fine", requests=2
    ),
    "429 without a word": succeeds(Reply(status=429), FINE, contains="fine", requests=2),
    "429 always": fails(Reply(status=429), contains="too busy (429)", requests=3),
    "429 past the deadline": fails(
        Reply(status=429, headers={"Retry-After": "3600"}), contains="too busy (429)", retry_after_s=3600
    ),
    "429 until a date past the deadline": fails(
        Reply(status=429, headers={"Retry-After": "Fri, 01 Jan 2100 00:00:00 GMT"}), contains="too busy (429)"
    ),
    "500 once": succeeds(Reply(status=500), FINE, contains="fine", requests=2),
    "500 always": fails(Reply(status=500, body='{"error": {"message": "oh no"}}'), contains="(500): oh no", requests=3),
    "502 with a page": fails(Reply(status=502, body=PAGE), contains="failed (502)", requests=3),
    "400 with half a character": fails(
        Reply(status=400, body='{"error": {"message": "\\ud83d"}}'), contains="(400): ?"
    ),
    "401": fails(Reply(status=401), contains="check the API key"),
    # -- the connection
    "dropped once": succeeds(Reply(cut_after=0), FINE, contains="fine", requests=2),
    "dropped always": fails(Reply(cut_after=0), contains="connection to the model's server", requests=3),
    "silent once": succeeds(Reply(delay_s=60), FINE, contains="fine", requests=2, patience_s=2),
    "silent always": fails(Reply(delay_s=60), contains="sent nothing", requests=3, patience_s=0.3),
    "late": fails(
        Reply(text="word " * 1000, pause_s=0.2), contains="", code="deadline_exceeded", ad={"timeout_s": 2.0}
    ),
    # -- the answer
    "cut in the middle": fails(Reply(text="a text of several pieces", cut_after=3), contains="broke off"),
    "silent in the middle": fails(
        Reply(text="a text of several pieces", silent_after=3), contains="sent nothing", patience_s=2
    ),
    "just ended": fails(Reply(text="half an ans", finish_reason=None), contains="broke off"),
    "an error event first": succeeds(Reply(events=(ERROR_EVENT,)), FINE, contains="fine", requests=2),
    "an error event later": fails(Reply(events=(text_event("well"), ERROR_EVENT)), contains="the engine stopped"),
    "no choices": fails(Reply(events=('{"choices": []}',)), contains="broke off", requests=3),
    "no choices, whole": fails(Reply(no_choices=True), contains="it has no choices", config={"stream": False}),
    "no text": fails(Reply(text=" "), contains="without an answer"),
    "another form": fails(Reply(body="<html>Welcome!</html>"), contains="", config={"stream": False}),
    "withheld": fails(Reply(text="b", finish_reason="content_filter"), contains="withheld"),
    "full length": succeeds(Reply(text="to be contin", finish_reason="length"), contains="to be contin", requests=1),
    "without end": fails(Reply(text="word " * 1000), contains="does not stop", config={"max_tokens": 10}),
    "no usage": succeeds(Reply(text="fine", usage=None), contains="fine", requests=1),
    # -- tools
    "arguments that are not JSON": succeeds(wanting("add", "{a:"), echo, contains="not valid", requests=2),
    "arguments that are not an object": succeeds(wanting("add", "[1]"), echo, contains="not valid", requests=2),
    "arguments of the wrong type": succeeds(
        wanting("add", '{"a": "x", "b": 1}'), echo, contains="not valid", requests=2
    ),
    "an unknown tool": succeeds(wanting("divide"), echo, contains="no tool of that name", requests=2),
    "a tool that hangs": succeeds(wanting("hang"), echo, contains="no result within 0.1 s", requests=2),
    "a tool that raises": succeeds(wanting("burst"), echo, contains="OSError: the disk is on fire", requests=2),
    "a tool that floods": succeeds(
        wanting("flood"), lambda r: Reply(text=last_message(r)[-50:]), contains="1000000 char", requests=2
    ),
    "a tool without text": succeeds(wanting("opaque"), echo, contains="neither text nor JSON", requests=2),
    "the same call again": fails(wanting(*CALLS), contains="turns in circles", requests=5),
    "tools without end": fails(
        lambda r: wanting("add", f'{{"a": {len(r.messages)}, "b": 1}}'),
        contains="without an answer",
        requests=4,
        config={"max_steps": 4},
    ),
    # -- tokens
    "more tokens than allowed": fails(
        Reply(text="dear", usage=(900, 200)),
        contains="1100 were used",
        code="budget_exceeded",
        ad={"token_budget": 1000},
    ),
    "tools beyond the tokens": fails(
        lambda r: Reply(tool_calls=(("add", f'{{"a": {len(r.messages)}, "b": 1}}'),), usage=(300, 50)),
        contains="are spent",
        code="budget_exceeded",
        requests=2,
        ad={"token_budget": 1000},
    ),
}


class Models:
    """One server behind many models, each with a separate fault; `which` returns the fault for a request."""

    def __init__(self, faults: dict[str, Fault], which: Callable[[Request], str]) -> None:
        self.asked_at: dict[str, list[float]] = {name: [] for name in faults}
        self._faults, self._which = faults, which

    def answer(self, request: Request) -> Reply:
        name = self._which(request)
        replies = self._faults[name].replies
        reply = replies[min(len(self.asked_at[name]), len(replies) - 1)]
        self.asked_at[name].append(time.monotonic())
        return reply if isinstance(reply, Reply) else reply(request)


def by_prompt(request: Request) -> str:
    """The system prompt names the fault."""
    return str(request.messages[0]["content"])


def by_number(request: Request) -> str:
    """The question ends with the number of the fault."""
    return list(NO_ESTIMATE)[int(last_message(request).rpartition(" ")[2])]


async def provider_for(url: str, patience_s: float = 30.0) -> OpenAIProvider:
    """A provider that is connected: on first use, openai's library blocks the event loop for a while."""
    provider = OpenAIProvider(AgentConfig(api_key="k", base_url=url, timeout_s=patience_s))
    await provider._client()
    return provider


@dataclass
class Cluster:
    """All phases, a host with one node for each fault, and a client's connection."""

    bus: Bus
    models: Models

    async def run(self, **facts: Any) -> TaskResult:
        ad = {"domain": "code", "description": "add 2 and 3", "estimated_complexity": 0.1, "timeout_s": 60.0, **facts}
        handle = await task_client.publish(self.bus, TaskAd(**ad), deltas=False)
        try:
            return await handle.result(WITHIN_S)
        finally:
            await handle.close()


@asynccontextmanager
async def cluster(
    nats_url: str, namespace: str, faults: dict[str, Fault], claims: Sequence[float] = (), **rooms: int
) -> AsyncIterator[Cluster]:
    """Node `n<n>` has the n-th fault, and rates itself `claims[n]` in the domain."""
    models = Models(faults, by_prompt)
    async with OpenAIServer(models.answer) as server, AsyncExitStack() as stack:
        providers = {}
        for patience_s in {fault.patience_s for fault in faults.values()}:
            providers[patience_s] = await provider_for(server.base_url, patience_s)
            stack.push_async_callback(providers[patience_s].aclose)
        nodes = []
        for n, (name, fault) in enumerate(faults.items()):
            config = AgentConfig(system_prompt=name, **fault.config)
            agent = Agent(providers[fault.patience_s], config, tools=[add, hang, burst, flood, opaque])
            claim = claims[n] if claims else 0.5
            nodes.append(AgentNode(id=f"n{n}", capabilities=CapabilityProfile(scores={"code": claim}), agent=agent))
        await stack.enter_async_context(running_phases(nats_url, namespace=namespace))
        await stack.enter_async_context(running_nodes(nats_url, lambda: nodes, namespace=namespace, **rooms))
        yield Cluster(await stack.enter_async_context(Bus(nats_url, namespace=namespace)), models)


@pytest.fixture(autouse=True)
def _hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openai_provider, "BACKOFF_S", 0.01)


@pytest.mark.slow
async def test_every_fault_of_a_model_ends_the_task_as_it_should(nats_url: str, namespace: str) -> None:
    async with cluster(nats_url, namespace, FAULTS) as running:
        runs = [running.run(**{"node_id": f"n{n}", **fault.ad}) for n, fault in enumerate(FAULTS.values())]
        ends = dict(zip(FAULTS, await asyncio.gather(*runs), strict=True))

    got = {
        name: (end.state, end.error.code if end.error else "", end.attempts, len(running.models.asked_at[name]))
        for name, end in ends.items()
    }
    assert got == {name: (fault.state, fault.code, 1, fault.requests) for name, fault in FAULTS.items()}
    for name, end in ends.items():
        assert FAULTS[name].contains in (end.error.message if end.error else end.content), name
        assert "<" not in (end.error.message if end.error else ""), name
        if FAULTS[name].retry_after_s is not None:
            assert end.error is not None
            assert end.error.retry_after_s == FAULTS[name].retry_after_s, name


@pytest.mark.slow
async def test_a_task_leaves_a_model_that_fails_for_one_that_does_not(nats_url: str, namespace: str) -> None:
    faults = {"broken": fails(Reply(status=401), contains=""), "whole": succeeds(FINE, contains="", requests=1)}
    async with cluster(nats_url, namespace, faults, claims=(0.9, 0.2)) as running:
        end = await running.run()

    assert (end.state, end.content, end.node_id, end.attempts) == ("succeeded", "fine", "n1", 2)


@pytest.mark.slow
async def test_the_only_model_is_retried_after_its_retry_after_without_a_slot(
    nats_url: str, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(openai_provider, "PATIENCE_S", 0.1)
    busy = Reply(status=429, headers={"Retry-After": "2"})
    async with cluster(
        nats_url, namespace, {"busy": succeeds(busy, FINE, contains="", requests=2)}, slots=1, backlog=0
    ) as running:
        asked_at = running.models.asked_at["busy"]
        first = asyncio.create_task(running.run())
        await until(lambda: asked_at, within_s=WITHIN_S, what="the model was asked")
        second = await running.run()
        between = len(asked_at)
        end = await first

    assert (second.state, between) == ("succeeded", 2)
    assert (end.state, end.content, end.attempts) == ("succeeded", "fine", 3)
    assert len(asked_at) == 3
    assert asked_at[2] - asked_at[0] >= 2


UNSURE = {"domain": "", "estimated_complexity": None}
NO_ESTIMATE: dict[str, Fault] = {
    "429 for long": fails(Reply(status=429, headers={"Retry-After": "3600"}), contains="AgentFailed"),
    "429 always": fails(Reply(status=429), contains="AgentFailed"),
    "500": fails(Reply(status=500), contains="AgentFailed"),
    "502 with a page": fails(Reply(status=502, body=PAGE), contains="AgentFailed"),
    "401": fails(Reply(status=401), contains="AgentFailed"),
    "dropped": fails(Reply(cut_after=0), contains="AgentFailed"),
    "silent": fails(Reply(delay_s=60), contains=""),
    "no choices": fails(Reply(no_choices=True), contains="AgentFailed"),
    "another form": fails(Reply(body="<html>Welcome!</html>"), contains="AgentFailed"),
    "prose": fails(Reply(text="I cannot tell."), contains="could not be read"),
    "half": fails(Reply(text='{"complexity": 0.5, "dom', finish_reason="length"), contains="could not be read"),
    "tools": fails(wanting("add"), contains="could not be read"),
}


@pytest.mark.slow
async def test_sense_uses_a_heuristic_when_its_model_fails(
    nats_url: str, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loom.phases.shared.circuit_breaker.MAX_FAILURES", 100)  # each fault is asked about
    models = Models(NO_ESTIMATE, by_number)
    timings = ServiceTimings(sense=SenseTimings(estimate_within_s=2.0))
    async with OpenAIServer(models.answer) as server, Stage(nats_url, namespace, timings) as stage:
        provider = await provider_for(server.base_url)
        await stage.phase("sense", llm=provider)
        for n in range(len(NO_ESTIMATE)):
            handle = await task_client.publish(
                stage.bus, ad(f"Have a look at {n}", task_id=f"t{n}", **UNSURE), deltas=False
            )
            await handle.close()
        specs = {
            name: (await stage.seen("task", phase="match", task_id=f"t{n}", within_s=WITHIN_S)).spec
            for n, name in enumerate(NO_ESTIMATE)
        }
        await provider.aclose()

    for name, spec in specs.items():
        assert (spec.method, spec.domains) == ("heuristic", ("general",)), name
        assert spec.note.startswith("the model could not be asked"), name
        assert NO_ESTIMATE[name].contains in spec.note, name


@pytest.mark.slow
async def test_a_task_stays_whole_when_the_model_fails_the_planner() -> None:
    models = Models(NO_ESTIMATE, by_number)
    async with OpenAIServer(models.answer) as server, asyncio.timeout(WITHIN_S):
        provider = await provider_for(server.base_url)
        planner = TaskPlanner(provider)
        tasks = [TaskAd(description=f"build {n}", timeout_s=1.0) for n in range(len(NO_ESTIMATE))]
        plans = await asyncio.gather(*map(planner.decompose, tasks))
        await provider.aclose()

    assert [[part.description for part in parts] for parts in plans] == [
        [f"build {n}"] for n in range(len(NO_ESTIMATE))
    ]
    assert all(models.asked_at.values())
