"""One Runtime, several event loops and threads: the loop that opened it keeps it, and all others are refused."""

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine
from functools import partial
from typing import Any

import pytest
from msgspec.structs import replace
from support.nodes import echo, node
from support.wait import until

from loom import (
    AmoebaLoop,
    ClusterManager,
    LifecycleManager,
    LoopContext,
    RewardBus,
    Runtime,
    SkillNodeRegistry,
    TaskAd,
    UserMessage,
)
from loom.bus import task_client
from loom.bus.bus import Bus
from loom.bus.natsio.loop_ownership import WrongEventLoop
from loom.compat.planner import TaskPlanner
from loom.schemas.base import new_id
from loom.schemas.errors import AgentFailed, BusUnavailable, LoomError
from loom.schemas.learning.reward import Reward
from loom.types import CapabilityProfile

SUM = TaskAd(domain="code", description="sum", timeout_s=20)


def runtime() -> Runtime:
    rt = Runtime()
    rt.add_agent(echo, name="coder", capabilities=CapabilityProfile(scores={"code": 0.9}))
    return rt


def in_other_loop(work: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
    """Run `work` to its end in an event loop of this thread."""
    return asyncio.run(work())


async def refused(work: Callable[[], Coroutine[Any, Any, Any]]) -> None:
    """Another thread's loop is refused within a second, with a way out."""
    began = time.monotonic()
    with pytest.raises(WrongEventLoop, match=r"run_coroutine_threadsafe\(…, loop\), or an? \w+ of its own"):
        await asyncio.to_thread(in_other_loop, work)
    assert time.monotonic() - began < 1


async def entered(rt: Runtime) -> None:
    async with rt:
        pass


async def first_of(stream: Any) -> Any:
    return await anext(stream)


async def test_calls_from_another_loop_are_refused_and_the_open_session_continues(
    on_bus: tuple[str, str], phases: Bus
) -> None:
    begun, go_on = asyncio.Event(), asyncio.Event()

    async def slow(description: str) -> str:
        begun.set()
        await go_on.wait()
        return "slow done"

    rt = runtime()
    rt.add_agent(slow, name="slow")
    async with rt:
        running = asyncio.ensure_future(rt.submit(TaskAd(description="x", node_id="slow", timeout_s=30)))
        handle = await rt.publish(TaskAd(description="x", node_id="slow", timeout_s=30))
        await begun.wait()
        reward = Reward(
            reward_id="r",
            task_id="t",
            attempt=1,
            source="person",
            node_id="n",
            domain_token="code",
            score=1,
            ended_at=1,
        )
        for call in (
            lambda: rt.submit(SUM),
            lambda: rt.publish(SUM),
            lambda: rt.submit_many([SUM]),
            lambda: rt.feedback("t", 1.0),
            lambda: entered(rt),
            rt.aclose,
            handle.result,
            handle.content,
            handle.status,
            handle.cancel,
            lambda: first_of(handle.events()),
            lambda: as_coroutine(rt.reward_bus.publish(reward)),
            lambda: first_of(rt.reward_bus.subscribe()),
            lambda: first_of(rt.reward_bus.replay()),
        ):
            await refused(call)
        await asyncio.to_thread(rt.health_check)
        go_on.set()
        assert await running == "slow done"
        assert await handle.content() == "slow done"
        assert await rt.submit(SUM) == "done: sum"


async def as_coroutine(work: Awaitable[Any]) -> Any:
    return await work


async def test_a_sync_agent_that_reaches_its_runtime_from_a_loop_of_its_own_fails_alone(
    on_bus: tuple[str, str], phases: Bus
) -> None:
    rt = runtime()

    def outer(description: str) -> str:
        return asyncio.run(rt.submit(SUM))

    rt.add_agent(outer, name="outer")
    async with rt:
        with pytest.raises(AgentFailed, match="open in another event loop; use submit_sync"):
            await rt.submit(TaskAd(description="x", node_id="outer", timeout_s=20))
        assert await rt.submit(SUM) == "done: sum"


async def test_one_of_several_threads_opens_a_runtime_and_the_others_are_refused(
    on_bus: tuple[str, str], phases: Bus
) -> None:
    rt = runtime()
    together = threading.Barrier(4)

    def view() -> str:
        together.wait(10)
        try:
            return in_other_loop(both)
        except WrongEventLoop:
            return "refused"

    async def both() -> str:
        answers = await asyncio.gather(rt.submit(SUM), rt.submit(SUM))  # one opens, the other waits for it
        await asyncio.to_thread(others_done.wait, 10)
        return answers[0]

    others_done = threading.Event()
    views = [asyncio.ensure_future(asyncio.to_thread(view)) for _ in range(4)]
    await until(lambda: sum(each.done() for each in views) == 3, what="three are refused")
    others_done.set()
    assert sorted(await asyncio.gather(*views)) == ["done: sum", "refused", "refused", "refused"]
    await asyncio.to_thread(rt.dispose)


@pytest.mark.slow
async def test_a_runtime_whose_loop_has_ended_is_opened_by_the_next_loop(on_bus: tuple[str, str], phases: Bus) -> None:
    rt = runtime()
    ads = [replace(SUM, task_id=new_id()) for _ in range(3)]  # the host of an ended loop may take its own along
    handles = [await asyncio.to_thread(in_other_loop, partial(rt.publish, ad)) for ad in ads[:2]]
    assert await rt.submit(ads[2]) == "done: sum"
    with pytest.raises(WrongEventLoop, match="has ended"):
        await handles[0].result()
    await rt.aclose()


async def test_an_amoeba_loop_that_is_open_refuses_other_loops(on_bus: tuple[str, str], phases: Bus) -> None:
    cluster = ClusterManager()
    cluster.add_node(node("coder", echo, code=0.9))
    loop = AmoebaLoop(cluster, RewardBus(), LifecycleManager(), TaskPlanner(None), SkillNodeRegistry())  # type: ignore[arg-type]
    ask = LoopContext(messages=[UserMessage("sum")], domain="code")

    async def entered() -> None:
        async with loop:
            pass

    async with loop:
        await refused(lambda: first_of(loop.execute(ask)))
        await refused(entered)
        assert [event async for event in loop.execute(ask)][-1].content == "done: sum"  # type: ignore[union-attr]


async def test_a_connection_refuses_other_loops_and_works_on(nats_url: str, namespace: str) -> None:
    async with Bus(nats_url, namespace=namespace) as bus:
        await refused(bus.requests.flush)
        await refused(lambda: bus.connection.subscribe_sync("x", print))
        await refused(bus.connect)
        await refused(bus.close)
        await bus.requests.flush()
    with pytest.raises(BusUnavailable):
        await bus.requests.flush()
    await asyncio.to_thread(in_other_loop, bus.connect)  # closed here, it may be opened elsewhere
    bus.abort()


# -- synchronous code


async def test_threads_and_sync_agents_submit_through_the_loop_a_runtime_is_open_in(
    on_bus: tuple[str, str], phases: Bus
) -> None:
    rt = runtime()

    def outer(description: str) -> str:
        return f"outer {rt.submit_sync(SUM)}"

    rt.add_agent(outer, name="outer")
    async with rt:
        assert await asyncio.to_thread(rt.submit_sync, SUM) == "done: sum"
        assert await rt.submit(TaskAd(description="x", node_id="outer", timeout_s=20)) == "outer done: sum"
        with pytest.raises(LoomError, match="would block the event loop"):
            rt.submit_sync(SUM)


def test_synchronous_code_submits_without_an_event_loop_and_ends_quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NATS_URL", raising=False)
    rt = runtime()
    threads = threading.active_count()
    assert [rt.submit_sync(SUM), rt.submit_sync(SUM)] == ["done: sum"] * 2
    with pytest.raises(WrongEventLoop, match="use submit_sync"):
        asyncio.run(rt.submit(SUM))
    began = time.monotonic()
    rt.dispose()
    rt.dispose()
    assert time.monotonic() - began < 2
    assert threading.active_count() == threads


async def test_waiting_in_synchronous_code_is_bounded_and_ends_when_the_runtime_is_closed(
    on_bus: tuple[str, str], phases: Bus, client: Bus
) -> None:
    begun: list[str] = []

    async def endless(description: str) -> str:
        begun.append(description)
        await asyncio.sleep(600)
        return description

    rt = runtime()
    rt.add_agent(endless, name="endless")
    first, second = (TaskAd(description=name, node_id="endless") for name in ("first", "second"))
    with pytest.raises(TimeoutError):
        await asyncio.to_thread(rt.submit_sync, first, 0.05)
    waiting = asyncio.ensure_future(asyncio.to_thread(rt.submit_sync, second))
    await until(lambda: "second" in begun, what="the second task runs")
    await asyncio.to_thread(rt.dispose)
    with pytest.raises(BusUnavailable, match="closed before the task ended"):
        await waiting
    await asyncio.gather(*(task_client.cancel(client, ad.task_id) for ad in (first, second)))


@pytest.mark.slow
async def test_a_runtime_is_disposed_of_from_another_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NATS_URL", raising=False)
    rt = runtime()
    assert await rt.submit(SUM) == "done: sum"
    await asyncio.to_thread(rt.dispose)
    async with rt:
        assert await rt.submit(SUM) == "done: sum"
