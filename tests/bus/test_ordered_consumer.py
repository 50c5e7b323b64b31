"""The ordered reader yields every message once and in order, from any start and through any failure."""

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from support.bus_helpers import Connect, back
from support.stopping import stop
from support.wait import until

from loom.bus.bus import Bus
from loom.bus.natsio import ordered_consumer
from loom.bus.natsio.ack_metadata import ack_metadata, rfc3339
from loom.bus.natsio.ordered_consumer import OrderedConsumer
from loom.bus.natsio.stored_message import StoredMessage
from loom.runner.server.nats_server import NatsServer
from loom.schemas.errors import LoomError


class Reading:
    """A reader and all messages it has read."""

    def __init__(self, bus: Bus, **options: Any) -> None:
        self.reader = OrderedConsumer(
            bus.jetstream,
            bus.subjects.stream("DEAD"),
            filter=options.pop("filter", bus.subjects.of("dead", "*", "*")),
            **options,
        )
        self.read: list[StoredMessage] = []
        self.failed: BaseException | None = None
        self._task = asyncio.create_task(self._read())

    async def _read(self) -> None:
        try:
            while True:
                self.read += await self.reader.batch()
        except LoomError as error:
            self.failed = error

    @property
    def bodies(self) -> list[int]:
        return [int(message.data) for message in self.read]

    async def count(self, wanted: int, within_s: float = 20) -> None:
        await until(lambda: len(self.read) >= wanted or self.failed, within_s=within_s, what=f"{wanted} read")
        assert self.failed is None

    async def got(self, wanted: list[int], within_s: float = 20) -> None:
        """Wait until exactly these messages were read, in this order."""
        await self.count(len(wanted), within_s)
        assert self.bodies == wanted
        assert [message.seq for message in self.read] == sorted({message.seq for message in self.read})

    async def stop(self) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        await self.reader.stop()


@pytest.fixture
async def reading() -> AsyncIterator[Callable[..., Reading]]:
    started: list[Reading] = []

    def start(bus: Bus, **options: Any) -> Reading:
        started.append(Reading(bus, **options))
        return started[-1]

    yield start
    for one in started:
        await one.stop()


async def put(bus: Bus, *numbers: int, phase: str = "match") -> list[int]:
    """Store numbers, and return their sequences."""
    return [
        (
            await bus.jetstream.publish(
                bus.subjects.of("dead", phase, f"t{n}"), b"%d" % n, msg_id=f"{phase}{n}", headers={"k": "v"}
            )
        ).seq
        for n in numbers
    ]


Start = Callable[..., Reading]


async def test_everything_is_read_in_order_from_the_beginning(bus: Bus, reading: Start) -> None:
    await put(bus, *range(20))
    all_of_it = reading(bus)
    await all_of_it.got(list(range(20)))
    await put(bus, 20, 21)
    await all_of_it.got(list(range(22)))
    first = all_of_it.read[0]
    assert (first.subject, first.seq, first.headers["k"]) == (bus.subjects.of("dead", "match", "t0"), 1, "v")
    assert first.stored_at == pytest.approx(bus.clock.now(), abs=30)


async def test_more_than_a_window_is_read_whole_by_a_slow_reader(bus: Bus, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ordered_consumer, "WINDOW", 16)
    await put(bus, *range(100))
    reader, bodies = (
        OrderedConsumer(bus.jetstream, bus.subjects.stream("DEAD"), filter=bus.subjects.of("dead", "*", "*")),
        [],
    )
    while not reader.caught_up:
        batch = await reader.batch()
        assert len(batch) <= 16
        bodies += [int(message.data) for message in batch]
        await bus.requests.flush()  # so that more may come meanwhile
    assert bodies == list(range(100))
    await reader.stop()


async def test_a_reader_may_begin_at_a_sequence(bus: Bus, reading: Start) -> None:
    seqs = await put(bus, *range(5))
    await reading(bus, start_seq=seqs[3]).got([3, 4])
    await reading(bus, start_seq=0).got([0, 1, 2, 3, 4])


async def test_a_reader_may_begin_at_a_time(bus: Bus, reading: Start) -> None:
    await put(bus, 0, 1)
    whole = reading(bus)
    await whole.got([0, 1])
    since = rfc3339(whole.read[-1].stored_at + 1e-6)
    await put(bus, 2)
    await reading(bus, start_time=since).got([2])


async def test_a_reader_of_new_messages_gives_no_old_one(bus: Bus) -> None:
    await put(bus, 0, 1)
    reader = await OrderedConsumer(
        bus.jetstream, bus.subjects.stream("DEAD"), filter=bus.subjects.of("dead", "*", "*"), deliver="new"
    ).start()
    await put(bus, 2)
    bodies: list[bytes] = []
    while not bodies:
        bodies += [message.data for message in await reader.batch()]
    assert bodies == [b"2"]
    await reader.stop()


async def test_only_messages_that_match_the_filter_are_read(bus: Bus, reading: Start) -> None:
    await put(bus, 0, 2, phase="match")
    await put(bus, 1, phase="scale")
    await reading(bus, filter=bus.subjects.of("dead", "match", "*")).got([0, 2])


async def test_a_reader_may_ask_for_the_last_message_of_each_subject(bus: Bus, reading: Start) -> None:
    subject = bus.subjects.of("dead", "match", "t1")
    for n in range(3):
        await bus.jetstream.publish(subject, b"%d" % n)
    await reading(bus, deliver="last_per_subject").got([2])


async def test_an_empty_stream_is_caught_up_with_at_once(bus: Bus) -> None:
    reader = OrderedConsumer(bus.jetstream, bus.subjects.stream("DEAD"), filter=bus.subjects.of("dead", "*", "*"))
    assert not reader.caught_up
    assert await asyncio.wait_for(reader.batch(), 5) == []
    assert reader.caught_up
    await put(bus, 1)
    assert [message.data for message in await asyncio.wait_for(reader.batch(), 5)] == [b"1"]
    await reader.stop()


async def test_a_message_lost_on_the_way_is_read_again_in_its_place(bus: Bus, reading: Start) -> None:
    await put(bus, 0, 1)
    one = reading(bus)
    await one.got([0, 1])
    pull = one.reader._pull
    assert pull is not None
    take, lost = pull._sink, list[int]()

    def forgetful(msg: Any) -> None:
        if msg.data == b"3" and not lost:
            lost.append(ack_metadata(msg.reply).stream_seq)
        else:
            take(msg)

    pull._sink = forgetful
    await put(bus, *range(2, 8))
    await one.got(list(range(8)))
    assert len(lost) == 1


async def test_a_consumer_the_server_forgot_is_made_again(bus: Bus, reading: Start) -> None:
    await put(bus, 0, 1)
    one = reading(bus)
    await one.got([0, 1])
    stream = bus.subjects.stream("DEAD")
    for name in (await bus.jetstream.api(f"CONSUMER.NAMES.{stream}"))["consumers"]:
        await bus.jetstream.api(f"CONSUMER.DELETE.{stream}.{name}")
    await put(bus, 2, 3)
    await one.got([0, 1, 2, 3])


@pytest.mark.parametrize("deliver", ["all", "new", "last_per_subject"])
async def test_no_message_is_missed_or_doubled_over_a_kill(
    mortal: Bus, server: NatsServer, connect: Connect, reading: Start, deliver: str
) -> None:
    before = [] if deliver == "new" else [0, 1, 2]
    await put(mortal, *range(3))
    one = reading(mortal, deliver=deliver)
    await one.got(before)
    await until(lambda: one.reader._started, what="the reader has begun")
    await put(mortal, 3)
    await one.got([*before, 3])

    await asyncio.to_thread(server.kill)
    await asyncio.to_thread(server.restart)
    writer = await connect(url=server.url)  # perhaps before the reader is back
    await put(writer, 4, 5)
    await one.got([*before, 3, 4, 5], within_s=15)
    await put(writer, 6)
    await one.got([*before, 3, 4, 5, 6])


async def test_a_kill_before_the_first_message_does_not_move_the_start_of_the_reader(
    mortal: Bus, server: NatsServer, connect: Connect, reading: Start
) -> None:
    await put(mortal, 0)
    one = reading(mortal, deliver="new")
    await until(lambda: one.reader._started, what="the reader has begun")
    await asyncio.to_thread(server.kill)
    await asyncio.to_thread(server.restart)
    writer = await connect(url=server.url)
    await put(writer, 1, 2)
    await back(mortal)
    await put(writer, 3)
    await one.got([1, 2, 3], within_s=15)


@pytest.mark.slow
async def test_messages_written_during_restarts_are_read_once_and_in_order(
    mortal: Bus, server: NatsServer, reading: Start
) -> None:
    one = reading(mortal)
    await until(lambda: one.reader._started, what="the reader has begun")
    for turn in range(3):
        batch = range(10 * turn, 10 * turn + 10)
        await asyncio.gather(asyncio.to_thread(server.restart), *(put(mortal, n) for n in batch[:5]))
        await asyncio.gather(*(put(mortal, n) for n in batch[5:]))
        await one.count(10 * (turn + 1), within_s=20)
    assert sorted(one.bodies) == list(range(30))
    assert [message.seq for message in one.read] == list(range(1, 31))


@pytest.mark.slow
async def test_a_reader_started_while_the_server_restarts_begins_after_it(
    mortal: Bus, server: NatsServer, reading: Start
) -> None:
    await put(mortal, 0, 1)
    stop(server.pid)
    one = reading(mortal)
    await asyncio.wait([one._task], timeout=0.2)
    server.kill()
    await asyncio.to_thread(server.restart)
    await one.got([0, 1], within_s=20)


async def test_a_stopped_reader_leaves_no_subscription_and_no_request(bus: Bus, reading: Start) -> None:
    before = len(bus.connection._nc._subs)
    one = reading(bus)
    await put(bus, 0)
    await one.got([0])
    await one.stop()
    await one.reader.stop()
    assert len(bus.connection._nc._subs) == before
    assert (await bus.jetstream.api(f"STREAM.INFO.{bus.subjects.stream('DEAD')}"))["state"]["messages"] == 1


async def test_a_reader_stopped_while_its_consumer_is_created_again_stays_stopped(bus: Bus, reading: Start) -> None:
    before = len(bus.connection._nc._subs)
    one = reading(bus)
    await put(bus, 0)
    await one.got([0])
    restarting = one.reader._begin_restart()
    assert one.reader._begin_restart() is restarting
    await one.stop()
    await restarting
    assert len(bus.connection._nc._subs) == before


async def test_a_reader_of_a_missing_stream_raises_that_it_is_missing(plain: Bus) -> None:
    with pytest.raises(LoomError):
        await OrderedConsumer(plain.jetstream, "NONE", filter="none").batch()
