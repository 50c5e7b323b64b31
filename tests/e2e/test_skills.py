"""A skill becomes a node when a task calls for it and gets no bids."""

import pytest
from support.nodes import echo, node
from support.openai_server import OpenAIServer, Reply
from support.wait import until

from loom import (
    AmoebaLoop,
    ClusterManager,
    LifecycleManager,
    LoopContext,
    OpenAIProvider,
    RewardBus,
    Runtime,
    SkillNodeRegistry,
    TaskAd,
    UserMessage,
)
from loom.bus.bus import Bus
from loom.bus.natsio.transport.message import Msg
from loom.compat.planner import TaskPlanner
from loom.schemas.auction import RetireRequest
from loom.schemas.base import decode
from loom.schemas.learning.lifecycle import Lifecycle
from loom.types import Done, PhaseEvent, Skill, SkillTrigger

WITHIN_S = 30
SQL = Skill(
    name="SQL", instructions="You write SQL.", priority=1, trigger=SkillTrigger(keywords=["query"]), tools=["tables"]
)


def tables() -> str:
    """List the tables."""
    return "sales"


async def lifecycle_of(bus: Bus) -> list[Lifecycle]:
    news: list[Lifecycle] = []

    async def note(msg: Msg) -> None:
        news.append(decode(msg.data, Lifecycle))

    await bus.connection.subscribe(bus.subjects.of("lifecycle", "*", "*", "*", "*"), note)
    await bus.requests.flush()
    return news


async def test_a_task_without_bids_is_answered_by_its_matching_skill(
    monkeypatch: pytest.MonkeyPatch, model: OpenAIServer, provider: OpenAIProvider
) -> None:
    monkeypatch.delenv("NATS_URL", raising=False)
    skills = SkillNodeRegistry(tools=[tables])
    skills.register_all([Skill(name="poems", trigger=SkillTrigger(keywords=["poem"])), SQL])
    cluster = ClusterManager()
    loop = AmoebaLoop(cluster, RewardBus(), LifecycleManager(), TaskPlanner(provider), skills, provider)
    async with loop:
        bus = loop.reward_bus.bus
        assert bus is not None
        news = await lifecycle_of(bus)
        context = LoopContext([UserMessage("a query for the best month")], domain="data", timeout_s=WITHIN_S)
        events = [event async for event in loop.execute(context)]
        spawned = await until(
            lambda: next((one for one in news if one.kind == "spawned"), None),
            within_s=WITHIN_S,
            what="its start is reported",
        )
        assert spawned is not None
        order = RetireRequest(node_id=spawned.node_id, reason="its work is done")
        await bus.requests.request(bus.subjects.of("retire", "local", spawned.host_id), order, timeout_s=WITHIN_S)
        kinds = {"spawned", "joined", "learned", "retired"}
        await until(lambda: kinds <= {one.kind for one in news}, within_s=WITHIN_S, what=f"it goes again: {news}")
    await provider.aclose()

    done = events[-1]
    assert isinstance(done, Done)
    assert done.content == "You wrote: a query for the best month"
    assert [message["content"] for message in model.requests[-1].messages] == [
        "You write SQL.",
        "a query for the best month",
    ]
    assert [each["function"]["name"] for each in model.requests[-1].body["tools"]] == ["tables"]
    assert (skills.is_loaded("SQL"), skills.is_loaded("poems")) == (True, False)
    assert {one.node_id for one in news} == {"skill-sql"}
    assert spawned.reason == "skill SQL: no_bids in data"
    assert not cluster.nodes


async def test_a_bidding_node_keeps_the_skill_unused_and_a_required_tool_starts_it(
    phases: Bus, provider: OpenAIProvider
) -> None:
    runtime = Runtime(provider)
    runtime.cluster.add_node(node("poet", echo, data=0.1))
    runtime.skill_registry = SkillNodeRegistry(tools=[tables])
    runtime.skill_registry.register(SQL)
    async with runtime:
        plain = await (await runtime.publish(TaskAd(domain="data", description="a query"))).result(WITHIN_S)
        assert (plain.node_id, runtime.skill_registry.is_loaded("SQL")) == ("poet", False)
        ad = TaskAd(domain="data", description="a query", required_tools=("tables",))
        result = await (await runtime.publish(ad)).result(WITHIN_S)
    await provider.aclose()
    assert (result.node_id, result.success) == ("skill-sql", True)
    assert runtime.skill_registry.is_loaded("SQL")


async def test_the_model_chooses_a_skill_without_a_trigger_by_its_name_and_description(
    phases: Bus, model: OpenAIServer, provider: OpenAIProvider
) -> None:
    model.script(Reply(text='{"skill": "coder"}'))
    skills = SkillNodeRegistry()
    skills.register_all(
        [
            Skill(name="poet", description="Writes poems.", instructions="Rhyme."),
            Skill(name="coder", description="Writes programs.", instructions="You write Python."),
        ]
    )
    loop = AmoebaLoop(ClusterManager(), RewardBus(), LifecycleManager(), TaskPlanner(provider), skills, provider)
    context = LoopContext([UserMessage("sort a list")], domain="code", timeout_s=WITHIN_S)
    events = [event async for event in loop.execute(context)]
    await provider.aclose()

    [match] = [event for event in events if isinstance(event, PhaseEvent) and event.name == "match"]
    assert match.node_id == "skill-coder"
    assert model.requests[-1].messages[0]["content"] == "You write Python."
