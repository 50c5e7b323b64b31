"""Request-many: ask everybody, stop when enough have answered."""

import asyncio
import time
from typing import Any

import pytest
from support.buses import Connect, Heard
from support.logs import capture_logs

from loom.bus.client import Bus, Msg, PayloadTooLarge
from loom.bus.scatter import scatter
from loom.schemas.auction import Bid, Offer
from loom.schemas.wire import decode


def read(raw: bytes) -> Offer:
    return decode(raw, Offer)


async def bidder(bus: Bus, host_id: str, *, times: int = 1, raw: bytes | None = None) -> None:
    async def answer(msg: Msg) -> None:
        for _ in range(times):
            offer = Offer(host_id=host_id, bids=(Bid(node_id="n1"),))
            await bus.publish(msg.reply, offer if raw is None else raw)

    await bus.subscribe(bus.subjects.of("auction", "*"), answer)


async def ask(bus: Bus, *, enough: int = 99, window_s: float = 0.1) -> tuple[list[str], float]:
    started = time.monotonic()
    offers = await scatter(
        bus,
        bus.subjects.of("auction", "code"),
        {"who": "?"},
        read,
        window_s=window_s,
        enough=lambda offers: len(offers) >= enough,
    )
    assert all(isinstance(offer, Offer) for offer in offers)
    return [offer.host_id for offer in offers], time.monotonic() - started


async def test_it_ends_as_soon_as_enough_have_answered(plain: Bus) -> None:
    for n in range(3):
        await bidder(plain, f"h{n}")
    hosts, took = await ask(plain, enough=3, window_s=5)
    assert sorted(hosts) == ["h0", "h1", "h2"]
    assert took < 2


async def test_it_ends_with_the_window_and_keeps_what_came(plain: Bus) -> None:
    await bidder(plain, "h1")
    await plain.subscribe(plain.subjects.of("auction", "*"), Heard())  # never answers
    hosts, took = await ask(plain, enough=2, window_s=0.15)
    assert hosts == ["h1"]
    assert 0.15 <= took < 2


async def test_answers_keep_their_order(plain: Bus) -> None:
    await bidder(plain, "h1", times=3)
    assert (await ask(plain, enough=3, window_s=5))[0] == ["h1"] * 3


async def test_what_is_enough_is_asked_once_after_each_answer(plain: Bus) -> None:
    for n in range(4):
        await bidder(plain, f"h{n}", raw=b"nonsense" if n == 3 else None)
    last: list[str] = []

    def enough(offers: list[Offer]) -> bool:
        last.append(offers[-1].host_id)
        return len(last) == 3

    subject = plain.subjects.of("auction", "code")
    offers = await scatter(plain, subject, b"?", read, window_s=5, enough=enough)
    assert last == [offer.host_id for offer in offers]


async def test_a_question_that_cannot_be_sent_leaves_nothing_behind(plain: Bus) -> None:
    with pytest.raises(PayloadTooLarge):
        await scatter(plain, plain.subjects.of("auction", "code"), b"x" * 2**21, read, window_s=60, enough=bool)
    assert plain._sinks == {}


async def test_without_a_listener_it_ends_at_once_and_with_a_tap_by_its_window(plain: Bus, connect: Connect) -> None:
    hosts, took = await ask(plain, window_s=5)
    assert hosts == []
    assert took < 2

    tap = await connect()
    await tap.subscribe(tap.subjects.everything, Heard())
    await tap.echo()
    hosts, took = await ask(plain, window_s=0.15)
    assert hosts == []
    assert took >= 0.15


async def test_what_is_no_answer_is_left_out_and_said(plain: Bus) -> None:
    await bidder(plain, "bad", raw=b"nonsense")
    await bidder(plain, "half", raw=b'{"bids": []}')
    await bidder(plain, "good")
    with capture_logs() as logs:
        hosts, _ = await ask(plain, enough=2, window_s=0.2)
    assert hosts == ["good"]
    assert [entry["event"] for entry in logs] == ["answer_undecodable"] * 2


async def test_late_answers_disturb_nobody(plain: Bus) -> None:
    asked: list[Msg] = []

    async def note(msg: Msg) -> None:
        asked.append(msg)

    await plain.subscribe(plain.subjects.of("auction", "*"), note)
    hosts, _ = await ask(plain, window_s=0.05)
    await plain.publish(asked[0].reply, Offer(host_id="late"))
    await plain.echo()
    assert hosts == []
    assert plain._sinks == {}


async def test_many_calls_side_by_side_get_their_own_answers(plain: Bus) -> None:
    async def parrot(msg: Msg) -> None:
        await plain.publish(msg.reply, Offer(host_id=msg.data.decode().strip('"')))

    await plain.subscribe(plain.subjects.of("auction", "*"), parrot)

    async def call(name: str) -> list[Any]:
        subject = plain.subjects.of("auction", "code")
        offers = await scatter(plain, subject, name, read, window_s=5, enough=bool)
        return [offer.host_id for offer in offers]

    assert await asyncio.gather(*(call(f"h{n}") for n in range(50))) == [[f"h{n}"] for n in range(50)]


async def test_a_call_that_is_cancelled_leaves_nothing_behind(plain: Bus) -> None:
    await plain.subscribe(plain.subjects.of("auction", "*"), Heard())
    calling = asyncio.ensure_future(ask(plain, window_s=60))
    await plain.echo()
    calling.cancel()
    await asyncio.gather(calling, return_exceptions=True)
    assert plain._sinks == {}
