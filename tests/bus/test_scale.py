import asyncio
from typing import Any

import pytest
from msgspec.structs import replace
from support.builders import ad, awarded, envelope
from support.phase_harness import Stage, quiet
from support.wait import until

from loom.phases.scale.timings import ScaleTimings
from loom.phases.shared.pace import Pace
from loom.phases.shared.scale_rule import is_saturated
from loom.runner.timings import ServiceTimings
from loom.schemas.auction import Award, ScoredBid, SpawnReply, SpawnRequest, bids_json
from loom.schemas.base import decode, encode
from loom.schemas.envelope import Envelope


@pytest.fixture
async def asked(stage: Stage) -> list[SpawnRequest]:
    """The spawn requests that were made; no host answers them."""
    requests: list[SpawnRequest] = []

    async def record(msg: Any) -> None:
        requests.append(decode(msg.data, SpawnRequest))

    await stage.bus.connection.subscribe(stage.bus.subjects.spawn, record)
    return requests


def task(stage: Stage, **facts: Any) -> Envelope:
    return envelope(ad(**facts), now=stage.bus.clock.now())


def bid(load: float, node_id: str = "n1") -> ScoredBid:
    return ScoredBid(node_id=node_id, host_id="h1", score=1, self_rating=1, trust=1, load=load, tools=1)


async def test_an_awarded_task_passes_on_unchanged(stage: Stage, asked: list[SpawnRequest]) -> None:
    await stage.phase("scale")
    env = awarded(task(stage))
    await stage.put("scale", env)
    passed = await stage.seen("task", phase="execute")
    assert replace(passed, hops=(), step=0) == env
    assert [hop.phase for hop in passed.hops] == ["scale"]
    await quiet(stage.bus)
    assert not asked


async def test_a_task_without_bids_makes_a_spawn_request_and_goes_back(stage: Stage, asked: list[SpawnRequest]) -> None:
    await stage.phase("scale")
    env = task(stage, required_tools=("search",))
    await stage.put("scale", env)
    assert (await stage.seen("task", phase="match")).task_id == env.task_id
    await until(lambda: asked, what="a node is asked for")
    assert asked == [
        SpawnRequest(
            domain_token="code",
            required_tools=("search",),
            description=env.ad.description,
            reason="no_bids",
            task_id=env.task_id,
        ),
    ]
    assert not stage.all("task", phase="execute")


@pytest.mark.parametrize(
    ("award", "saturated"),
    [
        (Award(node_id="n1", host_id="h1"), False),
        (Award(node_id="n1", host_id="h1", backlog=1), True),
        (Award(node_id="n1", host_id="h1", bids_json=bids_json([encode(bid(1.0))])), True),
        (Award(node_id="n1", host_id="h1", bids_json=bids_json(map(encode, (bid(0.9), bid(1.0, "n2"))))), False),
    ],
)
def test_a_winner_with_a_queue_or_full_load_is_saturated(award: Award, saturated: bool) -> None:
    assert is_saturated(award) is saturated


async def test_a_saturated_winner_asks_for_a_node_and_passes_on(stage: Stage, asked: list[SpawnRequest]) -> None:
    await stage.phase("scale")
    await stage.put("scale", awarded(task(stage), backlog=2))
    await stage.seen("task", phase="execute")
    await until(lambda: asked, what="a node is asked for")
    assert asked[0].reason == "saturated"


async def test_a_node_is_asked_for_once_a_second_and_domain(stage: Stage, asked: list[SpawnRequest]) -> None:
    scale: Any = await stage.phase("scale")
    for n in range(6):
        await stage.put("scale", task(stage, domain="code" if n % 2 else "data"))
    await stage.seen("task", phase="match", count=6)
    await until(lambda: len(asked) >= 2, what="two nodes are asked for")
    scale.service._spawn_requests._pace = Pace(0.0)
    await stage.put("scale", task(stage))
    await until(lambda: len(asked) >= 3, what="one more is asked for")
    assert sorted(request.domain_token for request in asked) == ["code", "code", "data"]


async def test_each_task_without_bids_makes_a_spawn_request_with_its_own_text(
    stage: Stage, asked: list[SpawnRequest]
) -> None:
    """One task may need a skill that the others do not."""
    stage.timings = ServiceTimings(scale=ScaleTimings(spawn_interval_s=60.0))
    await stage.phase("scale")
    for text in ("sort", "é" * 600, "sort"):
        await stage.put("scale", task(stage, description=text))
        await stage.put("scale", awarded(task(stage, description=text), backlog=2))
    await stage.seen("task", phase="match", count=3)
    await stage.seen("task", phase="execute", count=3)
    await until(lambda: len(asked) >= 3, what="they are asked about")
    alone = sorted(request.description for request in asked if request.reason == "no_bids")
    assert alone == ["sort", "é" * 511]
    assert len(asked) == 3


async def test_a_spawn_request_for_lack_of_bids_is_repeated_after_a_decline(stage: Stage) -> None:
    await stage.phase("scale")
    asked: list[SpawnRequest] = []

    async def answer(msg: Any) -> None:
        asked.append(decode(msg.data, SpawnRequest))
        same_reason = [one for one in asked if one.reason == asked[-1].reason]
        facts: dict[str, Any] = {"node_id": "n"} if len(same_reason) == 3 else {"decline": "unqualified"}
        await stage.bus.connection.publish(msg.reply, SpawnReply(host_id="h", **facts))

    await stage.bus.connection.subscribe(stage.bus.subjects.spawn, answer)
    await stage.put("scale", awarded(task(stage), backlog=2))
    await until(lambda: asked, what="a node is asked for")
    await stage.put("scale", task(stage))
    await until(lambda: len(asked) >= 4, what="others are asked")
    await quiet(stage.bus)
    assert [request.reason for request in asked] == ["saturated", "no_bids", "no_bids", "no_bids"]


async def test_the_task_does_not_wait_for_an_answer(stage: Stage) -> None:
    await stage.phase("scale")
    await stage.put("scale", task(stage))
    hop = (await stage.seen("task", phase="match")).hops[-1]
    assert hop.finished - hop.started < 0.3


async def test_a_task_past_its_deadline_ends(stage: Stage) -> None:
    await stage.phase("scale")
    await stage.put("scale", replace(awarded(task(stage)), deadline=stage.bus.clock.now() - 1))
    ended = await stage.seen("task", phase="evaluate")
    assert ended.error.code == "deadline_exceeded"


async def test_an_envelope_without_a_spec_is_a_dead_letter_and_its_task_ends(stage: Stage) -> None:
    await stage.phase("scale")
    await stage.put("scale", replace(awarded(task(stage)), spec=None))
    await stage.seen("dead", phase="scale")
    assert (await stage.seen("task", phase="evaluate")).error.code == "dead_letter"


async def test_two_replicas_share_the_tasks(stage: Stage) -> None:
    await asyncio.gather(stage.phase("scale"), stage.phase("scale"))
    for n in range(20):
        await stage.put("scale", awarded(task(stage, task_id=f"t{n}")))
    await stage.seen("task", phase="execute", count=20)
    assert sorted(env.task_id for env in stage.all("task", phase="execute")) == sorted(f"t{n}" for n in range(20))
