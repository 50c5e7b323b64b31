"""Request-many: one request, many answers, an end when enough have come."""

import asyncio
import time
from typing import Any

import pytest
from support.bus_helpers import Connect, MessageRecorder
from support.logs import capture_logs

from loom.bus.bus import Bus
from loom.bus.natsio.request_many import request_many
from loom.bus.natsio.transport.message import Msg, PayloadTooLarge
from loom.schemas.base import Message, decode
from loom.schemas.tokens import Token


class Reply(Message, frozen=True, kw_only=True):
    name: Token


def read(raw: bytes) -> Reply:
    return decode(raw, Reply)


async def replier(bus: Bus, name: str, *, times: int = 1, raw: bytes | None = None) -> None:
    async def answer(msg: Msg) -> None:
        for _ in range(times):
            await bus.connection.publish(msg.reply, Reply(name=name) if raw is None else raw)

    await bus.connection.subscribe(bus.subjects.of("auction", "*"), answer)


async def ask(bus: Bus, *, enough: int = 99, window_s: float = 0.1) -> tuple[list[str], float]:
    started = time.monotonic()
    replies = await request_many(
        bus.requests,
        bus.subjects.of("auction", "code"),
        {"who": "?"},
        read,
        discards=bus.discards,
        window_s=window_s,
        enough=lambda replies: len(replies) >= enough,
    )
    assert all(isinstance(reply, Reply) for reply in replies)
    return [reply.name for reply in replies], time.monotonic() - started


async def test_a_request_many_ends_as_soon_as_enough_have_answered(plain: Bus) -> None:
    for n in range(3):
        await replier(plain, f"h{n}")
    names, took = await ask(plain, enough=3, window_s=5)
    assert sorted(names) == ["h0", "h1", "h2"]
    assert took < 2


async def test_a_request_many_ends_with_its_window_and_keeps_the_answers(plain: Bus) -> None:
    await replier(plain, "h1")
    await plain.connection.subscribe(plain.subjects.of("auction", "*"), MessageRecorder())  # never answers
    names, took = await ask(plain, enough=2, window_s=0.15)
    assert names == ["h1"]
    assert 0.15 <= took < 2


async def test_answers_keep_their_order(plain: Bus) -> None:
    await replier(plain, "h1", times=3)
    assert (await ask(plain, enough=3, window_s=5))[0] == ["h1"] * 3


async def test_the_callback_for_enough_is_called_once_after_each_answer(plain: Bus) -> None:
    for n in range(4):
        await replier(plain, f"h{n}", raw=b"nonsense" if n == 3 else None)
    last: list[str] = []

    def enough(replies: list[Reply]) -> bool:
        last.append(replies[-1].name)
        return len(last) == 3

    subject = plain.subjects.of("auction", "code")
    replies = await request_many(
        plain.requests, subject, b"?", read, discards=plain.discards, window_s=5, enough=enough
    )
    assert last == [reply.name for reply in replies]


async def test_a_request_many_that_cannot_be_sent_leaves_nothing_behind(plain: Bus) -> None:
    with pytest.raises(PayloadTooLarge):
        await request_many(
            plain.requests,
            plain.subjects.of("auction", "code"),
            b"x" * 2**21,
            read,
            discards=plain.discards,
            window_s=60,
            enough=bool,
        )
    assert plain.requests._sinks == {}


async def test_a_request_many_without_listeners_ends_at_once_or_with_a_tap_in_time(
    plain: Bus, connect: Connect
) -> None:
    names, took = await ask(plain, window_s=5)
    assert names == []
    assert took < 2

    tap = await connect()
    await tap.connection.subscribe(tap.subjects.everything, MessageRecorder())
    await tap.requests.flush()
    names, took = await ask(plain, window_s=0.15)
    assert names == []
    assert took >= 0.15


async def test_an_unreadable_answer_is_left_out_and_logged(plain: Bus) -> None:
    await replier(plain, "bad", raw=b"nonsense")
    await replier(plain, "half", raw=b'{"bids": []}')
    await replier(plain, "good")
    with capture_logs() as logs:
        names, _ = await ask(plain, enough=2, window_s=0.2)
    assert names == ["good"]
    assert [entry["event"] for entry in logs] == ["reply_undecodable"] * 2


async def test_late_answers_have_no_effect(plain: Bus) -> None:
    asked: list[Msg] = []

    async def note(msg: Msg) -> None:
        asked.append(msg)

    await plain.connection.subscribe(plain.subjects.of("auction", "*"), note)
    names, _ = await ask(plain, window_s=0.05)
    await plain.connection.publish(asked[0].reply, Reply(name="late"))
    await plain.requests.flush()
    assert names == []
    assert plain.requests._sinks == {}


async def test_many_calls_side_by_side_get_their_own_answers(plain: Bus) -> None:
    async def parrot(msg: Msg) -> None:
        await plain.connection.publish(msg.reply, Reply(name=msg.data.decode().strip('"')))

    await plain.connection.subscribe(plain.subjects.of("auction", "*"), parrot)

    async def call(name: str) -> list[Any]:
        subject = plain.subjects.of("auction", "code")
        replies = await request_many(
            plain.requests, subject, name, read, discards=plain.discards, window_s=5, enough=bool
        )
        return [reply.name for reply in replies]

    assert await asyncio.gather(*(call(f"h{n}") for n in range(50))) == [[f"h{n}"] for n in range(50)]


async def test_a_call_that_is_cancelled_leaves_nothing_behind(plain: Bus) -> None:
    await plain.connection.subscribe(plain.subjects.of("auction", "*"), MessageRecorder())
    calling = asyncio.ensure_future(ask(plain, window_s=60))
    await plain.requests.flush()
    calling.cancel()
    await asyncio.gather(calling, return_exceptions=True)
    assert plain.requests._sinks == {}
