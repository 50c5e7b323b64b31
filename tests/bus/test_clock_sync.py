"""Measurements of the server's time, and the fallback where it cannot be measured."""

import asyncio
import time
from pathlib import Path
from typing import Any

import pytest
from support.bus_helpers import Connect, back
from support.configured import configured_server
from support.logs import capture_logs
from support.wait import until

from loom.bus import topology
from loom.bus.bus import Bus
from loom.bus.natsio import clock_sync
from loom.runner.server.nats_server import NatsServer
from loom.schemas.config import ClusterConfig


def set_off(bus: Bus, seconds: float) -> None:
    """Make a connection's time wrong, as after a suspension."""
    bus.clock._offset_s += seconds
    assert abs(bus.clock.now() - time.time()) > 1


def right(bus: Bus) -> bool:
    return abs(bus.clock.now() - time.time()) < 1  # the server runs on this machine


async def test_the_time_is_known_once_the_connection_or_the_streams_exist(connect: Connect, plain: Bus) -> None:
    assert not plain.clock.measured  # no stream is there to ask about
    assert right(plain)
    await topology.apply(plain, ClusterConfig())
    assert plain.clock.measured
    later = await connect(role="node")
    assert later.clock.measured


@pytest.mark.parametrize("off_s", [3600, -3600])
async def test_the_time_is_measured_again_when_asked_for(bus: Bus, off_s: float) -> None:
    set_off(bus, off_s)
    assert await bus.sync_clock()
    assert right(bus)


async def test_a_look_at_a_stream_sets_no_clock(bus: Bus) -> None:
    set_off(bus, 3600)
    await topology.stream_state(bus, "TASKS")
    await topology.inspect(bus, ClusterConfig())
    assert not right(bus)


async def test_the_time_is_measured_again_after_a_reconnect(mortal: Bus, server: NatsServer) -> None:
    set_off(mortal, 3600)
    await asyncio.to_thread(server.restart)
    await back(mortal)
    await until(lambda: right(mortal), within_s=5, what="the time is right again")


@pytest.mark.slow
async def test_the_time_is_measured_again_every_few_minutes(bus: Bus, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clock_sync, "EVERY_S", 0.1)
    set_off(bus, 3600)
    await until(lambda: right(bus), within_s=5, what="the time is right again")


@pytest.mark.slow
async def test_the_time_is_measured_again_once_the_machines_two_clocks_diverge(bus: Bus) -> None:
    set_off(bus, 60)
    bus.clock._gap_s -= 60  # as the monotonic clock stands still while the machine sleeps
    await until(lambda: right(bus), within_s=5, what="the time is right again")


@pytest.mark.slow
async def test_the_time_is_known_once_a_stream_exists(
    connect: Connect, plain: Bus, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clock_sync, "UNTIL_FIRST_S", 0.1)
    early = await connect(role="node")
    assert not early.clock.measured
    await topology.apply(plain, ClusterConfig())
    await until(lambda: early.clock.measured, within_s=5, what="the time is measured")


@pytest.mark.slow
async def test_the_best_of_three_tries_counts_when_the_way_is_long(bus: Bus, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = 0

    async def slow(_timeout_s: float) -> float:
        nonlocal asked
        asked += 1
        at = time.time()
        await asyncio.sleep((0.3, 0.05, 0.2)[asked - 1])  # all of it on the way back
        return at

    monkeypatch.setattr(bus._clock_sync, "_request_time", slow)
    set_off(bus, 3600)
    assert await bus.sync_clock()
    assert asked == 3
    assert bus.clock.now() - time.time() == pytest.approx(-0.025, abs=0.02)


@pytest.mark.parametrize(
    "answer", [b"", b"{}", b"[]", b"?", b'{"ts": 5}', b'{"ts": "soon"}', b'{"ts": "2026-01-01T00:00:00"}', b"\xff"]
)
async def test_an_answer_without_the_time_leaves_the_clock_alone(bus: Bus, answer: bytes) -> None:
    real: Any = bus.connection.publish_nowait

    def send(subject: str, message: Any = b"", **more: Any) -> None:
        if subject.startswith("$JS.API.STREAM.INFO"):
            real(more["reply"], answer)
        else:
            real(subject, message, **more)

    bus.connection.publish_nowait = send  # type: ignore[method-assign]  # a server that does not answer as it should
    before = bus.clock._offset_s
    assert not await bus.sync_clock()
    assert bus.clock._offset_s == before


async def test_a_client_without_the_permission_uses_its_own_clock_and_connects_fast(tmp_path: Path) -> None:
    allowed = 'permissions: { publish: { deny: "$JS.API.>" }, subscribe: ">" }'
    users = f"authorization {{ users: [ {{ user: node, password: pw, {allowed} }} ] }}"
    async with configured_server(tmp_path, f'jetstream {{ store_dir: "{tmp_path}/js" }}\n{users}') as address:
        began = time.monotonic()
        with capture_logs() as logs:
            async with Bus(f"nats://node:pw@{address}", role="node") as bus:
                assert time.monotonic() - began < clock_sync.CHECK_S
                assert not bus.clock.measured
                assert right(bus)
                await bus.requests.flush()
    assert [entry["event"] for entry in logs] == ["server_time_denied"]


async def test_a_client_without_jetstream_uses_the_clock_of_its_machine(tmp_path: Path) -> None:
    async with configured_server(tmp_path, "") as address, Bus(address) as bus:
        assert not bus.clock.measured
        assert right(bus)
