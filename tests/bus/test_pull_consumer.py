"""The continuous pull: a bounded window, kept full, through restarts and without idle requests."""

import asyncio
import contextlib
import itertools
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
from support.bus_helpers import Connect, back, envelope
from support.logs import capture_logs
from support.wait import until

from loom.bus import topology
from loom.bus.bus import Bus
from loom.bus.natsio.pull_consumer import STALLED_AFTER, PullConsumer, PullTimings
from loom.bus.natsio.server_errors import Refused, ServerErrorCode
from loom.bus.natsio.transport.fast_client import FastClient
from loom.bus.natsio.transport.message import Msg
from loom.bus.topology import SCALE_LANE
from loom.runner.server.nats_server import NatsServer
from loom.schemas.errors import BusUnavailable, LoomError

STALLS = [
    (BusUnavailable("no answer"), 3, True),
    (BusUnavailable("no answer"), 1, False),  # the only server still answers other requests
    (Refused("stream not found", ServerErrorCode.STREAM_NOT_FOUND), 3, False),
]


class Hand:
    """Takes messages up to `room`, and keeps them until they are settled."""

    def __init__(self, bus: Bus, room: int, timings: PullTimings = PullTimings()) -> None:
        self.bus = bus
        self.room = room
        self.held: list[Msg] = []
        self.most = 0
        self.seen: list[str] = []
        self.pull = PullConsumer(
            bus.jetstream,
            bus.subjects.stream("TASKS"),
            "scale",
            window=lambda: self.room - len(self.held),
            sink=self.take,
            restore=lambda: topology.ensure_consumer(bus, SCALE_LANE),
            timings=timings,
        )

    def take(self, msg: Msg) -> None:
        self.held.append(msg)
        self.seen.append(msg.subject.rsplit(".", 1)[1])
        self.most = max(self.most, len(self.held))

    async def settle(self, count: int = 1) -> None:
        for _ in range(count):
            await self.bus.connection.publish(self.held.pop(0).reply, b"+ACK")
        self.pull.top_up()

    async def full(self, within_s: float = 20) -> None:
        await until(lambda: len(self.held) == self.room, within_s=within_s, what=f"{self.room} messages in hand")

    async def empty_all(self, total: int, within_s: float = 20) -> None:
        async with asyncio.timeout(within_s):
            while len(set(self.seen)) < total or self.held:
                await until(lambda: self.held, what="a message in hand", within_s=within_s)
                await self.settle(len(self.held))


def failing_pull(bus: Bus, restore: Callable[[], Awaitable[None]], timings: PullTimings) -> PullConsumer:
    """A pull consumer of a stream that does not exist."""
    return PullConsumer(
        bus.jetstream, "NONE", "none", window=lambda: 1, sink=lambda _: None, restore=restore, timings=timings
    )


@contextlib.asynccontextmanager
async def holding(bus: Bus, room: int, timings: PullTimings = PullTimings()) -> AsyncIterator[Hand]:
    hand = Hand(bus, room, timings)
    await hand.pull.start()
    yield hand
    await hand.pull.stop()


async def put(bus: Bus, first: int, count: int) -> None:
    for n in range(first, first + count):
        await bus.jetstream.publish(bus.subjects.task("scale", "normal", f"t{n}"), envelope(f"t{n}"), msg_id=f"t{n}")


async def consumer_info(bus: Bus) -> dict[str, Any]:
    return await bus.jetstream.api(f"CONSUMER.INFO.{bus.subjects.stream('TASKS')}.scale")


async def quiet(bus: Bus) -> None:
    """Return once the server has delivered all pending messages."""
    for _ in range(3):
        await bus.requests.flush()


async def test_no_more_is_in_hand_than_the_window(bus: Bus) -> None:
    await put(bus, 0, 20)
    async with holding(bus, 4) as hand:
        await hand.full()
        await quiet(bus)
        assert len(hand.held) == 4
        assert hand.pull.pending == 0

        await hand.empty_all(20)
        assert hand.most == 4
        assert sorted(hand.seen) == sorted(f"t{n}" for n in range(20))


async def test_messages_that_come_later_are_handed_over_as_they_come(bus: Bus) -> None:
    async with holding(bus, 4) as hand:
        for n in range(6):
            await put(bus, n, 1)
            await until(lambda: hand.held, what="the message")
            await hand.settle()
        assert hand.seen == [f"t{n}" for n in range(6)]
        assert 0 < hand.pull.pending <= 4


async def test_a_window_that_closes_takes_nothing_and_opens_again(bus: Bus) -> None:
    async with holding(bus, 0) as hand:
        await put(bus, 0, 4)
        hand.pull.top_up()
        await quiet(bus)
        assert hand.held == []
        hand.room = 2
        hand.pull.top_up()
        await hand.full()


async def test_a_reconnect_does_not_ask_for_more_than_the_window(bus: Bus) -> None:
    async with holding(bus, 4) as hand:
        await until(lambda: hand.pull.pending == 4, what="the request")
        reconnected = asyncio.Event()
        bus.connection.on_reconnect(reconnected.set)
        await (
            bus.connection._nc.force_reconnect()
        )  # the server, still the same, holds the request of the lost connection
        await asyncio.wait_for(reconnected.wait(), 5)
        await put(bus, 0, 20)
        await hand.full()
        await quiet(bus)
        assert hand.most == 4
        await hand.empty_all(20, within_s=45)  # a message sent to the lost connection comes again after 30 s
        assert hand.most == 4


async def test_a_pull_goes_on_after_the_server_was_killed(mortal: Bus, server: NatsServer) -> None:
    await put(mortal, 0, 10)
    async with holding(mortal, 4) as hand:
        await hand.full()
        await asyncio.to_thread(server.kill)
        await until(lambda: not mortal.connection._nc.is_connected, what="the loss is noticed")
        hand.room = 6
        hand.pull.top_up()  # asked into the void
        await asyncio.to_thread(server.restart)
        await back(mortal)
        await hand.full()
        await quiet(mortal)
        assert hand.most == 6
        await put(mortal, 10, 5)
        await hand.empty_all(15)


async def test_a_consumer_deleted_meanwhile_is_made_again(bus: Bus) -> None:
    async with holding(bus, 4) as hand:
        await until(lambda: hand.pull.pending == 4, what="the request")
        await bus.jetstream.api(f"CONSUMER.DELETE.{bus.subjects.stream('TASKS')}.scale")
        await put(bus, 0, 10)
        await hand.empty_all(10)
        assert hand.most <= 4


@pytest.mark.slow
async def test_a_consumer_is_made_again_even_where_a_tap_hides_a_missing_responder(bus: Bus, connect: Connect) -> None:
    tap = await connect()

    async def listen(_: Msg) -> None: ...

    await tap.connection.subscribe(">", listen)
    await tap.requests.flush()
    await bus.jetstream.api(f"CONSUMER.DELETE.{bus.subjects.stream('TASKS')}.scale")
    await put(bus, 0, 3)
    async with holding(bus, 4, PullTimings(quiet_s=0.3)) as hand:
        await hand.empty_all(3)


@pytest.mark.slow
async def test_a_consumer_that_cannot_be_restored_yet_is_tried_again(bus: Bus) -> None:
    stream = bus.subjects.stream("TASKS")
    config = (await bus.jetstream.api(f"STREAM.INFO.{stream}"))["config"]
    timings = PullTimings(quiet_s=0.3)  # the server does not always report that a stream has gone
    async with holding(bus, 4, timings) as hand:
        with capture_logs() as logs:
            await bus.jetstream.api(f"STREAM.DELETE.{stream}")
            await until(
                lambda: any(entry["event"] == "consumer_not_restored" for entry in logs), what="a try that fails"
            )
        await bus.jetstream.api(f"STREAM.CREATE.{stream}", config)
        await put(bus, 0, 3)
        await hand.empty_all(3)


@pytest.mark.slow
async def test_a_missing_consumer_is_checked_at_growing_intervals(
    plain: Bus,
) -> None:
    times: list[float] = []

    async def broken() -> None:
        times.append(time.monotonic())
        raise BusUnavailable("no such stream")

    pull = failing_pull(plain, broken, PullTimings(max_retry_s=0.8))
    await pull.start()
    with capture_logs():
        await until(lambda: len(times) == 4, within_s=20, what="four looks")
    await pull.stop()

    waits = [later - earlier for earlier, later in itertools.pairwise(times)]
    assert [wait >= least for wait, least in zip(waits, (0.5, 0.8, 0.8), strict=True)] == [True] * 3


@pytest.mark.parametrize(("error", "servers", "leaves"), STALLS)
async def test_a_server_that_does_not_restore_a_consumer_a_few_times_is_left(
    plain: Bus, monkeypatch: pytest.MonkeyPatch, error: LoomError, servers: int, *, leaves: bool
) -> None:
    monkeypatch.setattr(FastClient, "servers", property(lambda _: [None] * servers))
    reconnects: list[None] = []
    plain.connection.on_reconnect(lambda: reconnects.append(None))
    tries = 0

    async def broken() -> None:
        nonlocal tries
        tries += 1
        raise error

    pull = failing_pull(plain, broken, PullTimings(min_retry_s=0.01, max_retry_s=0.01))
    await pull.start()
    with capture_logs():
        await until(lambda: tries >= 3 * STALLED_AFTER + 1, what="many tries")
    await pull.stop()
    assert len(reconnects) == int(leaves), "a new connection is given time"


async def test_an_expired_pull_request_is_followed_by_another(bus: Bus, monkeypatch: pytest.MonkeyPatch) -> None:
    async with holding(bus, 4, PullTimings(expires_s=0.3, heartbeat_s=0.1)) as hand:
        asked = count_requests(bus, monkeypatch)
        await until(lambda: len(asked) >= 2, what="two further requests")
        assert all(batch <= 4 for batch in asked)
        assert hand.pull.pending <= 4
        await put(bus, 0, 9)
        await hand.empty_all(9)
        assert hand.most <= 4


def count_requests(bus: Bus, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The batches asked for from now on."""
    asked: list[int] = []
    publish = bus.connection.publish

    async def counted(subject: str, message: Any = b"", **options: Any) -> None:
        if ".MSG.NEXT." in subject:
            asked.append(message["batch"])
        await publish(subject, message, **options)

    monkeypatch.setattr(bus.connection, "publish", counted)
    return asked


async def test_an_idle_pull_asks_once_and_then_waits(bus: Bus, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = count_requests(bus, monkeypatch)
    async with holding(bus, 4, PullTimings(heartbeat_s=0.05)) as hand:
        received_at = hand.pull._received_at
        await until(lambda: hand.pull._received_at > received_at + 0.3, what="several heartbeats")
        for _ in range(50):
            hand.pull.top_up()
            await asyncio.sleep(0)
        assert asked == [4]
        assert (await consumer_info(bus))["num_waiting"] == 1


async def test_a_busy_pull_does_not_ask_for_each_message(bus: Bus, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = count_requests(bus, monkeypatch)
    async with holding(bus, 64) as hand:
        await put(bus, 0, 256)
        while len(hand.seen) < 256 or hand.held:
            await until(lambda: hand.held, what="a message")
            await hand.settle()
        assert len(asked) < 64


async def test_a_stopped_pull_delivers_the_messages_on_their_way_and_then_none(bus: Bus) -> None:
    await put(bus, 0, 3)
    hand = Hand(bus, 8)
    await hand.pull.start()
    await hand.pull.stop()
    delivered = (await consumer_info(bus))["num_ack_pending"]
    assert len(hand.held) == delivered
    await put(bus, 3, 3)
    hand.pull.top_up()
    await quiet(bus)
    assert len(hand.held) == delivered
    assert (await consumer_info(bus))["num_ack_pending"] == delivered
    await hand.pull.stop()


async def test_a_stop_during_a_reconnect_leaves_no_subscription(bus: Bus) -> None:
    before = len(bus.connection._nc._subs)
    hand = Hand(bus, 4)
    await hand.pull.start()
    reconnected = asyncio.Event()
    bus.connection.on_reconnect(reconnected.set)
    await bus.connection._nc.force_reconnect()
    await asyncio.wait_for(reconnected.wait(), 5)
    await asyncio.sleep(0)  # the pull is about to subscribe again
    await hand.pull.stop()
    assert len(bus.connection._nc._subs) == before
    assert hand.pull._subscription is None
