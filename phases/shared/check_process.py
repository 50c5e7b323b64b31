"""One helper process: started, called and ended from the event loop.

The process is not started through asyncio, so that it needs no signal handler and works in any thread.
"""

import asyncio
import os
import signal
import socket
import struct
import subprocess
import sys
import weakref
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Final, Self

START_S: Final = 20.0
"""Wall-clock seconds until the process must be ready; an idle machine needs 0.2 s."""
REAP_S: Final = 1.0
_REAP_STEP_S: Final = 0.005
_LENGTH = struct.Struct(">I")
_BOOT: Final = "import sys; sys.path += sys.argv[2:]; import json_schema_check; json_schema_check.main()"
_KEPT_VARIABLES: Final = ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH")
"""The only environment variables that the process inherits, because others may hold secrets."""


class HelperDied(Exception):
    """The process ended before its answer.

    Args:
        why: "cpu", or "ended" where the cause is unknown, such as lack of memory.
    """

    def __init__(self, why: str) -> None:
        super().__init__(why)
        self.why = why


class HelperProcess:
    """A running helper. It ends with `close`, with this object, and with this process."""

    def __init__(self, process: "subprocess.Popen[bytes]", own: socket.socket) -> None:
        self._process = process
        self._socket = own
        self._end = weakref.finalize(self, _end, process, own)
        self._end.atexit = False  # the process then reads the end of its input
        self.closed = asyncio.Event()
        """Set by `close`."""

    @classmethod
    async def start(cls) -> Self:
        """Start a helper and return it once it is ready.

        Raises:
            OSError: The system cannot start a process now.
            HelperDied: The process ended at once.
            TimeoutError: The process is not ready in time.
        """
        own, peer = socket.socketpair()
        try:
            own.setblocking(False)
            process = subprocess.Popen(  # noqa: S603, ASYNC220 - a vfork: the loop stands for a millisecond
                [sys.executable or "python3", "-I", "-S", "-B", "-c", _BOOT, str(os.getpid()), *_folders()],
                stdin=peer.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env={name: os.environ[name] for name in _KEPT_VARIABLES if name in os.environ},
                cwd="/",
                start_new_session=True,  # Ctrl-C in the terminal is for the parent
            )
        except BaseException:
            own.close()
            raise
        finally:
            peer.close()
        helper = cls(process, own)
        try:
            async with asyncio.timeout(START_S):
                await helper._receive()
        except BaseException:
            helper.close()
            raise
        return helper

    async def ask(self, request: bytes, within_s: float) -> bytes:
        """Return the reply to one request. After any error, a cancellation too, the process has to be closed.

        Raises:
            HelperDied: The process has ended.
            TimeoutError: No reply in `within_s` seconds of wall-clock time.
        """
        async with asyncio.timeout(within_s):
            try:
                await asyncio.get_running_loop().sock_sendall(self._socket, _LENGTH.pack(len(request)) + request)
            except OSError:
                raise HelperDied(await self._why()) from None
            return await self._receive()

    @property
    def is_alive(self) -> bool:
        """Whether the process runs and has not been closed."""
        return self._end.alive and self._process.poll() is None

    def close(self) -> None:
        """Kill the process; safe to call twice."""
        self._end()
        self.closed.set()

    async def _receive(self) -> bytes:
        head = await self._read_exactly(_LENGTH.size)
        return await self._read_exactly(_LENGTH.unpack(head)[0])

    async def _read_exactly(self, size: int) -> bytes:
        loop = asyncio.get_running_loop()
        received = b""
        while len(received) < size:
            try:
                part = await loop.sock_recv(self._socket, size - len(received))
            except OSError:
                part = b""
            if not part:
                raise HelperDied(await self._why())
            received += part
        return received

    async def _why(self) -> str:
        """Return why the process has ended; its socket closes shortly before its exit code is available."""
        for _ in range(int(REAP_S / _REAP_STEP_S)):
            if (code := self._process.poll()) is not None:
                return "cpu" if code == -signal.SIGPROF else "ended"
            await asyncio.sleep(_REAP_STEP_S)
        return "ended"


def _end(process: "subprocess.Popen[bytes]", own: socket.socket) -> None:
    own.close()
    process.kill()
    with suppress(subprocess.TimeoutExpired):  # the next Popen waits for it
        process.wait(REAP_S)


def _folders() -> list[str]:
    """Return the folders from which the helper imports: its own, and those of the packages it needs."""
    specs = [find_spec(name) for name in ("regex", "jsonschema_rs", "msgspec")]
    folders = [str(Path(spec.origin).parent.parent) for spec in specs if spec is not None and spec.origin]
    return list(dict.fromkeys([*folders, str(Path(__file__).parent)]))
