"""`tls://` means TLS or no connection: not a byte is sent to a server that does not offer it."""

import asyncio
import json
import os
import ssl
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest
from support.bus_helpers import alive, back
from support.certificates import certificate
from support.command import loom
from support.configured import configured_server
from support.fake_server import fake_server, info
from support.logs import capture_logs
from support.wait import until

from loom.bus.bus import Bus
from loom.schemas.errors import BusUnavailable

LOGIN = "bob:top%2Csecret"


@pytest.fixture
def trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """A certificate for localhost that this process trusts, and its key."""
    cert, key = certificate(tmp_path)
    monkeypatch.setenv("SSL_CERT_FILE", str(cert))
    return cert, key


@asynccontextmanager
async def tls_server(folder: Path, files: tuple[Path, Path], more: str = "") -> AsyncIterator[str]:
    """A nats-server with TLS and the user of LOGIN; yields host and port."""
    config = (
        f'tls {{ cert_file: "{files[0]}", key_file: "{files[1]}", timeout: 5 }}\n'
        f'authorization {{ user: bob, password: "top,secret" }}\n{more}'
    )
    async with configured_server(folder, config) as address:
        yield address.replace("127.0.0.1", "localhost")


@pytest.mark.parametrize("facts", [{}, {"tls_required": False, "tls_available": False}, {"auth_required": True}])
@pytest.mark.parametrize("others", ["", "nats://127.0.0.1:1,"])
async def test_nothing_is_sent_to_a_server_without_tls(facts: dict[str, bool], others: str) -> None:
    async with fake_server(info(**facts)) as fake:
        bus = Bus(f"{others}tls://{LOGIN}@{fake.address}", patience_s=0.4)
        with pytest.raises(BusUnavailable, match="the server offers no TLS") as caught:
            await bus.connect()
    assert fake.connections
    assert fake.received == b""
    assert "secret" not in str(caught.value)


@pytest.mark.slow
async def test_tls_asked_for_on_one_server_holds_for_all_of_them() -> None:
    async with fake_server(info()) as fake:
        with pytest.raises(BusUnavailable, match="offers no TLS"):
            await Bus(f"nats://{LOGIN}@{fake.address},tls://127.0.0.1:1", patience_s=0.5).connect()
    assert fake.received == b""


@pytest.mark.slow
@pytest.mark.parametrize("words", [("doctor",), ("phase", "run", "sense")])
async def test_every_command_ends_at_once_and_names_the_cause(words: tuple[str, ...], tmp_path: Path) -> None:
    async with fake_server(info()) as fake:
        ended = await loom(tmp_path, *words, NATS_URL=f"tls://{LOGIN}@{fake.address}")
    assert ended.code == 3
    assert "the server offers no TLS; give it a certificate, or write nats:// in NATS_URL" in ended.err
    assert fake.received == b""
    assert "secret" not in ended.err + ended.out


async def test_a_server_that_offers_tls_without_demanding_it_gets_it(
    trusted: tuple[Path, Path], tmp_path: Path
) -> None:
    async with tls_server(tmp_path, trusted, "allow_non_tls: true") as address:
        async with Bus(f"tls://{LOGIN}@{address}") as bus:
            assert await alive(bus)
            assert isinstance(bus.connection._nc._transport._io_writer.get_extra_info("ssl_object"), ssl.SSLObject)  # type: ignore[union-attr]
        async with Bus(f"nats://{LOGIN}@{address}") as bus:
            assert await alive(bus)


async def test_a_server_that_demands_tls_gets_it_from_both_schemes(trusted: tuple[Path, Path], tmp_path: Path) -> None:
    async with tls_server(tmp_path, trusted) as address:
        for scheme in ("tls", "nats"):
            async with Bus(f"{scheme}://{LOGIN}@{address}") as bus:
                assert await alive(bus)


async def test_nothing_is_sent_without_tls_at_a_reconnect_and_the_cause_ends_the_process(
    trusted: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with fake_server(info()) as fake:
        async with tls_server(tmp_path, trusted) as address:
            bus = await Bus(f"tls://{LOGIN}@{address}").connect()
            bus.connection._nc.options["reconnect_time_wait"] = 0.02
            for server in bus.connection._nc._server_pool:  # another process takes over the address
                server.uri = server.uri._replace(netloc=fake.address)
        with capture_logs() as logs:
            async with asyncio.timeout(10):
                await bus.tasks.lost.wait()
    assert fake.connections >= 2
    assert fake.received == b""
    assert [entry["event"] for entry in logs].count("reconnect_failed") <= 2  # once for each cause
    assert "offers no TLS" in next(entry["cause"] for entry in logs if entry["event"] == "bus_refused")
    await bus.close()


@asynccontextmanager
async def naming(address: str, other: str) -> AsyncIterator[str]:
    """The server of `address`, which names another one to its clients until this ends; yields host and port."""
    host, port = address.split(":")
    clients: list[asyncio.StreamWriter] = []

    async def pass_on(ours: asyncio.StreamReader, theirs: asyncio.StreamWriter) -> None:
        while chunk := await ours.read(65_536):
            theirs.write(chunk)
        theirs.close()

    async def connect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        clients.append(writer)
        server_reader, server_writer = await asyncio.open_connection(host, int(port))
        facts = json.loads((await server_reader.readline()).removeprefix(b"INFO "))
        writer.write(info(**{**facts, "connect_urls": [other]}))
        with suppress(OSError):
            await asyncio.gather(pass_on(server_reader, writer), pass_on(reader, server_writer))

    async with await asyncio.start_server(connect, "127.0.0.1", 0) as proxy:
        yield f"localhost:{proxy.sockets[0].getsockname()[1]}"
        for client in clients:
            client.transport.abort()


async def test_nothing_is_sent_without_tls_to_a_server_that_another_one_has_named(
    trusted: tuple[Path, Path], tmp_path: Path
) -> None:
    async with fake_server(info()) as fake, tls_server(tmp_path, trusted) as address:
        async with naming(address, fake.address) as known:
            bus = await Bus(f"tls://{LOGIN}@{known}").connect()
            bus.connection._nc.options["reconnect_time_wait"] = 0.02
            assert fake.address in [server.netloc for server in bus.connection._nc.discovered_servers]
        await until(lambda: fake.connections >= 2, what="the client tries the other server")
        assert fake.received == b""
        await bus.close()


@pytest.mark.slow
async def test_a_server_that_another_one_has_named_gets_the_credentials_by_tls(
    trusted: tuple[Path, Path], tmp_path: Path
) -> None:
    async with tls_server(tmp_path, trusted) as address:
        async with naming(address, address.replace("localhost", "127.0.0.1")) as known:
            bus = await Bus(f"tls://{LOGIN}@{known}").connect()
            bus.connection._nc.options["reconnect_time_wait"] = 0.02
        await back(bus)
        await bus.close()


@pytest.mark.parametrize("demand", ["", "allow_non_tls: true"])
async def test_a_certificate_of_an_unknown_authority_or_another_host_is_the_named_cause(
    demand: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = certificate(tmp_path, host="elsewhere.example", ip="127.0.0.9")
    async with tls_server(tmp_path, files, demand) as address:
        for authority, words in (
            (os.devnull, "is not trusted .*SSL_CERT_FILE"),
            (files[0], "is for another host name"),
        ):
            monkeypatch.setenv("SSL_CERT_FILE", str(authority))
            began = time.monotonic()
            with pytest.raises(BusUnavailable, match=words) as caught:
                await Bus(f"tls://{LOGIN}@{address}", patience_s=20).connect()
            assert time.monotonic() - began < 5
            assert "secret" not in str(caught.value)


@pytest.mark.slow
async def test_a_service_ends_with_an_untrusted_certificate(tmp_path: Path) -> None:
    files = certificate(tmp_path)
    async with tls_server(tmp_path, files) as address:
        ended = await loom(tmp_path, "phase", "run", "sense", NATS_URL=f"tls://{address}")
    assert ended.code == 3
    assert "certificate is not trusted" in ended.err
