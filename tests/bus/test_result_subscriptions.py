"""The open tasks of a client share one subscription to their results."""

import asyncio
import gc

import pytest
from support.bus_helpers import Connect
from support.wait import until

from loom.bus import result_subscriptions
from loom.bus.bus import Bus
from loom.bus.task_client import TaskHandle
from loom.schemas.errors import InvalidTask
from loom.schemas.task import TaskAd, TaskResult


def subscriptions(bus: Bus) -> int:
    return len(bus.connection._nc._subs)


async def open_handle(bus: Bus, task_id: str) -> TaskHandle:
    handle = TaskHandle(bus, TaskAd(task_id=task_id, description="x"))
    await handle.open(deltas=False)
    return handle


async def publish_result(bus: Bus, task_id: str, submitter: str = "public") -> None:
    result = TaskResult(task_id=task_id, state="succeeded", content=f"of {task_id}")
    await bus.connection.publish(bus.subjects.of("result", submitter, task_id), result)


async def contents(handles: list[TaskHandle]) -> list[str]:
    return [await handle.content(2) for handle in handles]


async def test_open_tasks_share_one_subscription_and_each_gets_its_result(plain: Bus) -> None:
    before = subscriptions(plain)
    handles = list(await asyncio.gather(*(open_handle(plain, f"t{n}") for n in range(200))))
    assert subscriptions(plain) == before + 2  # of the first task, and of all others
    for n in reversed(range(200)):
        await publish_result(plain, f"t{n}")
    assert await contents(handles) == [f"of t{n}" for n in range(200)]
    assert subscriptions(plain) == before


async def test_several_handles_of_one_task_all_get_its_result_and_a_closed_one_ends_no_other(plain: Bus) -> None:
    before = subscriptions(plain)
    handles = [await open_handle(plain, "t1") for _ in range(3)]
    await handles.pop().close()
    others = [await open_handle(plain, "t2") for _ in range(3)]
    await others.pop().close()
    for opened in (handles, others):
        opened.pop()
    gc.collect()
    await plain.requests.flush()
    assert subscriptions(plain) == before + 2
    for task_id in ("t1", "t2"):
        await publish_result(plain, task_id)
    assert await contents(handles + others) == ["of t1", "of t2"]
    assert subscriptions(plain) == before


async def test_each_submitter_has_a_subscription_of_its_own(plain: Bus) -> None:
    before = subscriptions(plain)
    handle = TaskHandle(plain, TaskAd(task_id="t1", description="x"), submitter="ann")
    await handle.open(deltas=False)
    other = await open_handle(plain, "t1")
    assert subscriptions(plain) == before + 2
    await publish_result(plain, "t1", "ann")
    assert await handle.content(2) == "of t1"
    assert not other._updates.result.done()
    await other.close()
    assert subscriptions(plain) == before


async def test_results_arrive_after_a_reconnect(plain: Bus, connect: Connect) -> None:
    other = await connect()
    handles = [await open_handle(plain, f"t{n}") for n in range(3)]
    await plain.connection.reconnect()
    await until(lambda: plain.connection.is_connected, what="the connection is back")
    await plain.requests.flush()
    for n in range(3):
        await publish_result(other, f"t{n}")
    assert await contents(handles) == [f"of t{n}" for n in range(3)]


async def test_a_bus_that_is_opened_again_gets_results(plain: Bus) -> None:
    first = await open_handle(plain, "t1")
    await plain.close()
    await plain.connect()
    handle = await open_handle(plain, "t2")
    await first.close()
    await publish_result(plain, "t2")
    assert await handle.content(2) == "of t2"


async def test_an_id_that_is_not_a_token_is_refused_and_leaves_nothing(plain: Bus) -> None:
    before = subscriptions(plain)
    with pytest.raises(InvalidTask):
        await open_handle(plain, "a.b")
    assert subscriptions(plain) == before


# -- clients with the same submitter


@pytest.fixture
def limit(monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(result_subscriptions, "FOREIGN_LIMIT", 20)
    return 20


async def publish_foreign(bus: Bus, count: int) -> None:
    for n in range(count):
        await publish_result(bus, f"foreign{n}")
    await bus.requests.flush()


async def test_a_client_among_many_of_its_submitter_gets_only_its_own_results(
    plain: Bus, connect: Connect, limit: int
) -> None:
    other = await connect()
    before = subscriptions(plain)
    handles = [await open_handle(plain, f"t{n}") for n in range(4)]
    assert subscriptions(plain) == before + 2
    await plain.requests.flush()
    await publish_foreign(other, limit)
    await until(lambda: subscriptions(plain) == before + 4, what="each task has a subscription of its own")
    await handles[0].close()
    handles.append(await open_handle(plain, "t4"))
    assert subscriptions(plain) == before + 4
    await plain.requests.flush()
    for n in range(1, 5):
        await publish_result(other, f"t{n}")
    assert await contents(handles[1:]) == [f"of t{n}" for n in range(1, 5)]
    assert subscriptions(plain) == before


async def test_no_result_is_lost_while_the_subscriptions_change(plain: Bus, connect: Connect, limit: int) -> None:
    other = await connect()
    before = subscriptions(plain)
    handles = [await open_handle(plain, f"t{n}") for n in range(200)]
    await plain.requests.flush()
    for n in range(200):
        await publish_result(other, f"foreign{n}")
        await publish_result(other, f"foreign-{n}")
        await publish_result(other, f"t{n}")
    assert await contents(handles) == [f"of t{n}" for n in range(200)]
    await until(lambda: subscriptions(plain) == before, what="all subscriptions have ended")


async def test_a_client_shares_a_subscription_again_after_a_while(
    plain: Bus, connect: Connect, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(result_subscriptions, "SEPARATE_S", 0.0)
    other = await connect()
    before = subscriptions(plain)
    handles = [await open_handle(plain, task_id) for task_id in ("first", "second")]
    await plain.requests.flush()
    await publish_foreign(other, limit)
    results = plain.results._by_submitter["public"]
    await until(lambda: results._shared is None, what="the open tasks have their own subscriptions")
    handles += [await open_handle(plain, f"t{n}") for n in range(3)]
    await until(lambda: subscriptions(plain) == before + 3, what="the new tasks share a subscription")
    await plain.requests.flush()
    for handle in handles:
        await publish_result(other, handle.task_id)
    assert await contents(handles) == [f"of {handle.task_id}" for handle in handles]
    await until(lambda: subscriptions(plain) == before, what="all subscriptions have ended")


async def test_a_client_with_half_of_the_results_keeps_the_shared_subscription(plain: Bus, limit: int) -> None:
    before = subscriptions(plain)
    first, kept = [await open_handle(plain, task_id) for task_id in ("first", "kept")]
    await first.close()
    for n in range(3 * limit):
        handle = await open_handle(plain, f"t{n}")
        await publish_result(plain, f"t{n}")
        await publish_result(plain, f"foreign{n}")
        await handle.content(2)
    assert subscriptions(plain) == before + 1
    assert plain.results._by_submitter["public"]._separate == {}
    await kept.close()
    assert subscriptions(plain) == before
