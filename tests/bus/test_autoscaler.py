import asyncio
from typing import Any

from support.nodes import echo, node
from support.phase_harness import Stage
from support.spawning_host import WITHIN_S, HeldAgent, SpawningHost, start_spawning_host
from support.wait import until

from loom.agents.host.clone import STEM, clone_id
from loom.schemas.auction import SpawnRequest
from loom.types import AgentNode, CapabilityProfile


async def test_a_saturated_host_starts_a_clone_that_bids_and_works(stage: Stage) -> None:
    agent = HeldAgent()
    host = await start_spawning_host(
        stage, [AgentNode(id="a", agent=agent, depth=1, capabilities=expert("pdf"))], 2, slots=1
    )
    await host.occupy("a", agent)
    reply = await host.spawn(tools=("pdf",))
    assert (reply.node_id, reply.decline) == ("a-c1", None)
    announcement = await host.announces("a", "a-c1")
    assert (announcement.can_spawn, announcement.busy, announcement.slots) == (True, ("a",), 2)
    [state] = announcement.spawned
    assert (state.node_id, state.parent_id, state.retiring) == ("a-c1", "a", False)
    news = await stage.seen("lifecycle", kind="spawned", node_id="a-c1", within_s=WITHIN_S)
    assert (news.host_id, news.reason) == (host.host.host_id, "clone of a: saturated in code")
    assert await stage.seen("lifecycle", kind="joined", node_id="a-c1")
    [child] = [one for one in host.bids(required_tools=("pdf",)).bids if one.node_id == "a-c1"]
    assert (child.self_rating, child.load, child.tools) == (0.5, 0, ("pdf",))
    [elsewhere] = [one for one in host.bids(domain="cooking").bids if one.node_id == "a-c1"]
    assert elsewhere.self_rating == 0.1
    clone: Any = host.autoscaler.nodes()[1]
    assert (clone.parent_id, clone.depth) == ("a", 2)
    events = await host.occupy("a-c1", agent)
    agent.released.set()
    await until(lambda: events[-1].final, within_s=WITHIN_S, what="it ends")
    assert events[-1].result is not None
    assert events[-1].result.content == "done by a-c1"


def expert(*tools: str) -> CapabilityProfile:
    return CapabilityProfile(scores={"code": 0.9, "cooking": 0.1}, tools=list(tools))


async def test_a_host_declines_clones_it_cannot_or_need_not_or_may_not_start(stage: Stage) -> None:
    agent = HeldAgent()
    host = await start_spawning_host(stage, [node("a", agent, code=0.9)], 2, slots=1)
    assert (await host.spawn()).decline == "idle"
    await host.occupy("a", agent)
    assert (await host.spawn(tools=("pdf",))).decline == "unqualified"
    assert (await host.spawn()).node_id == "a-c1"
    assert (await host.spawn()).decline == "idle"
    await host.occupy("a-c1", agent)
    assert (await host.spawn()).decline == "full"
    assert host.names() == ["a", "a-c1"]


async def test_the_template_that_claims_most_is_cloned_and_children_are_not(stage: Stage) -> None:
    agent = HeldAgent()
    host = await start_spawning_host(stage, [node("a", agent, code=0.2), node("b", agent, code=0.4)], 9, slots=1)
    for busy, born in (("a", None), ("b", "b-c1"), ("b-c1", "b-c2")):
        await host.occupy(busy, agent)
        assert (await host.spawn()).node_id == born


async def test_requests_at_once_on_two_hosts_pass_no_limit(stage: Stage) -> None:
    agent = HeldAgent()
    first, second = [await start_spawning_host(stage, [node("a", agent)], 3, slots=1, backlog=0) for _ in range(2)]
    for one in (first, second):
        await one.occupy("a", agent)
    for size in (2, 3):
        await until(
            lambda size=size: asked(first, second, size),  # type: ignore[misc]
            within_s=WITHIN_S,
            what=f"both have {size} nodes",
        )
        for one in (first, second):
            assert len(one.names()) == size
            await one.occupy(f"a-c{size - 1}", agent)
    replies = await asyncio.gather(*(first.spawn() for _ in range(30)))
    assert {reply.decline for reply in replies} == {"full"}
    assert first.names() == second.names() == ["a", "a-c1", "a-c2"]


async def asked(first: SpawningHost, second: SpawningHost, size: int) -> bool:
    """Ask ten times at once; return whether both hosts have grown to that size."""
    await asyncio.gather(*(first.spawn() for _ in range(10)))
    return len(first.names()) == len(second.names()) == size


async def test_a_retiring_child_takes_no_new_run_and_ends_the_ones_it_has(stage: Stage) -> None:
    agent = HeldAgent()
    host = await start_spawning_host(stage, [node("a", agent)], 2, slots=1)
    await host.occupy("a", agent)
    await host.spawn()
    running = await host.occupy("a-c1", agent)
    queued = await host.run("a-c1")
    assert (await host.retire("a-c1", when_idle=True)).decline == "busy"
    assert (await host.retire("a-c1")).decline is None
    assert (await host.retire("a-c1")).decline is None  # a repeated request changes nothing
    changed = await stage.seen("lifecycle", kind="changed", node_id="a-c1", within_s=WITHIN_S)
    assert changed.reason == "takes no more work: a test"
    assert [one.node_id for one in host.bids().bids] == ["a"]
    late = await host.run("a-c1")
    assert (late[0].kind, late[0].code) == ("rejected", "busy")
    assert (await host.announces("a")).spawned == ()
    agent.released.set()
    retired = await stage.seen("lifecycle", kind="retired", node_id="a-c1", within_s=WITHIN_S)
    assert (running[-1].kind, queued[-1].kind) == ("result", "result")
    assert retired.reason == "a test"
    assert len(stage.all("lifecycle", kind="changed")) == len(stage.all("lifecycle", kind="retired")) == 1
    gone = await host.run("a-c1")
    assert (gone[0].kind, gone[0].code) == ("rejected", "busy")  # an award on its way is not a fault
    never = await host.run("a-c9")
    assert (never[0].kind, never[0].code) == ("rejected", "unqualified")
    assert (await host.retire("a-c1")).decline == "unknown"


async def test_an_original_node_never_retires(stage: Stage) -> None:
    host = await start_spawning_host(stage, [node("a", echo)], 2)
    assert (await host.retire("a")).decline == "permanent"
    assert host.names() == ["a"]


class Skills:
    """A source of one node for texts that contain its word."""

    def __init__(self, agent: HeldAgent, *tools: str) -> None:
        self.asked = 0
        self._node = AgentNode(id="skill-sql", agent=agent, capabilities=CapabilityProfile(tools=list(tools)))

    def __call__(self, wanted: SpawnRequest) -> AgentNode | None:
        self.asked += 1
        return self._node if "sql" in wanted.description else None


async def test_a_skill_becomes_a_node_where_no_node_can_and_is_an_ordinary_child(stage: Stage) -> None:
    agent = HeldAgent()
    host = await start_spawning_host(stage, [], 9, Skills(agent, "db"), slots=1)
    assert host.bids().decline == "unqualified"
    assert (await host.spawn(text="a poem")).decline == "unqualified"
    assert (await host.spawn(text="sql", tools=("db", "shell"))).decline == "unqualified"
    assert (await host.spawn("data", text="sql", tools=("db",))).node_id == "skill-sql"
    news = await stage.seen("lifecycle", kind="spawned", node_id="skill-sql", within_s=WITHIN_S)
    assert news.reason == "skill skill-sql: saturated in data"
    [state] = (await host.announces("skill-sql")).spawned
    assert (state.node_id, state.parent_id) == ("skill-sql", "skill-sql")
    [bid] = host.bids(domain="data", required_tools=("db",)).bids
    assert (bid.node_id, bid.self_rating, bid.tools) == ("skill-sql", 0.5, ("db",))
    events = await host.occupy("skill-sql", agent)
    assert (await host.retire("skill-sql", when_idle=True)).decline == "busy"
    agent.released.set()
    await until(lambda: events[-1].final, within_s=WITHIN_S, what="it ends")
    assert events[-1].result is not None
    assert events[-1].result.content == "done by skill-sql"
    assert (await host.retire("skill-sql")).decline is None
    await host.announces()
    assert await stage.seen("lifecycle", kind="retired", node_id="skill-sql", within_s=WITHIN_S)
    assert (await host.spawn(text="sql")).node_id == "skill-sql"


async def test_a_running_skill_is_not_started_twice_but_cloned_when_saturated(stage: Stage) -> None:
    agent = HeldAgent()
    skills = Skills(agent)
    host = await start_spawning_host(stage, [], 2, skills, slots=1)
    assert (await host.spawn(text="sql")).node_id == "skill-sql"
    assert (await host.spawn(text="sql")).decline == "idle"
    await host.occupy("skill-sql", agent)
    assert (await host.spawn(text="anything")).node_id == "skill-sql-c1"
    assert (await host.spawn(text="sql")).decline == "idle"
    await host.occupy("skill-sql-c1", agent)
    assert (await host.spawn(text="sql")).decline == "full"
    assert (host.names(), skills.asked) == (["skill-sql", "skill-sql-c1"], 1)


async def test_skills_are_asked_only_where_no_node_qualifies_and_a_slot_is_left(stage: Stage) -> None:
    skills = Skills(HeldAgent(), "db")
    host = await start_spawning_host(stage, [node("a", echo)], 1, skills)
    assert (await host.spawn(text="sql")).decline == "idle"
    assert (await host.spawn(text="sql", tools=("db",))).decline == "full"
    assert skills.asked == 0


async def test_garbage_and_a_stopped_nursery_start_no_node(stage: Stage) -> None:
    agent = HeldAgent()
    host = await start_spawning_host(stage, [node("a", agent)], 9, slots=1)
    await host.occupy("a", agent)
    await stage.bus.connection.publish(stage.bus.subjects.spawn, b"{")
    await stage.bus.connection.publish(stage.bus.subjects.of("retire", "local", host.host.host_id), b"[]")
    assert (await host.spawn()).node_id == "a-c1"
    await host.autoscaler.stop()
    await host.autoscaler.stop()
    await host.host.bus.requests.flush()
    await stage.bus.connection.publish(stage.bus.subjects.spawn, SpawnRequest(domain_token="code"))
    await stage.bus.requests.flush()
    await host.host.bus.requests.flush()
    assert host.names() == ["a", "a-c1"]


def test_a_child_is_named_after_its_template_by_the_first_free_number() -> None:
    assert clone_id("a", ["a", "a-c1", "a-c3"]) == "a-c2"
    long = "x" * 64
    assert clone_id(long, [long, f"{'x' * STEM}-c1"]) == f"{'x' * STEM}-c2"
