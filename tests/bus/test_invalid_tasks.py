"""Nodes that call an ad invalid, through all six phases.

A client's mistake costs no node, and a node that always does so loses awards.
"""

from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
from support.builders import ad
from support.fake_host import FakeHost, FakeRun
from support.phase_harness import Stage
from support.wait import until

from loom.bus import task_client
from loom.schemas.auction import Bid
from loom.schemas.envelope import PHASES
from loom.schemas.errors import InvalidTask
from loom.schemas.task import TaskAd, TaskError, TaskResult

SENTENCE = "the file sales.csv is not there"


@pytest.fixture
async def stage(nats_url: str, namespace: str) -> AsyncIterator[Stage]:
    async with Stage(nats_url, namespace) as stage:
        for phase in PHASES:
            await stage.phase(phase)
        yield stage


async def refuse(run: FakeRun) -> None:
    await run.publish("accepted")
    await run.publish("error", error=TaskError(code="invalid_task", message=SENTENCE, field="context"))


async def work(run: FakeRun) -> None:
    await run.succeed()


async def host(stage: Stage, name: str, run: Callable[[FakeRun], Awaitable[None]]) -> FakeHost:
    return await FakeHost(await stage.connect("node"), host_id=f"h-{name}", node_ids=(name,), run=run).start()


async def ended(stage: Stage, task: TaskAd) -> TaskResult:
    handle = await task_client.publish(stage.bus, task)
    return await handle.result()


async def test_a_clients_mistake_fails_after_two_nodes_with_the_agents_sentence_and_no_reward(stage: Stage) -> None:
    hosts = [await host(stage, name, refuse) for name in ("n1", "n2", "n3")]
    result = await ended(stage, ad(task_id="t1"))
    assert (result.state, result.attempts) == ("failed", 2)
    assert result.error is not None
    assert (result.error.code, result.error.message, result.error.field) == ("invalid_task", SENTENCE, "context")
    assert isinstance(result.error.to_exception("t1"), InvalidTask)
    assert sum(len(each.runs) for each in hosts) == 2
    await stage.settled()
    assert await stage.pending("REWARDS") == 0


async def test_a_task_that_one_node_alone_finds_invalid_fails_with_its_sentence(stage: Stage) -> None:
    only = await host(stage, "n1", refuse)
    result = await ended(stage, ad(task_id="t1"))
    assert (result.state, result.error and result.error.message, len(only.runs)) == ("failed", SENTENCE, 1)
    pinned = await ended(stage, ad(task_id="t2", node_id="n1"))
    assert (pinned.error and pinned.error.message, len(only.runs)) == (SENTENCE, 2)
    await stage.settled()
    assert await stage.pending("REWARDS") == 0


@pytest.mark.slow
async def test_a_node_that_calls_every_ad_invalid_loses_its_share(stage: Stage) -> None:
    sour = await host(stage, "sour", refuse)
    sour.offer = lambda _call: sour.bids(
        Bid(node_id="sour", self_rating=0.9)
    )  # the node with the highest claim is asked first
    good = [await host(stage, name, work) for name in ("n1", "n2")]
    runs: list[int] = []
    for n in range(1, 13):
        assert (await ended(stage, ad(task_id=f"t{n}"))).success
        runs.append(len(sour.runs))
        await stage.seen("reward", count=n + runs[-1])
        await until(lambda n=n: learned(stage) >= {f"t{k}" for k in range(1, n + 1)}, what="ADAPT has learned")  # type: ignore[misc]
    assert 1 <= runs[-1] <= 8, runs
    assert runs[-1] == runs[8], "it is asked no more in the last quarter"
    assert sum(len(each.runs) for each in good) == 12
    assert {reward.score for reward in stage.all("reward", node_id="sour")} == {0.0}


def learned(stage: Stage) -> set[str]:
    return {task_id for news in stage.all("lifecycle", kind="learned") for task_id in news.task_ids}
