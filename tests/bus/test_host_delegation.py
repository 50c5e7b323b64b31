"""A node host whose agents delegate, with the test playing EXECUTE."""

import asyncio
from collections.abc import AsyncIterator
from contextvars import ContextVar
from typing import Any

import pytest
from msgspec.structs import replace
from support.phase_harness import Stage
from support.runs import event_subject, stop_run
from support.wait import until

from loom import delegate
from loom.agents.host.node_host import NodeHost
from loom.agents.host.timings import HostTimings
from loom.bus.bus import Bus
from loom.bus.natsio.transport.message import Msg
from loom.runner.timings import ServiceTimings
from loom.schemas.errors import SubtaskFailed
from loom.schemas.events import AgentEvent, Done, TokenUsage
from loom.schemas.run import RunEvent, RunRequest, delegated_id, read_events
from loom.schemas.task import RunResult, TaskError, TaskResult
from loom.types import AgentNode, CapabilityProfile

CHILD = delegated_id("t1", 1, 1)


@pytest.fixture
def timings() -> ServiceTimings:
    return ServiceTimings(host=HostTimings(heartbeat_s=0.1))


def node(agent: Any) -> AgentNode:
    return AgentNode(id="n1", agent=agent, capabilities=CapabilityProfile(scores={"code": 0.5}))


class Watcher:
    """Run requests and the events that came back, as EXECUTE sees them."""

    def __init__(self, bus: Bus, host: NodeHost, **facts: Any) -> None:
        self.bus, self.host = bus, host
        self.request = RunRequest(**{"task_id": "t1", "node_id": "n1", "description": "it", **facts})
        self.events: list[RunEvent] = []
        self.subject = ""

    def _take(self, msg: Msg) -> None:
        assert b'"ad":{"task_id"' not in msg.data, "EXECUTE derives the id"
        self.events.extend(self._with_id(event) for event in read_events(msg.data))

    def _with_id(self, event: RunEvent) -> RunEvent:
        if event.ad is None:
            return event
        task_id = delegated_id(self.request.task_id, self.request.attempt, event.call)
        return replace(event, ad=replace(event.ad, task_id=task_id))

    async def ask(self, **facts: Any) -> "Watcher":
        request = RunRequest(
            **{**{name: getattr(self.request, name) for name in RunRequest.__struct_fields__}, **facts}
        )
        self.subject = self.subject or await event_subject(self.bus, self.host.host_id, self._take)
        await self.bus.connection.publish(
            self.bus.subjects.of("run", "local", self.host.host_id), request, reply=self.subject
        )
        return self

    async def answer(self, task_id: str = CHILD, content: str = "four", **facts: Any) -> None:
        """Send the end of delegated work, from the next event on."""
        result = TaskResult(**{"task_id": task_id, "state": "succeeded", "content": content, **facts})
        await self.ask(answers=(result,), from_seq=self.events[-1].seq + 1)

    def kinds(self) -> list[str]:
        return [event.kind for event in self.events if event.kind not in ("heartbeat", "delta")]

    async def event(self, kind: str, *, count: int = 1) -> RunEvent:
        def found() -> list[RunEvent]:
            return [event for event in self.events if event.kind == kind]

        await until(lambda: len(found()) >= count, within_s=20, what=f"{count} {kind}; recorded {self.kinds()}")
        return found()[count - 1]


async def watch(stage: Stage, host: NodeHost, **facts: Any) -> Watcher:
    return await Watcher(stage.bus, host, **facts).ask()


async def ask_one(job: RunRequest) -> str:
    if job.description == "plain":
        return "plain"
    return f"the parts are {await delegate('two and two', domain='math', context={'k': 1})}"


async def test_a_delegating_run_waits_without_a_slot_and_goes_on_with_the_answer(stage: Stage) -> None:
    host = await stage.host([node(ask_one)], slots=1)
    one = await watch(stage, host, priority="high", token_budget=100)
    ad = (await one.event("waiting")).ad
    assert ad is not None
    assert (ad.task_id, ad.description, ad.domain, ad.context) == (CHILD, "two and two", "math", {"k": 1})
    assert (ad.priority, ad.token_budget) == ("high", 50)
    await one.event("heartbeat", count=2)
    other = await watch(stage, host, task_id="t2", description="plain")
    await other.event("result")  # in the one slot there is
    await one.answer()
    result = (await one.event("result")).result
    assert result is not None
    assert result.content == "the parts are four"
    assert one.kinds() == ["accepted", "started", "waiting", "accepted", "resumed", "result"]
    assert (await one.event("resumed")).task_id == CHILD
    numbers = [event.seq for event in one.events if event.kind != "accepted"]
    assert numbers == sorted(set(numbers))


async def test_an_answered_run_waits_for_a_slot_ahead_of_newcomers(stage: Stage) -> None:
    order: list[str] = []
    gate = asyncio.Event()

    async def work(job: RunRequest) -> str:
        if job.task_id == "t1":
            await delegate("a part")
        order.append(job.task_id)
        if job.task_id == "holder":
            await gate.wait()
        return "x"

    host = await stage.host([node(work)], slots=1)
    one = await watch(stage, host)
    await one.event("waiting")
    await (await watch(stage, host, task_id="holder")).event("started")
    late = await watch(stage, host, task_id="late", priority="critical")
    await late.event("accepted")
    await one.answer()
    await one.event("resumed")
    await one.event("heartbeat", count=len([e for e in one.events if e.kind == "heartbeat"]) + 2)
    assert order == ["holder"]
    gate.set()
    await late.event("result")
    assert order == ["holder", "t1", "late"]


async def test_the_next_watcher_gets_the_delegations_that_are_still_awaited(stage: Stage) -> None:
    progressed = asyncio.Event()

    async def work(job: RunRequest) -> AsyncIterator[str]:
        answer = asyncio.ensure_future(delegate("slow"))
        await asyncio.sleep(0)  # the delegation above is the first
        await delegate("quick")
        for _ in range(1100):  # more than a host remembers
            yield "."
        progressed.set()
        yield await answer

    host = await stage.host([node(work)])
    one = await watch(stage, host)
    await one.event("waiting", count=2)
    await one.answer(delegated_id("t1", 1, 2))
    await progressed.wait()
    two = await watch(stage, host)
    waiting = await two.event("waiting")
    assert waiting.ad is not None
    assert (waiting.ad.task_id, waiting.ad.description) == (CHILD, "slow")
    assert [event.seq for event in two.events][:2] == sorted(event.seq for event in two.events)[:2]
    await one.event("moved")
    for _ in range(2):  # a repeated answer does no harm
        await two.answer(content="at last")
    result = (await two.event("result")).result
    assert result is not None
    assert result.content.endswith("at last")
    assert two.kinds().count("waiting") == 1


async def test_events_about_delegation_are_sent_again_however_many_events_followed(stage: Stage) -> None:
    progressed = asyncio.Event()

    async def work(job: RunRequest) -> AsyncIterator[str]:
        answer = asyncio.ensure_future(delegate("slow"))
        await asyncio.sleep(0)  # the delegation above is the first
        await delegate("quick")
        for _ in range(1100):  # more than a host keeps of them
            yield "."
        progressed.set()
        yield await answer

    host = await stage.host([node(work)])
    one = await watch(stage, host)
    await one.event("waiting", count=2)
    await one.answer(delegated_id("t1", 1, 2))
    await progressed.wait()
    await one.event("delta", count=1100)
    waiting, resumed = await one.event("waiting"), await one.event("resumed")
    seen = len(one.events)
    await one.ask(from_seq=waiting.seq)
    await one.event("resumed", count=2)
    again = one.events[seen:]
    kept = [event for event in again if event.kind in ("accepted", "waiting", "resumed")]
    assert (kept[0].kind, kept[0].seq) == ("accepted", 0)
    assert kept[1:] == [waiting, resumed]
    assert (waiting.call, waiting.ad and waiting.ad.task_id) == (1, CHILD)
    assert not [event for event in again if event.kind == "moved"]


async def test_several_parts_at_once_hold_no_slot_until_all_have_come(stage: Stage) -> None:
    async def work(job: RunRequest) -> str:
        if job.description == "plain":
            return "plain"
        return " ".join(await asyncio.gather(*(delegate(f"part {n}") for n in range(3))))

    host = await stage.host([node(work)], slots=1)
    one = await watch(stage, host)
    await one.event("waiting", count=3)
    ids = [event.ad.task_id for event in one.events if event.ad]
    assert ids == [delegated_id("t1", 1, call) for call in (1, 2, 3)]
    for n, task_id in enumerate(ids):
        await (await watch(stage, host, task_id=f"other{n}", description="plain")).event("result")
        await one.answer(task_id, f"p{n}")
        await one.event("resumed", count=n + 1)
    result = (await one.event("result")).result
    assert result is not None
    assert result.content == "p0 p1 p2"
    assert not host._queues.get_or_create("n1").busy


async def test_a_failed_part_is_an_error_the_agent_may_catch(stage: Stage) -> None:
    async def work(job: RunRequest) -> str:
        try:
            return str(await delegate("fly"))
        except SubtaskFailed as error:
            if job.description == "brave":
                return f"never mind: {error.message}"
            raise

    host = await stage.host([node(work)])
    failed: dict[str, Any] = {"state": "failed", "error": TaskError(code="no_bids", message="no node can fly")}
    one = await watch(stage, host, description="brave")
    await one.event("waiting")
    await one.answer(**failed)
    result = (await one.event("result")).result
    assert result is not None
    assert result.content == "never mind: delegated work failed: no_bids: no node can fly"
    two = await watch(stage, host, attempt=2)
    await two.event("waiting")
    await two.answer(delegated_id("t1", 2, 1), **failed)
    error = (await two.event("error")).error
    assert error is not None
    assert (error.code, error.message) == ("subtask_failed", "delegated work failed: no_bids: no node can fly")


async def test_an_agent_may_stop_waiting(stage: Stage) -> None:
    async def work(job: RunRequest) -> str:
        try:
            async with asyncio.timeout(0.1):
                return str(await delegate("too slow"))
        except TimeoutError:
            return "without them"

    host = await stage.host([node(work)], slots=1)
    one = await watch(stage, host)
    result = (await one.event("result")).result
    assert result is not None
    assert result.content == "without them"
    assert one.kinds() == ["accepted", "started", "waiting", "resumed", "result"]
    assert not host._queues.get_or_create("n1").busy


@pytest.mark.slow
@pytest.mark.parametrize("how", ["cancelled", "deadline_exceeded", "node_busy"])
async def test_a_waiting_run_can_be_stopped(stage: Stage, how: str) -> None:
    host = await stage.host([node(ask_one)], slots=1)
    one = await watch(stage, host, remaining_s=0.5 if how == "deadline_exceeded" else 60)
    await one.event("waiting")
    if how == "cancelled":
        await stop_run(stage.bus, host)
    elif how == "node_busy":
        await host.drain(0)
    error = (await one.event("error")).error
    assert error is not None
    assert error.code == how
    await until(lambda: not host._queues.get_or_create("n1").busy, what="nothing is left of it")


class Model:
    """Spends tokens of its own after the delegated work."""

    async def stream(self, _job: RunRequest) -> AsyncIterator[AgentEvent]:
        answer = await delegate("a part")
        yield Done(content=answer, usage=TokenUsage(prompt_tokens=30, completion_tokens=10))


@pytest.mark.parametrize(("taken", "kind"), [(60, "result"), (61, "error")])
async def test_a_budget_includes_the_tokens_of_delegated_work(stage: Stage, taken: int, kind: str) -> None:
    host = await stage.host([node(Model())])
    one = await watch(stage, host, token_budget=100)
    await one.event("waiting")
    await one.answer(prompt_tokens=taken - 20, completion_tokens=20)
    last = await one.event(kind)
    assert last.result == RunResult(content="four", prompt_tokens=taken + 10, completion_tokens=30)
    assert last.error is None or last.error.code == "budget_exceeded"


async def test_a_failed_run_reports_the_tokens_of_delegated_work(stage: Stage) -> None:
    async def work(job: RunRequest) -> str:
        await delegate("a part")
        raise RuntimeError("and then this")

    host = await stage.host([node(work)])
    one = await watch(stage, host)
    await one.event("waiting")
    await one.answer(prompt_tokens=5, completion_tokens=6)
    assert (await one.event("error")).result == RunResult(prompt_tokens=5, completion_tokens=6)


async def test_no_context_of_a_waiting_run_reaches_the_run_that_gets_its_slot(stage: Stage) -> None:
    secret: ContextVar[str] = ContextVar("secret", default="none")
    seen: list[str] = []

    async def work(job: RunRequest) -> str:
        seen.append(secret.get())
        secret.set(job.task_id)
        if job.task_id == "t1":
            await delegate("a part")
        return "x"

    host = await stage.host([node(work)], slots=1)
    one = Watcher(stage.bus, host)
    two = Watcher(stage.bus, host, task_id="t2")
    await asyncio.gather(one.ask(), two.ask())
    await two.event("result")
    await one.event("waiting")
    await one.answer()
    await one.event("result")
    assert seen == ["none", "none"]
