"""AmoebaLoop: a conversation as a stream of events."""

import asyncio
import json
from collections.abc import AsyncIterator

import pytest
from support.nodes import echo, fail, node
from support.openai_server import OpenAIServer, Reply
from support.services import running_phases
from support.wait import until

from loom import (
    Agent,
    AmoebaLoop,
    ClusterConfig,
    ClusterManager,
    LifecycleManager,
    LoopContext,
    OpenAIProvider,
    RewardBus,
    Runtime,
    SkillNodeRegistry,
    TaskAd,
    UserMessage,
    tool,
)
from loom.bus.bus import Bus
from loom.bus.queries import recent_records
from loom.compat.planner import TaskPlanner
from loom.schemas.errors import InvalidTask
from loom.schemas.llm import AssistantMessage
from loom.schemas.run import RunRequest
from loom.types import AgentNode, CapabilityProfile, Done, ErrorEvent, LoopEvent, PhaseEvent, SubtaskEvent, TextDelta


def loop_over(provider: OpenAIProvider, *nodes: AgentNode, **rules: object) -> AmoebaLoop:
    cluster = ClusterManager()
    for each in nodes:
        cluster.add_node(each)
    return AmoebaLoop(
        cluster=cluster,
        reward_bus=RewardBus(),
        lifecycle=LifecycleManager(ClusterConfig(**rules)),  # type: ignore[arg-type]
        planner=TaskPlanner(provider),
        skill_registry=SkillNodeRegistry(),
        llm=provider,
    )


async def events_of(loop: AmoebaLoop, text: str) -> list[LoopEvent]:
    return [event async for event in loop.execute(LoopContext(messages=[UserMessage(text)], domain="code"))]


async def test_text_steps_and_tools_are_streamed_in_order_and_done_is_last(
    phases: Bus, model: OpenAIServer, provider: OpenAIProvider
) -> None:
    @tool
    def add(a: int, b: int) -> int:
        """Add two numbers."""
        return a + b

    model.script(Reply(tool_calls=(("add", '{"a": 2, "b": 3}'),)), Reply(text="It is five.", usage=(30, 5)))
    coder = AgentNode(
        id="coder", capabilities=CapabilityProfile(scores={"code": 0.9}), agent=Agent(provider, tools=[add])
    )
    events = await events_of(loop_over(provider, coder), "what is 2 + 3?")

    kinds = [event.type for event in events if event.type not in {"text_delta", "phase"}]
    assert kinds == [
        "step_start",
        "tool_call_start",
        "tool_call_end",
        "step_end",
        "step_start",
        "step_end",
        "done",
    ]
    assert "".join(event.text for event in events if event.type == "text_delta") == "It is five."
    done = events[-1]
    assert isinstance(done, Done)
    assert (done.content, done.steps) == ("It is five.", 2)
    assert done.usage.total_tokens == done.tokens_used > 35
    assert done.duration_ms > 0
    await provider.aclose()


async def test_it_ends_after_adapt_has_learned(phases: Bus, provider: OpenAIProvider) -> None:
    coder = node("coder", echo, code=0.9)
    await events_of(loop_over(provider, coder), "sort")

    assert coder.capabilities.total_tasks == 1


async def test_a_failed_attempt_shows_as_a_recoverable_error(phases: Bus, provider: OpenAIProvider) -> None:
    events = await events_of(loop_over(provider, node("sure", fail, code=1.0), node("spare", echo, code=0.1)), "sort")

    [error] = [event for event in events if isinstance(event, ErrorEvent)]
    assert error.recoverable
    done = events[-1]
    assert isinstance(done, Done)
    assert done.content == "done: sort"


async def test_a_failed_task_ends_with_an_error_and_done(phases: Bus, provider: OpenAIProvider) -> None:
    *_, error, done = await events_of(loop_over(provider, node("clumsy", fail, code=1.0)), "sort")

    assert isinstance(error, ErrorEvent)
    assert (error.code, error.recoverable) == ("agent_failed", False)
    assert isinstance(done, Done)
    assert done.content == ""


async def test_an_agent_set_later_runs_the_next_task(phases: Bus, provider: OpenAIProvider) -> None:
    empty = AgentNode(id="coder", capabilities=CapabilityProfile(scores={"code": 0.9}))
    loop = loop_over(provider, empty)
    async with loop:
        empty.agent = echo
        events = await events_of(loop, "one")
        events += await events_of(loop, "two")

    assert [event.content for event in events if isinstance(event, Done)] == ["done: one", "done: two"]
    assert empty.capabilities.total_tasks == 2


async def test_earlier_turns_reach_the_model_as_messages(
    phases: Bus, model: OpenAIServer, provider: OpenAIProvider
) -> None:
    coder = AgentNode(id="coder", capabilities=CapabilityProfile(scores={"code": 0.9}), agent=Agent(provider))
    turns = [UserMessage("my name is Ada"), AssistantMessage("hello Ada"), UserMessage("what is my name?")]
    async for _ in loop_over(provider, coder).execute(LoopContext(messages=turns, domain="code")):
        pass

    asked = [(message["role"], message["content"]) for message in model.requests[-1].messages]
    assert asked == [("user", "my name is Ada"), ("assistant", "hello Ada"), ("user", "what is my name?")]
    await provider.aclose()


PLAN = {
    "subtasks": [
        {"id": "left", "description": "look left", "domain": "code", "dependencies": []},
        {"id": "right", "description": "look right", "domain": "code", "dependencies": []},
        {"id": "both", "description": "compare", "domain": "code", "dependencies": ["left", "right"]},
    ]
}


RUN = (("begun", None), ("ended", "coder"))


async def test_the_parts_of_a_divided_task_are_reported_at_start_and_end(
    on_bus: tuple[str, str], model: OpenAIServer, provider: OpenAIProvider
) -> None:
    """The model of the phases rates the task as hard, and divides it."""
    model.script(
        Reply(text=json.dumps({"complexity": 0.9, "domains": ["code"]})),
        Reply(text=f"Here is my plan: {json.dumps(PLAN)}"),
    )

    async def agent(job: RunRequest) -> str:
        return f"{job.description}: {', '.join(job.inputs)}"

    url, namespace = on_bus
    loop = loop_over(provider, node("coder", agent, code=0.9))
    context = LoopContext(messages=[UserMessage("cross the road")])
    async with running_phases(url, namespace=namespace, llm=provider):
        events = [event async for event in loop.execute(context)]
    await provider.aclose()

    parts = [event for event in events if isinstance(event, SubtaskEvent)]
    reported = [(part.subtask, part.state, part.node_id) for part in parts]
    assert sorted(reported[:4]) == [(id_, *of) for id_ in ("left", "right") for of in RUN]
    assert reported[4:] == [("both", *of) for of in RUN]
    assert [event.type for event in events[:2]] == ["subtask", "subtask"]
    assert len({part.child_id for part in parts}) == 3
    *_, done = events
    assert isinstance(done, Done)
    assert done.content == "cross the road: left, right, both"
    assert [event.text for event in events if event.type == "text_delta"] == [done.content]


async def test_a_context_without_a_user_is_refused(provider: OpenAIProvider) -> None:
    with pytest.raises(InvalidTask, match="no user message"):
        async for _ in loop_over(provider).execute(LoopContext()):
            pass


async def test_the_reward_bus_has_a_bus_while_the_loop_is_open(phases: Bus, provider: OpenAIProvider) -> None:
    loop = loop_over(provider, node("coder", echo, code=0.9))
    async with loop:
        await events_of(loop, "sort")
        rewards = [reward async for reward in loop.reward_bus.replay(domain="code")]

    assert [(reward.node_id, reward.score) for reward in rewards] == [("coder", 1.0)]
    assert loop.reward_bus.bus is None


async def endless(job: RunRequest) -> AsyncIterator[str]:
    yield "first "
    await asyncio.sleep(600)
    yield "last"


@pytest.mark.parametrize("leave", ["break", "close", "cancel"])
async def test_a_conversation_that_is_broken_off_cancels_its_task_and_leaves_nothing(
    phases: Bus, client: Bus, provider: OpenAIProvider, leave: str
) -> None:
    loop = loop_over(provider, node("endless", endless, code=0.9))
    before = asyncio.all_tasks()
    first = asyncio.Event()

    async def converse() -> None:
        events = loop.execute(LoopContext(messages=[UserMessage("talk")], domain="code"))
        async for event in events:
            if isinstance(event, TextDelta):
                first.set()
                if leave == "break":
                    break
                if leave == "close":
                    await events.aclose()  # type: ignore[attr-defined]

    conversing = asyncio.ensure_future(converse())
    async with asyncio.timeout(20):
        await first.wait()
    if leave == "cancel":
        conversing.cancel()
    await asyncio.wait([conversing])
    await until(lambda: not asyncio.all_tasks() - before - {conversing}, within_s=5, what="the session is closed")
    [record] = await recent_records(client, 5)
    assert record.state == "cancelled"
    assert loop.reward_bus.bus is None


async def test_a_conversation_that_is_broken_off_within_an_open_loop_leaves_it_usable(
    phases: Bus, provider: OpenAIProvider
) -> None:
    loop = loop_over(provider, node("endless", endless, slow=0.9), node("echo", echo, code=0.9))
    async with loop:
        bus = loop.reward_bus.bus
        assert bus is not None
        before = len(bus.connection._nc._subs)
        async for event in loop.execute(LoopContext(messages=[UserMessage("talk")], domain="slow")):
            if isinstance(event, TextDelta):
                break
        await until(lambda: len(bus.connection._nc._subs) == before, what="its subscriptions end")
        assert (await events_of(loop, "sum"))[-1].content == "done: sum"  # type: ignore[union-attr]


async def test_each_phase_is_reported_with_its_decision(
    on_bus: tuple[str, str], phases: Bus, provider: OpenAIProvider
) -> None:
    expert, novice = node("expert", echo, code=0.9), node("novice", echo, code=0.2)
    events = await events_of(loop_over(provider, expert, novice), "sort")

    reports = {event.name: event for event in events if isinstance(event, PhaseEvent)}
    assert list(reports) == ["sense", "match", "scale", "execute", "evaluate", "adapt"]
    assert (reports["sense"].domain, reports["sense"].method) == ("code", "heuristic")
    assert reports["sense"].complexity is not None
    match = reports["match"]
    assert (match.node_id, [bid.node_id for bid in match.bids]) == ("expert", ["expert", "novice"])
    assert match.score == match.bids[0].score > match.bids[1].score
    assert reports["execute"].node_id == reports["evaluate"].node_id == reports["adapt"].node_id == "expert"
    assert (reports["evaluate"].score, reports["evaluate"].reward) == (1.0, pytest.approx(0.85))
    assert (reports["adapt"].total_tasks, reports["adapt"].success_rate) == (1, 1.0)
    kinds = [getattr(event, "name", event.type) for event in events]
    assert kinds.index("match") < kinds.index("text_delta") < kinds.index("execute") < kinds.index("done")


async def test_an_attempt_that_failed_is_reported_with_its_node_and_its_error(
    phases: Bus, provider: OpenAIProvider
) -> None:
    events = await events_of(loop_over(provider, node("sure", fail, code=1.0), node("spare", echo, code=0.1)), "sort")

    reports = [(each.attempt, each.name, each.node_id, each.error) for each in events if isinstance(each, PhaseEvent)]
    assert reports == [
        (1, "sense", None, ""),
        (1, "match", "sure", ""),
        (1, "scale", None, ""),
        (1, "execute", "sure", "agent_failed"),
        (1, "evaluate", "sure", "agent_failed"),
        (2, "match", "spare", ""),
        (2, "scale", None, ""),
        (2, "execute", "spare", ""),
        (2, "evaluate", "spare", ""),
        (2, "adapt", "spare", ""),
    ]


@pytest.mark.slow
async def test_a_task_without_bids_reports_the_phases_it_passed(phases: Bus, provider: OpenAIProvider) -> None:
    loop = loop_over(provider)
    context = LoopContext(messages=[UserMessage("sort")], domain="code", timeout_s=1)
    events = [event async for event in loop.execute(context)]

    reports = [(each.name, each.node_id, each.error) for each in events if isinstance(each, PhaseEvent)]
    assert reports[0] == ("sense", None, "")
    assert reports[-1] == ("evaluate", None, "deadline_exceeded")
    assert [event.type for event in events[-2:]] == ["error", "done"]


@pytest.mark.slow
async def test_the_loop_of_a_runtime_uses_its_server_while_it_is_open(
    provider: OpenAIProvider, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NATS_URL", raising=False)
    rt = Runtime(provider)
    coder = rt.add_agent(echo, name="coder", capabilities=CapabilityProfile(scores={"code": 0.9}))
    loop = rt.amoeba_loop()
    async with rt:
        session = rt._sessions._session
        assert (await events_of(loop, "one"))[-1].content == "done: one"  # type: ignore[union-attr]
        assert await rt.submit(TaskAd(domain="code", description="two")) == "done: two"
        assert rt._sessions._session is session
        await until(lambda: coder.capabilities.total_tasks == 2, what="both tasks are learned from, by one ADAPT")

    alone = await events_of(loop, "three")
    assert alone[-1].content == "done: three"  # type: ignore[union-attr]
    assert rt._sessions.owner is None
    await provider.aclose()
