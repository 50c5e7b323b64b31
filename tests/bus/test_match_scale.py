"""MATCH passes a task to SCALE only if SCALE has something to do with it."""

from dataclasses import replace as replace_fields
from typing import Any

import pytest
from msgspec.structs import replace
from support.builders import ad, envelope
from support.fake_host import FakeHost
from support.phase_harness import Stage
from support.wait import until

from loom.phases.match.timings import MatchTimings
from loom.runner.timings import ServiceTimings
from loom.schemas.auction import Bid
from loom.schemas.config import ClusterConfig
from loom.schemas.envelope import Envelope, Spec

LONG = ClusterConfig(bid_window_ms=3000)
FULL = Bid(node_id="n1", backlog=2)


async def host(stage: Stage, *bids: Bid, can_spawn: bool = False) -> FakeHost:
    made = await FakeHost(await stage.connect("node"), "h1", ("n1",)).start()
    made.offer = lambda _: made.bids(*bids)
    await made.announce(can_spawn=can_spawn)
    return made


async def match(stage: Stage, made: FakeHost, *, can_spawn: bool = False, spawn_every_s: float = 60.0) -> None:
    stage.timings = ServiceTimings(match=replace_fields(MatchTimings(), spawn_every_s=spawn_every_s))
    replica = await stage.phase("match", LONG)
    await made.announce(can_spawn=can_spawn)
    await until(lambda: replica.service._directory.can_spawn is can_spawn, what="the announcement has arrived")


def task(stage: Stage, spec: dict[str, Any] | None = None, **facts: Any) -> Envelope:
    written = Spec(**{"complexity": 0.5, "domains": ("code",), "method": "given", **(spec or {})})
    return replace(envelope(ad(**facts), now=stage.bus.clock.now()), spec=written)


@pytest.mark.parametrize(
    ("spec", "phase"),
    [
        ({}, "execute"),
        ({"divide": True, "deepest": 2}, "scale"),
        ({"divide": True, "deepest": 2, "whole": True}, "execute"),
    ],
    ids=["an undivided task", "a task to be divided", "a task that SCALE keeps whole"],
)
async def test_only_a_task_to_be_divided_passes_through_scale(stage: Stage, spec: dict[str, Any], phase: str) -> None:
    await match(stage, await host(stage))
    await stage.put("match", task(stage, spec, task_id="t1"))
    passed = await stage.seen("task", phase=phase, task_id="t1")
    assert passed.award.node_id == "n1"


async def test_a_task_with_the_outputs_of_its_subtasks_goes_to_execute(stage: Stage) -> None:
    await match(stage, await host(stage))
    joined = task(stage, {"divide": True, "deepest": 2}, task_id="t1")
    await stage.put("match", replace(joined, inputs={"a": "the output of a"}))
    assert (await stage.seen("task", phase="execute", task_id="t1")).inputs


@pytest.mark.parametrize("bid", [FULL, Bid(node_id="n1", load=1.0)], ids=["a backlog", "no free slot"])
async def test_a_full_winner_sends_its_task_through_scale_where_a_host_can_spawn(stage: Stage, bid: Bid) -> None:
    await match(stage, await host(stage, bid, can_spawn=True), can_spawn=True)
    await stage.put("match", task(stage, task_id="t1", priority="high"))
    assert (await stage.seen("task", phase="scale", task_id="t1")).award.node_id == "n1"


async def test_a_full_winner_runs_its_task_where_no_host_can_spawn(stage: Stage) -> None:
    await match(stage, await host(stage, FULL))
    await stage.put("match", task(stage, task_id="t1"))
    await stage.seen("task", phase="execute", task_id="t1")


async def test_one_task_a_period_and_domain_asks_for_one_more_node(stage: Stage) -> None:
    await match(stage, await host(stage, FULL, can_spawn=True), can_spawn=True)
    for number in range(4):
        await stage.put("match", task(stage, {"domains": ("code" if number % 2 else "data",)}, task_id=f"t{number}"))
    await stage.seen("task", phase="scale", count=2)
    await stage.seen("task", phase="execute", count=2)
    assert {hop.domain for hop in stage.all("task", phase="scale")} == {"code", "data"}
