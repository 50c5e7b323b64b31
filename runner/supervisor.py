"""Keeps processes running: labels their logs, restarts them when they die, and stops them together.

Each child holds the read end of a pipe as its standard input. The write end closes when this process ends for any
reason. The child then ends itself (`end_with_parent`), so that no process is left behind.
"""

import asyncio
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Final, NamedTuple, NoReturn, Self

import msgspec

from loom.bus.logs.logger import get_logger
from loom.runner.server.nats_server import NatsServer

log = get_logger()

FIRST_S: Final = 0.05
LONGEST_S: Final = 5.0
STEADY_S: Final = 10.0
"""Who has run this long has not died of being started."""
CHECK_S: Final = 0.2
"""How soon a dead server is noticed."""
STOP_GRACE_S: Final = 5.0
"""For a process to close its connection after its drain, before it is killed."""
LINE_BYTES: Final = 64 * 1024
"""Longer lines of a log are cut in pieces."""
LAST_WORDS_S: Final = 1.0
"""Seconds to read the output of a process that has ended; another process may hold its pipe open."""
_COLOURS: Final = (36, 33, 32, 35, 34, 31)


class Program(NamedTuple):
    """What to keep running, and the name it goes by in the log."""

    name: str
    command: tuple[str, ...]


class Backoff:
    """How long to wait before the next start: next to nothing at first, then longer and longer."""

    def __init__(self) -> None:
        self._next_s = FIRST_S

    def after(self, lived_s: float) -> float:
        """Return the pause in seconds after a life of `lived_s`."""
        if lived_s >= STEADY_S:
            self._next_s = FIRST_S
        pause_s, self._next_s = self._next_s, min(2 * self._next_s, LONGEST_S)
        return pause_s


class Supervisor:
    """Keeps programs running for the length of an `async with` block.

    Args:
        programs: Started at once; their names differ.
        environment: Theirs, whole.
        stop_s: Seconds between asking them to end and killing them.
        write_line: Takes each line they print: the program's name, then the line without its end.
    """

    def __init__(
        self,
        programs: Sequence[Program],
        *,
        environment: dict[str, str],
        stop_s: float,
        write_line: Callable[[str, str], None],
    ) -> None:
        self._programs = programs
        self._environment = environment
        self._stop_s = stop_s
        self._write_line = write_line
        self._running: dict[str, asyncio.subprocess.Process] = {}
        self._keepers: list[asyncio.Task[None]] = []
        self._stopping = asyncio.Event()

    async def __aenter__(self) -> Self:
        self._keepers = [asyncio.create_task(self._keep(program)) for program in self._programs]
        return self

    async def __aexit__(self, *_: object) -> None:
        """Ask all of them to end, wait, kill the rest; a cancellation on the way kills at once."""
        self._stopping.set()
        self._signal(signal.SIGTERM)
        try:
            await asyncio.wait(self._keepers, timeout=self._stop_s)
        finally:
            if self._running:
                log.warning("processes_killed", processes=sorted(self._running))
            self._signal(signal.SIGKILL)
            await asyncio.gather(*self._keepers)

    def _signal(self, number: signal.Signals) -> None:
        for process in self._running.values():
            with suppress(ProcessLookupError):
                process.send_signal(number)

    async def _keep(self, program: Program) -> None:
        backoff = Backoff()
        while not self._stopping.is_set():
            born = time.monotonic()
            code = await self._live(program)
            if self._stopping.is_set():
                return
            pause_s = backoff.after(time.monotonic() - born)
            log.warning("process_ended", process=program.name, code=code, again_in_s=pause_s)
            with suppress(TimeoutError):
                async with asyncio.timeout(pause_s):
                    await self._stopping.wait()

    async def _live(self, program: Program) -> int | None:
        """Run it once; return its exit code, or None when it could not even be started."""
        try:
            process = await self._launch(program)
        except OSError as error:  # no memory, no room for another process: may pass
            log.error("process_not_started", process=program.name, error=error.strerror)
            return None
        self._running[program.name] = process
        if self._stopping.is_set():
            self._signal(signal.SIGTERM)
        assert process.stdout is not None  # noqa: S101 - asked for in _launch
        relaying = asyncio.create_task(self._relay(program.name, process.stdout))
        try:
            return await process.wait()
        finally:
            del self._running[program.name]
            await asyncio.wait([relaying], timeout=LAST_WORDS_S)
            relaying.cancel()

    async def _launch(self, program: Program) -> asyncio.subprocess.Process:
        return await asyncio.create_subprocess_exec(
            *program.command,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env=self._environment,
            start_new_session=True,  # Ctrl-C is ours to pass on
        )

    async def _relay(self, name: str, output: asyncio.StreamReader) -> None:
        rest = b""
        while chunk := await output.read(LINE_BYTES):
            *lines, rest = (rest + chunk).split(b"\n")
            if len(rest) >= LINE_BYTES:
                lines, rest = [*lines, rest], b""
            for line in lines:
                self._write_line(name, line.decode(errors="replace"))
        if rest:
            self._write_line(name, rest.decode(errors="replace"))


def labelled(names: Sequence[str]) -> Callable[[str, str], None]:
    """Return a function that writes a line of a program to standard error, with the program's name.

    On a terminal the name stands in front of the line, in colour. Elsewhere each line is a JSON object with the name
    under `process`.
    """
    if not sys.stderr.isatty():
        return lambda name, line: _write(with_process(name, line))
    width = max(map(len, names))
    colourful = not os.environ.get("NO_COLOR")

    def write_line(name: str, line: str) -> None:
        label = f"{name:<{width}} │"
        if colourful:
            label = f"\x1b[{_COLOURS[names.index(name) % len(_COLOURS)]}m{label}\x1b[0m"
        _write(f"{label} {line}")

    return write_line


def with_process(name: str, line: str) -> str:
    """Return a line of a program as a JSON object with the program's name; other text becomes an event `output`."""
    try:
        event = msgspec.json.decode(line)
    except ValueError:  # msgspec's are such
        event = None
    if not isinstance(event, dict):
        event = {"event": "output", "level": "warning", "text": line}
    return msgspec.json.encode({"process": name, **event}).decode()


def _write(line: str) -> None:
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


async def keep_alive(server: NatsServer) -> NoReturn:
    """Bring the server up again, on the same port and store, whenever it has gone.

    Raises:
        BusUnavailable: It does not come up again.
    """
    backoff, born = Backoff(), time.monotonic()
    while True:
        await asyncio.sleep(CHECK_S)
        if not server.ended:
            continue
        pause_s = backoff.after(time.monotonic() - born)
        log.warning("server_ended", again_in_s=pause_s)
        await asyncio.sleep(pause_s)
        await asyncio.to_thread(server.restart)
        born = time.monotonic()
        log.info("server_restarted", pid=server.pid)


def end_with_parent(within_s: float) -> None:
    """Have this process end as by SIGTERM when its standard input ends, and `within_s` later at the latest."""

    def wait() -> None:
        while os.read(0, 4096):
            pass
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(within_s)
        os._exit(1)

    threading.Thread(target=wait, name="end with parent", daemon=True).start()
