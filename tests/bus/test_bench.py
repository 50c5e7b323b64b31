"""The benchmark itself: its raw pipe stores every hop, and its tables show the measured values."""

import asyncio

import pytest
from bench.loop import IN_FLIGHT, LOOP, PEER, RAW, Round, checks, measure, ratio, report
from bench.measure import Load, closed_loop
from bench.raw_pipe import HOPS, raw_pipe
from support.wait import until


@pytest.mark.usefixtures("nats_url")
async def test_the_raw_pipe_stores_every_hop_and_leaves_nothing_behind() -> None:
    async with raw_pipe() as pipe, asyncio.timeout(30):
        assert len(await pipe.carry(50, 8)) == 50
        assert len(await pipe.carry(3, 8)) == 3

        async def settled() -> bool:
            return not (await pipe.state())["messages"]

        await until(settled, what="all is acked")
        assert (await pipe.state())["last_seq"] == HOPS * 53


@pytest.mark.slow
@pytest.mark.usefixtures("nats_url")
async def test_the_measured_parts_of_the_raw_pipe_add_up() -> None:
    async with asyncio.timeout(30):
        loads = await measure({RAW: raw_pipe}, RAW, tasks=20, single=5)
    assert set(loads) == {1, *IN_FLIGHT}
    for at_once, figures in loads.items():
        assert figures.at_once == at_once
        assert figures.per_s > 0
        assert 0 < figures.p50_ms <= figures.p99_ms
        assert set(figures.cpu_us) == set(figures.rss_mb) == {"server", "pipe"}
        assert figures.rss_mb["pipe"] > 1


async def test_a_closed_loop_has_no_more_under_way_than_asked_for() -> None:
    under_way = most = 0

    async def once() -> None:
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        await asyncio.sleep(0)
        under_way -= 1

    assert len(await closed_loop(once, 20, 3)) == 20
    assert most == 3


def load(at_once: int, per_s: float, p50_ms: float) -> Load:
    cpu, rss = {"server": 100.0, "phases": 400.0}, {"server": 30.0, "phases": 40.0}
    return Load(at_once, per_s=per_s, p50_ms=p50_ms, p99_ms=2 * p50_ms, cpu_us=cpu, rss_mb=rss)


def one_round(**speeds: float) -> Round:
    names = {"raw": RAW, "peer": PEER, "loop": LOOP}
    return {
        names[key]: {at_once: load(at_once, speed, 1000 / speed) for at_once in (1, *IN_FLIGHT)}
        for key, speed in speeds.items()
    }


def test_a_ratio_is_taken_within_each_round_before_the_median() -> None:
    slow, fast, odd = one_round(raw=1000, loop=600), one_round(raw=4000, loop=2400), one_round(raw=100, loop=1)
    assert ratio([slow, fast, odd], LOOP, 256, lambda figures: figures.per_s) == pytest.approx(0.6)


def test_the_tables_name_every_contender_and_the_promises_are_judged() -> None:
    rounds = [one_round(raw=4000, peer=500, loop=2400)]
    text = "\n".join(report(rounds))
    for name in (RAW, PEER, LOOP):
        assert text.count(name) >= 4
    assert "2,400 (  0.60)" in text
    assert "server 100, phases 400" in text
    assert [line.split()[0] for line in checks(rounds)] == ["pass", "pass", "pass"]
    assert [line.split()[0] for line in checks([one_round(raw=4000, peer=500, loop=800)])] == ["MISS", "MISS", "MISS"]


def test_a_peer_that_was_not_measured_is_not_judged() -> None:
    words = list(checks([one_round(raw=4000, loop=2400)]))
    assert "not measured" in words[1]
    assert words[0].split()[0] == words[2].split()[0] == "pass"
