"""A tap on a real server: the messages it delivers, and that it takes none from others."""

import asyncio

import pytest
from support.bus_helpers import Connect, envelope
from support.wait import until

from loom.bus import tap as tap_module
from loom.bus.bus import Bus
from loom.bus.subjects import FAMILIES
from loom.bus.tap import SHAPES, Tap, TappedMessage
from loom.schemas.base import encode
from loom.schemas.envelope import Envelope
from loom.schemas.errors import BusUnavailable
from loom.schemas.events import TextDelta
from loom.schemas.run import Delta

WITHIN_S = 5


async def take(tap: Tap, count: int) -> list[TappedMessage]:
    async with asyncio.timeout(WITHIN_S):
        return [await anext(tap) for _ in range(count)]


def test_every_family_with_a_message_has_the_shape_the_table_names() -> None:
    bodies = {family.name: family.body.split()[0].rstrip(",;") for family in FAMILIES}
    unshaped = {"status", "cancel", "cancelled", "hosts", "dead"}  # no body, or one that could not be read before

    assert {name: shape.__name__ for name, shape in SHAPES.items()} == {
        name: body for name, body in bodies.items() if name not in unshaped
    }


async def test_messages_of_the_namespace_come_decoded_and_in_order(plain: Bus) -> None:
    hop = envelope("t1")
    delta = Delta(task_id="t1", attempt=1, seq=0, event=TextDelta(text="hello"))
    async with Tap(plain) as tap:
        before = plain.clock.now()
        await plain.connection.publish(plain.subjects.task("match", "high", "t1"), hop, headers={"Nats-Msg-Id": "t1:1"})
        await plain.connection.publish(plain.subjects.of("delta", "public", "t1"), delta)
        first, second = await take(tap, 2)

    assert isinstance(first.message, Envelope)
    assert first.message == hop
    assert (first.family, first.tokens) == ("task", {"phase": "match", "priority": "high", "task_id": "t1"})
    assert first.headers["Nats-Msg-Id"] == "t1:1"
    assert first.size == len(encode(hop))
    assert before <= first.at <= second.at <= plain.clock.now()
    assert second.message == delta
    assert second.skipped == 0


async def test_an_unreadable_body_comes_as_bytes(plain: Bus, namespace: str) -> None:
    async with Tap(plain) as tap:
        await plain.connection.publish(plain.subjects.of("result", "public", "t1"), b"\xff not a result")
        await plain.connection.publish(f"{namespace}.nothing.known", b"{}")
        await plain.connection.publish(plain.subjects.of("status", "t1"))
        result, unknown, status = await take(tap, 3)

    assert (result.family, result.message) == ("result", b"\xff not a result")
    assert (unknown.family, unknown.tokens, unknown.message) == ("", {}, b"{}")
    assert (status.family, status.message) == ("status", b"")


async def test_only_the_requested_families_are_delivered(plain: Bus) -> None:
    async with Tap(plain, ["delta", "result"]) as tap:
        await plain.connection.publish(plain.subjects.task("match", "high", "t1"), envelope("t1"))
        await plain.connection.publish(plain.subjects.of("result", "public", "t1"), b"?")
        (seen,) = await take(tap, 1)

    assert seen.family == "result"


async def test_messages_of_another_namespace_are_not_delivered(plain: Bus, connect: Connect, namespace: str) -> None:
    neighbour = await connect(namespace=f"{namespace}2")
    async with Tap(plain) as tap:
        await neighbour.connection.publish(neighbour.subjects.of("result", "public", "theirs"), b"?")
        await neighbour.requests.flush()
        await plain.connection.publish(plain.subjects.of("result", "public", "ours"), b"?")
        (seen,) = await take(tap, 1)

    assert seen.tokens["task_id"] == "ours"


async def test_a_slow_reader_gets_the_number_of_missed_messages_and_goes_on(plain: Bus) -> None:
    async with Tap(plain, room=2) as tap:
        for number in range(7):
            await plain.connection.publish(plain.subjects.of("result", "public", f"t{number}"), b"?")
        await plain.requests.flush()
        await until(lambda: tap._skipped == 5, what="five were skipped")
        kept = await take(tap, 2)
        await plain.connection.publish(plain.subjects.of("result", "public", "later"), b"?")
        (after,) = await take(tap, 1)

    assert [seen.tokens["task_id"] for seen in kept] == ["t0", "t1"]
    assert [seen.skipped for seen in kept] == [0, 0]
    assert (after.tokens["task_id"], after.skipped) == ("later", 5)


async def test_large_messages_take_room_by_their_bytes(plain: Bus, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tap_module, "ROOM_BYTES", 1500)
    async with Tap(plain) as tap:
        for name in ("fits", "does-not"):
            await plain.connection.publish(plain.subjects.of("result", "public", name), b"x" * 1000)
        await plain.requests.flush()
        await until(lambda: tap._skipped == 1, what="one was skipped")
        await take(tap, 1)
        await plain.connection.publish(plain.subjects.of("result", "public", "fits-again"), b"x" * 1000)
        (after,) = await take(tap, 1)

    assert (after.tokens["task_id"], after.skipped) == ("fits-again", 1)


async def test_a_tap_takes_no_message_from_a_queue_group(plain: Bus, connect: Connect) -> None:
    server = await connect()
    answered = []

    async def answer(msg: object) -> None:
        answered.append(msg)
        await server.connection.publish(msg.reply, b"yes")  # type: ignore[attr-defined]

    await server.connection.serve(server.subjects.of("status", "*"), answer, queue="sense")
    await server.requests.flush()
    async with Tap(plain), Tap(plain) as second:
        answers = [await server.requests.request(server.subjects.of("status", f"t{n}")) for n in range(10)]
        received = await take(second, 10)

    assert [msg.data for msg in answers] == [b"yes"] * 10
    assert len(answered) == len(received) == 10


async def test_a_closed_tap_ends_its_readers_after_the_buffered_messages(plain: Bus) -> None:
    async with Tap(plain) as tap:
        await plain.connection.publish(plain.subjects.of("result", "public", "t1"), b"?")
        await until(lambda: len(tap._waiting) == 1, what="the message has come")

    async with asyncio.timeout(WITHIN_S):
        assert [seen.tokens["task_id"] async for seen in tap] == ["t1"]


async def test_a_read_on_a_connection_closed_for_good_fails(plain: Bus) -> None:
    async with Tap(plain) as tap:
        reading = asyncio.ensure_future(take(tap, 1))
        await plain.requests.flush()
        plain.tasks.lost.set()

        with pytest.raises(BusUnavailable, match="closed for good"):
            await reading
