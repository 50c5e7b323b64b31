"""The connection: its promises in normal operation and through every failure that has been observed."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import pytest
from support.bus_helpers import Connect, MessageRecorder, alive, back
from support.logs import capture_logs
from support.stopping import stop
from support.wait import until

from loom.bus import topology
from loom.bus.bus import Bus
from loom.bus.natsio import connection as connection_module
from loom.bus.natsio import publishing
from loom.bus.natsio.requests import NoResponders
from loom.bus.natsio.server_errors import Conflict, Refused
from loom.bus.natsio.transport import connecting as connecting_module
from loom.bus.natsio.transport.message import Msg, PayloadTooLarge
from loom.runner.server.nats_server import NatsServer
from loom.schemas.config import ClusterConfig
from loom.schemas.errors import BusUnavailable, LoomError, Overloaded

# -- connecting


async def test_a_connection_attempt_without_a_server_fails_within_its_patience() -> None:
    bus = Bus("nats://127.0.0.1:1,nats://127.0.0.1:2", patience_s=0.3)
    started = time.monotonic()
    with pytest.raises(BusUnavailable, match="loom up") as caught:
        await bus.connect()
    assert time.monotonic() - started < 2
    assert caught.value.url == "nats://127.0.0.1:1,nats://127.0.0.1:2"
    await bus.close()


@pytest.mark.slow
async def test_a_service_that_waits_for_its_server_logs_it_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connecting_module, "REPORT_S", 0.3)
    bus = Bus("nats://me:secret@127.0.0.1:1", patience_s=0.8)
    with capture_logs() as logs, pytest.raises(BusUnavailable, match="without NATS_URL"):
        await bus.connect()
    servers = [log["server"] for log in logs if log["event"] == "no_server_yet"]
    assert set(servers) == {"nats://127.0.0.1:1"}


async def test_a_server_that_comes_up_a_little_later_is_found(connect: Connect) -> None:
    server = NatsServer()
    server.start()
    url = server.url
    server.kill()
    try:
        connecting = asyncio.ensure_future(connect(url=url))
        await asyncio.wait([connecting], timeout=0.3)
        assert not connecting.done()
        await asyncio.to_thread(server.restart)
        assert await alive(await connecting)
    finally:
        await asyncio.to_thread(server.stop)


async def test_a_server_that_refuses_the_client_is_not_asked_twice() -> None:
    asked = 0

    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal asked
        asked += 1
        writer.write(b'INFO {"server_id": "x", "version": "2.15.1", "max_payload": 1048576, "auth_required": true}\r\n')
        await reader.readline()
        writer.write(b"-ERR 'Authorization Violation'\r\n")
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(refuse, "127.0.0.1", 0) as other:
        bus = Bus(f"nats://me:wrong@127.0.0.1:{other.sockets[0].getsockname()[1]}", patience_s=10)
        started = time.monotonic()
        with pytest.raises(BusUnavailable, match="Authorization"):
            await bus.connect()
        await bus.close()
    assert time.monotonic() - started < 5
    assert asked == 1


@pytest.mark.parametrize("url", ["", "foo:bar", "nats://", "http://127.0.0.1:1", "nats://127.0.0.1:1,ws://127.0.0.1:2"])
async def test_a_malformed_address_is_unavailable_like_any_other(url: str) -> None:
    bus = Bus(url, patience_s=0.2)
    with pytest.raises(BusUnavailable):
        await bus.connect()
    await bus.close()


async def test_another_program_on_the_port_is_not_taken_for_a_server() -> None:
    async def web_server(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        writer.close()

    async with await asyncio.start_server(web_server, "127.0.0.1", 0) as other:
        bus = Bus(f"nats://127.0.0.1:{other.sockets[0].getsockname()[1]}", patience_s=0.3)
        with pytest.raises(BusUnavailable):
            await bus.connect()
        await bus.close()


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("nats://127.0.0.1:1", "nats://127.0.0.1:1"),
        ("nats://me:geheim@127.0.0.1:1", "nats://127.0.0.1:1"),
        ("me:geheim@127.0.0.1:1", "127.0.0.1:1"),
        ("geheim@127.0.0.1:1", "127.0.0.1:1"),
        ("nats://me:ge@heim@127.0.0.1:1", "nats://127.0.0.1:1"),
        ("nats://me:ge/heim@a:1,tls://geheim@b:2,c:3", "nats://a:1,tls://b:2,c:3"),
    ],
)
async def test_no_password_is_ever_printed_or_logged(url: str, address: str) -> None:
    assert Bus(url).connection.address == address
    with capture_logs() as logs, pytest.raises(BusUnavailable) as caught:
        await Bus(url, patience_s=0.1).connect()
    output = f"{caught.value} {vars(caught.value)} {logs}"
    assert "geheim" not in output
    assert "heim" not in output


async def test_a_bus_that_never_connected_may_be_closed_and_aborted() -> None:
    bus = Bus("nats://127.0.0.1:1")
    await bus.close()
    await bus.close()
    bus.abort()
    bus = Bus("nats://127.0.0.1:1")
    bus.abort()
    await bus.close()


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="this platform has no TCP_USER_TIMEOUT")
async def test_a_half_open_connection_is_given_up_after_ten_seconds(mortal: Bus, server: NatsServer) -> None:
    def stall_ms() -> int:
        transport: Any = mortal.connection._nc._transport
        sock = transport._bare_io_writer.get_extra_info("socket")
        return int(sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT))

    assert stall_ms() == 10_000
    await asyncio.to_thread(server.restart)
    await back(mortal)
    await until(lambda: stall_ms() == 10_000, what="the new socket is hardened too")


# -- plain messages


async def test_a_message_arrives_with_headers_and_json_or_bytes(plain: Bus) -> None:
    got: list[Msg] = []

    async def take(msg: Msg) -> None:
        got.append(msg)

    await plain.connection.subscribe(plain.subjects.of("delta", "*", "*"), take)
    await plain.connection.publish(
        plain.subjects.of("delta", "public", "t1"), {"a": 1}, headers={"k": "v"}, reply="somewhere"
    )
    await plain.connection.publish(plain.subjects.of("delta", "public", "t2"), b"\xff")
    await until(lambda: len(got) == 2, what="both arrive")
    assert (got[0].data, got[0].headers, got[0].reply) == (b'{"a":1}', {"k": "v"}, "somewhere")
    assert (got[1].data, got[1].headers, got[1].reply) == (b"\xff", {}, "")


@pytest.mark.parametrize("value", ["v" * 100, "代" * 100])
async def test_headers_count_against_the_size_limit(plain: Bus, value: str) -> None:
    limit = plain.connection._nc.max_payload
    headers = {"Key": value}
    room = limit - len(f"NATS/1.0\r\nKey: {value}\r\n\r\n".encode())
    received = MessageRecorder()
    await plain.connection.subscribe(plain.subjects.of("delta", "public", "t1"), received)

    with pytest.raises(PayloadTooLarge, match=str(limit)):
        await plain.connection.publish(plain.subjects.of("delta", "public", "t1"), b"x" * (room + 1), headers=headers)
    with pytest.raises(PayloadTooLarge):
        await plain.connection.publish(plain.subjects.of("delta", "public", "t1"), b"x" * (limit + 1))
    await plain.connection.publish(plain.subjects.of("delta", "public", "t1"), b"x" * room, headers=headers)

    await received.count(1)
    assert len(received.bodies[0]) == room
    assert not plain.tasks.lost.is_set()


@pytest.mark.parametrize("subject", ["", "a b", "a\r\nPUB x 0\r\n", "a\tb"])
async def test_a_subject_that_would_break_the_protocol_is_refused_and_the_connection_lives(
    plain: Bus, subject: str
) -> None:
    with pytest.raises(LoomError):
        await plain.connection.publish(subject, b"x")
    with pytest.raises(LoomError):
        await plain.connection.publish("fine", b"x", reply=subject or " ")
    assert await alive(plain)


async def test_a_handler_that_raises_does_not_end_its_subscription(plain: Bus) -> None:
    received = MessageRecorder()

    async def handle(msg: Msg) -> None:
        if msg.data == b"bad":
            raise RuntimeError("a bug")
        await received(msg)

    await plain.connection.subscribe(plain.subjects.of("delta", "public", "t1"), handle)
    with capture_logs() as logs:
        for body in (b"bad", b"good", b"bad", b"good"):
            await plain.connection.publish(plain.subjects.of("delta", "public", "t1"), body)
        await received.count(2)
    assert [entry["event"] for entry in logs] == ["handler_failed"] * 2
    assert "RuntimeError: a bug" in logs[0]["error"]


async def test_an_ended_subscription_gets_no_more_messages_and_may_be_ended_again(plain: Bus) -> None:
    received = MessageRecorder()
    subscription = await plain.connection.subscribe(plain.subjects.of("delta", "public", "t1"), received)
    plain.connection.unsubscribe(subscription)
    plain.connection.unsubscribe(subscription)
    await plain.connection.publish(plain.subjects.of("delta", "public", "t1"), b"x")
    await plain.requests.flush()
    assert received.bodies == []


async def test_a_stopped_subscription_still_delivers_the_messages_that_have_come(plain: Bus) -> None:
    received, go_on = MessageRecorder(), asyncio.Event()

    async def slow(msg: Msg) -> None:
        await go_on.wait()
        await received(msg)

    subscription = await plain.connection.subscribe(plain.subjects.of("delta", "public", "t1"), slow)
    for n in range(5):
        await plain.connection.publish(plain.subjects.of("delta", "public", "t1"), b"%d" % n)
    stopping = asyncio.ensure_future(plain.requests.drain(subscription))
    await plain.requests.flush()
    await plain.connection.publish(plain.subjects.of("delta", "public", "t1"), b"too late")
    await plain.requests.flush()
    go_on.set()
    await stopping
    assert received.bodies == [b"0", b"1", b"2", b"3", b"4"]


async def test_served_requests_run_concurrently_up_to_a_limit_and_a_bad_one_alone_fails(plain: Bus) -> None:
    running, most, go_on = 0, 0, asyncio.Event()

    async def work(msg: Msg) -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await go_on.wait()
        running -= 1
        if msg.data == b"3":
            raise RuntimeError("a bug")
        await plain.connection.publish(msg.reply, msg.data)

    await plain.connection.serve(plain.subjects.submit, work, at_once=4)
    asked = [
        asyncio.ensure_future(plain.requests.request(plain.subjects.submit, b"%d" % n, timeout_s=0.3 if n == 3 else 5))
        for n in range(10)
    ]
    await until(lambda: running == 4, what="four run")
    await plain.requests.flush()
    assert running == 4
    go_on.set()
    answers = await asyncio.gather(*asked, return_exceptions=True)
    assert most == 4
    assert [a.data if isinstance(a, Msg) else type(a) for a in answers] == [
        TimeoutError if n == 3 else b"%d" % n for n in range(10)
    ]


# -- requests


async def test_a_request_returns_the_first_answer(plain: Bus) -> None:
    async def answer_twice(msg: Msg) -> None:
        await plain.connection.publish(msg.reply, b"one")
        await plain.connection.publish(msg.reply, b"two")

    await plain.connection.subscribe(plain.subjects.submit, answer_twice)
    assert (await plain.requests.request(plain.subjects.submit)).data == b"one"
    assert plain.requests._sinks == {}


async def test_a_request_without_an_answer_times_out(plain: Bus) -> None:
    await plain.connection.subscribe(plain.subjects.submit, MessageRecorder())
    with pytest.raises(TimeoutError):
        await plain.requests.request(plain.subjects.submit, timeout_s=0.05)
    assert plain.requests._sinks == {}


async def test_a_request_without_a_listener_fails_at_once_and_with_a_tap_times_out(
    plain: Bus, connect: Connect
) -> None:
    with pytest.raises(NoResponders):
        await plain.requests.request(plain.subjects.submit, timeout_s=5)

    tap = await connect()
    received = MessageRecorder()
    await tap.connection.subscribe(plain.subjects.everything, received)
    await tap.requests.flush()
    with pytest.raises(TimeoutError):
        await plain.requests.request(plain.subjects.submit, b"a request", timeout_s=0.1)
    assert received.bodies == [b"a request"]


async def test_a_sink_that_raises_does_not_end_the_others(plain: Bus) -> None:
    def broken(_: Msg) -> None:
        raise RuntimeError("a bug")

    reply = plain.requests.open_inbox(broken)
    with capture_logs() as logs:
        await plain.connection.publish(reply)
        await plain.requests.flush()
    assert [entry["event"] for entry in logs] == ["handler_failed"]
    assert await alive(plain)


async def test_inboxes_of_phases_are_kept_apart_from_those_of_clients_by_role_and_instance(connect: Connect) -> None:
    client, phase = await connect(), await connect(role="sense")
    assert client.requests.open_inbox(lambda _: None).startswith("_INBOX.")
    assert phase.requests.open_inbox(lambda _: None).startswith(f"_LOOM.sense.{phase.instance}.")
    assert await alive(phase)


# -- stored messages


def lose_acks(bus: Bus, monkeypatch: pytest.MonkeyPatch, count: int) -> list[str]:
    """Lose the next `count` answers to this connection; returns the inboxes that were opened."""
    opened: list[str] = []
    real: Callable[[Callable[[Msg], None]], str] = bus.requests.open_inbox

    def open_inbox(sink: Callable[[Msg], None]) -> str:
        opened.append(real(sink if len(opened) >= count else lambda _: None))
        return opened[-1]

    monkeypatch.setattr(bus.requests, "open_inbox", open_inbox)
    monkeypatch.setattr(publishing, "TRY_S", 0.1)
    return opened


async def test_a_stored_message_is_acknowledged_with_its_place(bus: Bus) -> None:
    first = await bus.jetstream.publish(bus.subjects.intake("public", "low", "t1"), {"a": 1}, msg_id="m1")
    second = await bus.jetstream.publish(bus.subjects.intake("public", "low", "t1"), {"a": 2}, msg_id="m2")
    again = await bus.jetstream.publish(bus.subjects.intake("public", "low", "t1"), {"a": 1}, msg_id="m1")
    assert first.stream == bus.subjects.stream("INTAKE")
    assert (first.seq, second.seq) == (1, 2)
    assert (again.seq, again.duplicate, first.duplicate) == (1, True, False)


async def test_a_lost_acknowledgement_is_answered_by_sending_again_under_the_same_id(
    bus: Bus, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = lose_acks(bus, monkeypatch, 1)
    ack = await bus.jetstream.publish(bus.subjects.intake("public", "low", "t1"), b"x", msg_id="m1")
    assert len(opened) == 2
    assert (ack.seq, ack.duplicate) == (1, False)  # no other message has taken the id
    assert (await topology.stream_state(bus, "INTAKE"))["messages"] == 1


async def test_the_callers_headers_are_left_as_they_are(bus: Bus) -> None:
    headers = {"k": "v"}
    await bus.jetstream.publish(bus.subjects.intake("public", "low", "t1"), b"x", msg_id="m1", headers=headers)
    assert headers == {"k": "v"}


async def test_a_write_that_expects_another_last_sequence_conflicts(bus: Bus) -> None:
    subject = bus.subjects.intake("public", "low", "t1")
    with pytest.raises(Conflict):
        await bus.jetstream.publish(subject, b"x", headers={"Nats-Expected-Last-Subject-Sequence": "7"})
    with pytest.raises(Refused) as caught:
        await bus.jetstream.publish(subject, b"x", headers={"Nats-Expected-Stream": "ANOTHER"})
    assert not isinstance(caught.value, Conflict)
    assert caught.value.err_code


async def test_a_full_stream_is_overloaded_at_once(connect: Connect) -> None:
    bus = await connect()
    await topology.apply(bus, ClusterConfig(intake_limit=2))
    for n in range(2):
        await bus.jetstream.publish(bus.subjects.intake("public", "low", f"t{n}"), b"x")
    with pytest.raises(Overloaded):
        await bus.jetstream.publish(bus.subjects.intake("public", "low", "t3"), b"x", within_s=30)


async def test_a_publish_without_a_stream_has_an_unknown_outcome_after_the_given_time(plain: Bus) -> None:
    started = time.monotonic()
    with pytest.raises(BusUnavailable, match=r"0\.3 s"):
        await plain.jetstream.publish(plain.subjects.intake("public", "low", "t1"), b"x", within_s=0.3)
    assert 0.3 <= time.monotonic() - started < 2
    assert plain.requests._sinks == {}


async def test_a_message_too_large_for_the_server_is_refused_before_it_is_sent(bus: Bus) -> None:
    with pytest.raises(PayloadTooLarge):
        await bus.jetstream.publish(
            bus.subjects.intake("public", "low", "t1"), b"x" * bus.connection._nc.max_payload, msg_id="m1"
        )
    assert await alive(bus)


async def test_the_api_raises_the_servers_reason_for_a_refusal(bus: Bus) -> None:
    with pytest.raises(Refused) as caught:
        await bus.jetstream.api("STREAM.INFO.NONE")
    assert caught.value.err_code == 10059


# -- faults


async def test_messages_published_while_the_server_is_down_arrive_afterwards(mortal: Bus, server: NatsServer) -> None:
    received = MessageRecorder()
    await mortal.connection.subscribe(mortal.subjects.of("delta", "public", "t1"), received)
    await asyncio.to_thread(server.kill)
    await until(lambda: not mortal.connection._nc.is_connected, what="the loss is noticed")
    await mortal.connection.publish(mortal.subjects.of("delta", "public", "t1"), b"buffered")
    storing = asyncio.ensure_future(
        mortal.jetstream.publish(mortal.subjects.intake("public", "low", "t1"), b"x", msg_id="m1")
    )
    await asyncio.to_thread(server.restart)

    assert (await storing).seq == 1
    await received.count(1)
    assert received.bodies == [b"buffered"]
    assert not mortal.tasks.lost.is_set()
    assert (await mortal.jetstream.api("INFO"))["streams"] == 8


async def test_no_confirmed_message_is_lost_and_none_doubled_over_a_kill(mortal: Bus, server: NatsServer) -> None:
    total = 300

    async def keep_storing(worker: int) -> None:
        for n in range(worker, total, 10):
            await mortal.jetstream.publish(
                mortal.subjects.intake("public", "low", f"t{n}"), b"x", msg_id=f"m{n}", within_s=20
            )

    work = asyncio.gather(*(keep_storing(worker) for worker in range(10)))
    await until(lambda: stored(mortal, 50), what="a part is stored")
    await asyncio.to_thread(server.kill)
    await asyncio.to_thread(server.restart)
    await work
    assert (await topology.stream_state(mortal, "INTAKE"))["messages"] == total


async def stored(bus: Bus, least: int) -> bool:
    return bool((await topology.stream_state(bus, "INTAKE"))["messages"] >= least)


async def test_a_buffer_that_is_full_while_disconnected_is_reported(mortal: Bus, server: NatsServer) -> None:
    await asyncio.to_thread(server.kill)
    await until(lambda: not mortal.connection._nc.is_connected, what="the loss is noticed")
    megabytes = [
        mortal.connection.publish(mortal.subjects.of("delta", "public", "t1"), b"x" * 1_000_000) for _ in range(5)
    ]
    refused = await asyncio.gather(*megabytes, return_exceptions=True)
    assert [type(one) for one in refused] == [type(None)] * 2 + [BusUnavailable] * 3
    await asyncio.to_thread(server.restart)
    await back(mortal)


async def test_a_close_while_the_server_is_away_does_not_hang(connect: Connect, server: NatsServer) -> None:
    bus = await connect(url=server.url)
    await asyncio.to_thread(server.kill)
    await until(lambda: not bus.connection._nc.is_connected, what="the loss is noticed")
    async with asyncio.timeout(3):
        await bus.close()
    assert not bus.tasks.lost.is_set()


@pytest.mark.slow
async def test_a_close_at_any_moment_of_a_loss_leaves_no_task(connect: Connect, server: NatsServer) -> None:
    """Every turn of the event loop after the loss is tried: a reconnect reacts differently at each."""
    before = asyncio.all_tasks()
    for turns in range(25):
        bus = await connect(url=server.url)
        os.kill(server.pid, signal.SIGKILL)
        for _ in range(turns):
            await asyncio.sleep(0)
        async with asyncio.timeout(3):
            await bus.close()
        assert not bus.tasks.lost.is_set()
        await until(lambda: asyncio.all_tasks() == before, within_s=0.5, what=f"no task left after {turns} turns")
        server.restart()


async def test_a_close_just_as_a_reconnect_is_refused_leaves_no_task(connect: Connect, server: NatsServer) -> None:
    before = asyncio.all_tasks()
    bus = await connect(url=server.url)
    server.kill()
    await until(lambda: bus.connection._nc._reconnection_task is not None, what="the loss is noticed")
    reconnecting = bus.connection._nc._reconnection_task
    assert reconnecting is not None
    cancel, missed = reconnecting.cancel, list[bool]()

    class Deaf:
        """A task that misses its first cancellation, as Python 3.11's wait_for may make it."""

        def __getattr__(self, name: str) -> object:
            return getattr(reconnecting, name)

        def cancel(self) -> bool:
            missed.append(True)
            return len(missed) > 1 and cancel()

    bus.connection._nc._reconnection_task = Deaf()  # type: ignore[assignment]
    await bus.close()
    await until(lambda: asyncio.all_tasks() == before, within_s=0.5, what="no task left")


@pytest.mark.slow
async def test_a_dead_read_loop_is_noticed_and_the_connection_made_again(
    connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection_module, "WATCH_S", 0.05)
    plain = await connect()
    received = MessageRecorder()
    await plain.connection.subscribe(plain.subjects.of("delta", "public", "t1"), received)
    dead = plain.connection._nc._reading_task
    assert dead is not None
    dead.cancel()
    await until(dead.done, what="the read loop ends")
    assert plain.connection._nc.is_connected
    await back(plain)
    await plain.connection.publish(plain.subjects.of("delta", "public", "t1"), b"x")
    await received.count(1)


async def test_half_a_message_of_the_old_connection_does_not_spoil_the_new_one(plain: Bus) -> None:
    transport: Any = plain.connection._nc._transport
    transport._io_reader.feed_data(b"MSG old 1 9999\r\nhalf of it")  # comes just as the connection is given up
    await plain.connection._nc.force_reconnect()
    await back(plain)


async def test_messages_sent_before_a_loss_is_noticed_arrive_afterwards(connect: Connect, plain: Bus) -> None:
    other, received = await connect(), MessageRecorder()
    await other.connection.subscribe(other.subjects.of("delta", "public", "t1"), received)
    await other.requests.flush()
    transport: Any = plain.connection._nc._transport
    transport._io_writer.transport.abort()
    await plain.connection.publish(plain.subjects.of("delta", "public", "t1"), b"x")
    assert (await received.count(1))[0].data == b"x"


@pytest.mark.slow
async def test_two_lost_acknowledgements_cause_a_reconnect(bus: Bus, monkeypatch: pytest.MonkeyPatch) -> None:
    reconnected = asyncio.Event()
    bus.connection.on_reconnect(reconnected.set)
    lose_acks(bus, monkeypatch, 3)  # nor does the server answer anything else
    ack = await bus.jetstream.publish(bus.subjects.intake("public", "low", "t1"), b"x", msg_id="m1")
    assert ack.seq == 1
    await until(reconnected.is_set, what="the client has reconnected")


async def test_a_connection_that_answers_is_left_alone_when_only_the_store_is_silent(
    bus: Bus, monkeypatch: pytest.MonkeyPatch
) -> None:
    reconnected = asyncio.Event()
    bus.connection.on_reconnect(reconnected.set)
    lose_acks(bus, monkeypatch, 2)
    ack = await bus.jetstream.publish(bus.subjects.intake("public", "low", "t1"), b"x", msg_id="m1")
    assert ack.seq == 1
    assert not reconnected.is_set()


async def test_a_stream_that_answers_but_stores_nothing_is_overloaded(
    bus: Bus, plain: Bus, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publishing.Publisher, "_on_reply", lambda *_: None)
    with pytest.raises(Overloaded, match="disk may be full"):
        await bus.jetstream.publish(bus.subjects.intake("public", "low", "t1"), b"x", within_s=0.1)
    with pytest.raises(BusUnavailable):
        await bus.jetstream.publish("in.no.stream", b"x", within_s=0.1)


@pytest.mark.slow
async def test_a_request_whose_server_dies_is_sent_again(mortal: Bus, server: NatsServer) -> None:
    stop(server.pid)
    asked = asyncio.ensure_future(mortal.jetstream.api(f"STREAM.INFO.{mortal.subjects.stream('TASKS')}", timeout_s=30))
    purged = asyncio.ensure_future(mortal.jetstream.api(f"STREAM.PURGE.{mortal.subjects.stream('DEAD')}", timeout_s=1))
    await asyncio.wait([asked], timeout=0.2)
    server.kill()
    await asyncio.to_thread(server.restart)

    assert (await asked)["state"]["messages"] == 0
    with pytest.raises(BusUnavailable):  # only the caller may repeat a purge
        await purged


async def test_a_reconnect_callback_that_raises_does_not_stop_the_others(plain: Bus) -> None:
    reconnected = asyncio.Event()

    def broken() -> None:
        raise RuntimeError("a bug")

    forgotten = asyncio.Event()
    plain.connection.on_reconnect(broken)
    plain.connection.on_reconnect(forgotten.set)
    plain.connection.on_reconnect(reconnected.set)
    plain.connection.forget_reconnect(forgotten.set)
    plain.connection.forget_reconnect(forgotten.set)
    await plain.connection._nc.force_reconnect()
    await asyncio.wait_for(reconnected.wait(), 5)
    await back(plain)
    assert not forgotten.is_set()


async def test_a_connection_closed_for_good_is_lost(plain: Bus) -> None:
    assert not plain.tasks.lost.is_set()
    transport: Any = plain.connection._nc._transport
    transport.write(b"NONSENSE\r\n")  # the server closes on this, and nats-py never comes back
    await asyncio.wait_for(plain.tasks.lost.wait(), 5)
    with pytest.raises(BusUnavailable):
        await plain.connection.publish(plain.subjects.of("delta", "public", "t1"))
    with pytest.raises(BusUnavailable):
        await plain.connection.subscribe(plain.subjects.of("delta", "public", "t1"), MessageRecorder())


async def test_a_close_on_purpose_is_not_a_loss_and_may_be_repeated(connect: Connect) -> None:
    bus = await connect()
    ended = asyncio.Event()

    async def run() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    bus.tasks.spawn(run(), name="a companion")
    await bus.requests.flush()
    await bus.close()
    await bus.close()
    assert ended.is_set()
    assert not bus.tasks.lost.is_set()
    with pytest.raises(BusUnavailable):
        await bus.connection.publish("x")


@pytest.mark.parametrize("end", ["close", "abort"])
async def test_a_confirmation_that_a_closed_connection_cannot_bring_is_not_awaited(
    connect: Connect, plain: Bus, end: str
) -> None:
    bus = await connect()
    # else the server answers at once that there are no responders
    await plain.connection.subscribe("in.no.stream", MessageRecorder())
    await plain.requests.flush()
    waiting = asyncio.ensure_future(bus.jetstream.publish("in.no.stream", b"x"))
    unawaited = bus.jetstream.publish("in.no.stream", b"x")
    await bus.requests.flush()
    if end == "close":
        await bus.close()
    else:
        bus.abort()
    async with asyncio.timeout(5):
        for confirmed in (waiting, unawaited):
            with pytest.raises(BusUnavailable):
                await confirmed
    await bus.close()


async def test_failures_outside_the_connection_are_logged(plain: Bus) -> None:
    async def fail() -> None:
        raise RuntimeError("a bug")

    with capture_logs() as logs:
        task = plain.tasks.spawn(fail(), name="the culprit")
        await asyncio.wait([task])
        await plain.requests.flush()
    assert [(entry["event"], entry["task"]) for entry in logs] == [("bus_task_failed", "the culprit")]


ABORTS = {
    "inside": "import asyncio; from loom.bus.bus import Bus\n"
    "async def main():\n"
    "    bus = await Bus(URL, namespace=NS).connect()\n"
    "    async def never(): await asyncio.Event().wait()\n"
    "    async def on_msg(msg): pass\n"
    "    await bus.connection.subscribe('a', on_msg); bus.tasks.spawn(never(), name='n'); await bus.requests.flush()\n"
    "    bus.abort(); bus.abort(); await bus.close(); assert not bus.tasks.lost.is_set()\n"
    "asyncio.run(main(), debug=True)\n",
    "after": "import asyncio, gc; from loom.bus.bus import Bus\n"
    "async def main():\n"
    "    bus = await Bus(URL, namespace=NS).connect()\n"
    "    await bus.requests.flush()\n"
    "    return bus\n"
    "bus = asyncio.run(main())\n"
    "bus.abort(); del bus; gc.collect()\n",
}


@pytest.mark.slow
@pytest.mark.parametrize("when", ABORTS)
def test_an_abort_from_synchronous_code_leaves_nothing_behind(nats_url: str, namespace: str, when: str) -> None:
    script = f"URL, NS = {nats_url!r}, {namespace!r}\n{ABORTS[when]}"
    ran = subprocess.run(
        [sys.executable, "-X", "dev", "-W", "error", "-c", script],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
    )
    assert (ran.returncode, ran.stderr) == (0, "")


async def test_connections_of_one_process_have_names_of_their_own(connect: Connect) -> None:
    one, other = await connect(role="match"), await connect(role="match")
    assert one.instance != other.instance
    assert one.instance.startswith("match-")
    assert one.requests.new_inbox() != one.requests.new_inbox()
