"""Connecting: every cause of a failure is named in one line, with what to do, and without a secret."""

import asyncio
import json
import socket
import time
from contextlib import AbstractAsyncContextManager
from pathlib import Path

import pytest
from support.bus_helpers import alive, back
from support.command import loom
from support.configured import configured_server
from support.fake_server import fake_server, info
from support.logs import capture_logs
from support.wait import until

from loom.bus.bus import Bus
from loom.bus.natsio.transport import connecting as connecting_module
from loom.bus.natsio.transport import resolver
from loom.bus.natsio.transport.resolver import Resolver
from loom.runner.server.nats_server import NatsServer
from loom.schemas.errors import BusUnavailable

PASSWORDS = ["s3cr,et@x", "a:b/c?d#e", "100%", "%41", "pä ss", "'\"\\", ""]


async def refused(url: str, patience_s: float = 0.5) -> str:
    """Fail to connect; return the error with its facts and the log."""
    bus = Bus(url, patience_s=patience_s)
    with capture_logs() as logs, pytest.raises(BusUnavailable) as caught:
        await bus.connect()
    await bus.close()
    assert "\n" not in caught.value.message
    return f"{caught.value.message} {vars(caught.value)} {logs}"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("greeting", "cause"),
    [
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "the answer does not come from a nats-server"),
        (b"SSH-2.0-OpenSSH_9.2\r\n", "the answer does not come from a nats-server"),
        (b"220 mail\r\n", "the answer does not come from a nats-server"),
        (b"\x15\x03\x01\x00\x02\x02\x46\n", "the answer does not come from a nats-server"),
        (b"x" * 100_000, "the server closes the connection"),
        (b"INFO\r\n", "the answer does not come from a nats-server"),
        (b"INFO ?\r\n", "info message, json parse error"),
        (b"INFO []\r\n", "the answer does not come from a nats-server"),
        (b'INFO {"connect_urls": 5}\r\n', "the answer does not come from a nats-server"),
        (b"", "the server closes the connection"),
    ],
)
async def test_a_port_where_something_else_answers_is_named(greeting: bytes, cause: str) -> None:
    async with fake_server(greeting, hang_up=True) as fake:
        text = await refused(f"nats://u:secret@{fake.address}")
    assert cause in text
    assert fake.received == b""
    assert "secret" not in text


@pytest.mark.slow
async def test_a_port_that_accepts_and_stays_silent_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connecting_module, "CONNECT_S", 0.2)
    async with fake_server() as fake:
        text = await refused(f"nats://u:secret@{fake.address}")
    assert "the connection is accepted, but no data arrives" in text
    assert fake.received == b""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (b"-ERR 'Authorization Violation'\r\n", "refuses the credentials (Authorization Violation); check the user"),
        (b"-ERR 'maximum connections exceeded'\r\n", "refuses the connection (maximum connections exceeded)"),
    ],
)
async def test_a_refusal_of_the_server_is_named(error: bytes, cause: str) -> None:
    async with fake_server(info(auth_required=True), answer=error, hang_up=True) as fake:
        text = await refused(f"nats://u:secret@{fake.address}")
    assert cause in text
    assert "secret" not in text
    assert b'"pass": "secret"' in fake.received


@pytest.mark.slow
async def test_all_servers_are_tried_and_each_has_its_own_cause() -> None:
    async with (
        fake_server(info(auth_required=True), answer=b"-ERR 'Authorization Violation'\r\n", hang_up=True) as one,
        fake_server(b"SSH-2.0\r\n", hang_up=True) as other,
    ):
        text = await refused(f"nats://a:secret@{one.address},nats://{other.address},127.0.0.1:1", patience_s=1.5)
    assert f"nats://{one.address}: the server refuses the credentials" in text
    assert f"nats://{other.address}: the answer does not" in text
    assert "127.0.0.1:1: the connection is refused" in text
    assert "secret" not in text


async def test_servers_that_all_refuse_end_the_attempt_at_once() -> None:
    answer = b"-ERR 'Authorization Violation'\r\n"
    async with (
        fake_server(info(auth_required=True), answer=answer, hang_up=True) as one,
        fake_server(info(auth_required=True), answer=answer, hang_up=True) as other,
    ):
        began = time.monotonic()
        text = await refused(f"nats://a:b@{one.address},nats://a:b@{other.address}", patience_s=20)
    assert time.monotonic() - began < 5
    assert text.startswith(f"cannot connect to nats://{one.address},nats://{other.address}: the server refuses the cr")


async def test_one_server_that_refuses_does_not_stop_the_others(nats_url: str) -> None:
    async with fake_server(info(), answer=b"-ERR 'Authorization Violation'\r\n", hang_up=True) as fake:
        for _ in range(4):  # whichever comes first
            async with Bus(f"nats://{fake.address},{nats_url}", patience_s=10) as bus:
                assert await alive(bus)


# -- credentials


def guarded(folder: Path, users: str) -> AbstractAsyncContextManager[str]:
    """A server with these users; yields host and port."""
    return configured_server(folder, f"authorization {{ {users} }}\n")


async def test_any_password_works_percent_encoded(tmp_path: Path) -> None:
    passwords = [password for password in PASSWORDS if password]
    users = ", ".join(
        f"{{ user: u{n}, password: {json.dumps(text, ensure_ascii=False)} }}" for n, text in enumerate(passwords)
    )
    async with guarded(tmp_path, f"users: [ {users} ]") as address:
        for n, password in enumerate(passwords):
            encoded = "".join(f"%{byte:02X}" for byte in password.encode())
            async with Bus(f"nats://u{n}:{encoded}@{address}") as bus:
                assert await alive(bus)


async def test_a_token_works_and_a_wrong_one_is_named_without_it(tmp_path: Path) -> None:
    async with guarded(tmp_path, 'token: "t0,ken"') as address:
        async with Bus(f"nats://t0%2Cken@{address}") as bus:
            assert await alive(bus)
        text = await refused(f"nats://s3cret@{address}")
    assert "check the user and password, or the token, in NATS_URL" in text
    assert "s3cret" not in text


async def test_each_server_gets_its_own_credentials() -> None:
    answer = b"-ERR 'Authorization Violation'\r\n"
    async with (
        fake_server(info(auth_required=True), answer=answer, hang_up=True) as one,
        fake_server(info(auth_required=True), answer=answer, hang_up=True) as other,
        fake_server(info(auth_required=True), answer=answer, hang_up=True) as third,
    ):
        await refused(f"nats://a:first@{one.address},nats://second@{other.address},{third.address}", patience_s=5)
    assert b'"pass": "first"' in one.received
    assert b'"auth_token": "second"' in other.received
    assert not any(word in third.received for word in (b"first", b"second", b"pass", b"token"))
    assert b"second" not in one.received
    assert b"first" not in other.received


# -- at the command line


@pytest.mark.slow
@pytest.mark.parametrize(
    ("line", "url", "words"),
    [
        ("phase run sense", "http://127.0.0.1:1", "the server's address begins with neither nats:// nor tls://"),
        ("up --processes", "nats://u:s3cr,et@127.0.0.1:1", "write a comma as %2C"),
        ("doctor", "nats://127.0.0.1:99999", "is not a number from 1 to 65535"),
    ],
)
async def test_an_address_that_cannot_be_one_ends_every_command_at_once(
    url: str, words: str, line: str, tmp_path: Path
) -> None:
    ended = await loom(tmp_path, *line.split(), NATS_URL=url)
    assert ended.code == 3
    assert words in ended.err.splitlines()[-1]
    assert "s3cr" not in ended.err
    assert "et@" not in ended.err


async def test_a_waiting_service_logs_the_cause_and_starts_once_a_server_runs(
    server: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connecting_module, "REPORT_S", 0.1)
    server.kill()
    bus = Bus(server.url, patience_s=20)
    refused = "the connection is refused; start one there"
    with capture_logs() as logs:
        connecting = asyncio.ensure_future(bus.connect())
        await until(lambda: any(entry["cause"].startswith(refused) for entry in logs), what="the cause is logged")
        await asyncio.to_thread(server.restart)
        await connecting
    assert await alive(bus)
    await bus.close()
    assert {entry["event"] for entry in logs} == {"no_server_yet"}


async def test_every_cause_of_an_outage_is_logged_once(server: NatsServer) -> None:
    async with Bus(server.url) as bus:
        bus.connection._nc.options["reconnect_time_wait"] = 0.02
        with capture_logs() as logs:
            await asyncio.to_thread(server.kill)
            attempts = bus.connection._nc._server_pool[0]
            await until(lambda: attempts.reconnects > 5, what="several attempts fail")
            await asyncio.to_thread(server.restart)
            await back(bus)
        causes = [entry["cause"] for entry in logs if entry["event"] == "reconnect_failed"]
        assert len(causes) == len(set(causes)) <= 2
        assert any("refused" in cause for cause in causes)


# -- host names


@pytest.mark.slow
async def test_an_unknown_host_name_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: object, **__: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    text = await refused("nats://u:secret@no-such-host.invalid")
    assert "the host name is unknown; check the name in NATS_URL" in text
    assert "secret" not in text


@pytest.mark.slow
@pytest.mark.parametrize("host", ["a..b", "x" * 70, "."])
async def test_a_name_that_no_name_server_can_know_is_an_unknown_host_name(host: str) -> None:
    assert "host name" in await refused(f"nats://{host}:1")


async def test_a_host_with_several_addresses_is_tried_at_each(nats_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    port = nats_url.rpartition(":")[2]
    entries = [(2, 1, 6, "", ("127.0.0.9", 0)), (2, 1, 6, "", ("127.0.0.1", 0)), (2, 1, 6, "", ("127.0.0.1", 0))]
    monkeypatch.setattr(resolver, "_entries", lambda _: entries)
    assert await Resolver().addresses("several.example") == ["127.0.0.9", "127.0.0.1"]
    async with Bus(f"nats://several.example:{port}") as bus:
        assert await alive(bus)


@pytest.mark.slow
async def test_a_silent_name_server_is_named_and_has_one_request_at_a_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = 0

    def slow(_host: str) -> list[tuple[object, ...]]:
        nonlocal asked
        asked += 1
        time.sleep(1)
        return []

    monkeypatch.setattr(resolver, "_entries", slow)
    monkeypatch.setattr(connecting_module, "CONNECT_S", 0.1)
    text = await refused("nats://slow.example", patience_s=0.8)
    assert "the host name cannot be resolved at the moment" in text
    assert asked == 1
