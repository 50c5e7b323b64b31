"""Calls that are broken off, and handles that are dropped, leave nothing in the client or on the server."""

import asyncio
import gc
import tracemalloc
from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple

import pytest
from support.wait import until

from loom.bus import queries, task_client
from loom.bus.bus import Bus
from loom.bus.natsio.ordered_consumer import OrderedConsumer
from loom.bus.natsio.request_many import request_many
from loom.bus.natsio.server_errors import Refused
from loom.bus.rewards import RewardBus
from loom.bus.tap import Tap
from loom.bus.task_client import TaskHandle
from loom.schemas.base import encode
from loom.schemas.events import TextDelta
from loom.schemas.learning.profile import NodeProfile
from loom.schemas.learning.reward import Reward
from loom.schemas.run import Delta
from loom.schemas.task import TaskAd, TaskResult

AD = TaskAd(task_id="t1", description="count the words")


class Held(NamedTuple):
    """What a client holds, and the consumers on the server."""

    subscriptions: int
    inboxes: int
    unconfirmed: int
    tasks: int
    callbacks: int
    consumers: int


async def held(bus: Bus) -> Held:
    streams = [bus.subjects.stream(name) for name in ("INTAKE", "TASKS", "REWARDS", "DEAD")]
    streams += [f"KV_{bus.subjects.bucket(name)}" for name in ("records", "plans", "nodes", "tuning")]
    return Held(
        len(bus.connection._nc._subs),
        len(bus.requests._sinks),
        len(bus.jetstream._publisher._pending),
        len(bus.tasks._tasks),
        len(bus.connection._reconnected),
        sum([await consumers(bus, stream) for stream in streams]),
    )


async def consumers(bus: Bus, stream: str) -> int:
    try:
        return int((await bus.jetstream.api(f"STREAM.INFO.{stream}"))["state"]["consumer_count"])
    except Refused:
        return 0  # this namespace has no streams


async def nothing_more(bus: Bus, before: Held) -> None:
    async def same() -> bool:
        return await held(bus) == before

    try:
        await until(same, within_s=5, what="all is as before")
    except AssertionError:
        assert await held(bus) == before


async def delta(bus: Bus, n: int) -> None:
    await bus.connection.publish(
        bus.subjects.of("delta", "public", "t1"), Delta(task_id="t1", attempt=1, seq=n, event=TextDelta(text="x"))
    )


# -- handles


async def publish_and_drop(bus: Bus, count: int) -> None:
    before = await held(bus)
    await task_client.publish(bus, TaskAd(description="warm"))
    gc.collect()
    tracemalloc.start()
    kept = tracemalloc.get_traced_memory()[0]
    for _ in range(count // 100):
        await asyncio.gather(*(task_client.publish(bus, TaskAd(description="x")) for _ in range(100)))
    gc.collect()
    await nothing_more(bus, before)
    kept = tracemalloc.get_traced_memory()[0] - kept
    tracemalloc.stop()
    assert kept < 5 * 2**20


@pytest.mark.slow
async def test_two_thousand_dropped_handles_leave_no_subscription_and_no_memory(bus: Bus) -> None:
    await publish_and_drop(bus, 2_000)


@pytest.mark.slow
async def test_ten_thousand_dropped_handles_leave_no_subscription_and_no_memory(bus: Bus) -> None:
    await publish_and_drop(bus, 10_000)


async def test_the_progress_a_dropped_handle_kept_is_freed_with_it(plain: Bus) -> None:
    before = await held(plain)
    handle = TaskHandle(plain, AD)
    await handle.open(deltas=True)
    for n in range(100):
        await delta(plain, n)
    await plain.requests.flush()
    del handle
    gc.collect()
    await nothing_more(plain, before)
    assert not [each for each in gc.get_objects() if type(each).__name__ == "TaskUpdates"]


async def test_progress_that_is_not_read_is_kept_within_bounds(plain: Bus, monkeypatch: pytest.MonkeyPatch) -> None:
    size = len(encode(Delta(task_id="t1", attempt=1, seq=0, event=TextDelta(text="x"))))
    monkeypatch.setattr("loom.bus.task_updates.BUFFER_BYTES", 5 * size)
    handle = TaskHandle(plain, AD)
    await handle.open(deltas=True)
    for n in range(9):
        await delta(plain, n)
    await plain.requests.flush()
    await plain.connection.publish(
        plain.subjects.of("result", "public", "t1"), TaskResult(task_id="t1", state="succeeded", content="x")
    )
    assert [each.seq async for each in handle.events()] == [0, 1, 2, 3, 4]


async def test_a_kept_handle_ends_its_subscriptions_with_the_task(plain: Bus) -> None:
    before = await held(plain)
    handle = TaskHandle(plain, AD)
    await handle.open(deltas=True)
    result = TaskResult(task_id="t1", state="succeeded", content="42")
    await plain.connection.publish(plain.subjects.of("result", "public", "t1"), result)
    await nothing_more(plain, before)
    assert await asyncio.to_thread(asyncio.run, handle.result()) == result  # an ended task can be read anywhere


async def broken_off(bus: Bus, handle: TaskHandle) -> None:
    async for _ in handle.events():
        break


async def closed(bus: Bus, handle: TaskHandle) -> None:
    stream = handle.events()
    await anext(stream)
    await stream.aclose()


async def cancelled(bus: Bus, handle: TaskHandle) -> None:
    async def read() -> None:
        async for _ in handle.events():
            begun.set()

    begun = asyncio.Event()
    reading = asyncio.ensure_future(read())
    await begun.wait()
    reading.cancel()
    await asyncio.wait([reading])


@pytest.mark.parametrize("leave", [broken_off, closed, cancelled])
async def test_an_iteration_that_is_left_ends_its_progress_subscription_and_the_next_subscribes_again(
    plain: Bus, leave: Callable[[Bus, TaskHandle], Awaitable[None]]
) -> None:
    handle = TaskHandle(plain, AD)
    await handle.open(deltas=False)
    before = await held(plain)
    await handle.open(deltas=True)
    await delta(plain, 0)
    await leave(plain, handle)
    await nothing_more(plain, before)

    stream = handle.events()
    again = asyncio.ensure_future(anext(stream))
    await until(lambda: len(plain.connection._nc._subs) > before.subscriptions, what="it is subscribed again")
    await delta(plain, 1)
    assert (await again).seq == 1
    await stream.aclose()


# -- calls that are cancelled at every turn of the event loop


async def published(bus: Bus) -> None:
    async with task_client.published(bus, TaskAd(description="x"), deltas=True, cancel_with_caller=False) as handle:
        await handle.content()


async def followed(bus: Bus) -> None:
    handle = await task_client.publish(bus, TaskAd(description="x"))
    async for _ in handle.events():
        pass


async def requested(bus: Bus) -> None:
    await bus.requests.request("unanswered", timeout_s=5)


async def stored(bus: Bus) -> None:
    await asyncio.gather(
        *(bus.jetstream.publish(bus.subjects.intake("public", "low", f"t{n}"), b"{}", within_s=0.2) for n in range(3))
    )


async def scattered(bus: Bus) -> None:
    await request_many(
        bus.requests, "unanswered", b"", TaskResult, discards=bus.discards, window_s=5, enough=lambda _: False
    )


async def rewards(bus: Bus) -> None:
    async for _ in RewardBus(bus=bus).subscribe():
        pass


async def old_rewards(bus: Bus) -> None:
    async for _ in RewardBus(bus=bus).replay():
        pass


async def bucket(bus: Bus) -> None:
    reader = bus.bucket("nodes", NodeProfile).reader()
    try:
        while True:
            await reader.batch()
    finally:
        await reader.stop()


async def past(bus: Bus) -> None:
    async for _ in queries.since(
        bus, bus.subjects.stream("REWARDS"), bus.subjects.of("reward", "*", "*", "*", "*"), 0.0
    ):
        pass


async def tapped(bus: Bus) -> None:
    async with Tap(bus, ["task", "result"]) as tap:
        async for _ in tap:
            pass


@pytest.mark.parametrize(
    "call", [published, followed, requested, stored, scattered, rewards, old_rewards, bucket, past, tapped]
)
async def test_a_call_that_is_cancelled_anywhere_leaves_nothing(
    bus: Bus, call: Callable[[Bus], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    # The server may handle the deletion of a consumer before its creation; then it deletes it for being idle.
    monkeypatch.setattr("loom.bus.natsio.ordered_consumer.IDLE_S", 1)
    before = await held(bus)
    for turns in [*range(12), 20, 50]:
        calling = asyncio.ensure_future(call(bus))
        for _ in range(turns):
            await asyncio.sleep(0)
        calling.cancel()
        await asyncio.gather(calling, return_exceptions=True)
    del calling  # its traceback refers to what it had
    gc.collect()
    await nothing_more(bus, before)


async def test_a_reader_of_a_stream_that_is_stopped_deletes_its_consumer(bus: Bus) -> None:
    before = await held(bus)
    reader = await OrderedConsumer(
        bus.jetstream, bus.subjects.stream("REWARDS"), filter=bus.subjects.of("reward", "*", "*", "*", "*")
    ).start()
    assert (await held(bus)).consumers == before.consumers + 1
    await reader.stop()
    await nothing_more(bus, before)


async def test_a_reader_of_rewards_that_breaks_off_leaves_nothing(bus: Bus) -> None:
    before = await held(bus)
    topic = RewardBus(bus=bus)
    for n in range(3):
        await topic.publish(
            Reward(
                reward_id=f"r{n}",
                task_id="t",
                attempt=1,
                source="person",
                node_id="n",
                domain_token="code",
                score=1,
                ended_at=1,
            )
        )
    async for _ in topic.replay():
        break
    await nothing_more(bus, before)


async def test_a_stored_message_that_is_awaited_late_is_confirmed(bus: Bus) -> None:
    storing = bus.jetstream.publish(bus.subjects.intake("public", "low", "late"), b"{}", msg_id="late", within_s=0.2)
    assert bus.jetstream._publisher._pending
    await until(lambda: not bus.jetstream._publisher._pending and not bus.requests._sinks, what="it is given up")
    assert (await storing).seq > 0
    assert not bus.jetstream._publisher._pending
