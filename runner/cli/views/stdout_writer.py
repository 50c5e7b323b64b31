"""Writes to standard output without blocking the event loop, even when its reader has stopped reading.

The server cuts off a process that stops reading from it. A process with a slow screen skips messages instead.
"""

import asyncio
import os
import sys
import threading
from queue import SimpleQueue

FULL = 256
"""Lines that may wait to be written."""
WAIT_S = 0.005
BREATH = 32
"""Messages handled before the event loop reads from the socket again."""


class StdoutWriter:
    """Writes lines in a thread of its own, in order."""

    def __init__(self) -> None:
        self._lines: SimpleQueue[str] = SimpleQueue()
        self._fault: OSError | None = None
        self._turn = 0
        # A daemon: a write without a reader never returns, and must not keep the process from ending.
        self._thread = threading.Thread(target=self._write_lines, name="stdout writer", daemon=True)

    async def write(self, text: str) -> None:
        """Queue `text` for the thread; waits while the queue is full.

        Raises:
            OSError: Standard output is closed, a BrokenPipeError when its reader has gone.
        """
        if self._thread.ident is None:
            self._thread.start()
        while self._lines.qsize() >= FULL and self._fault is None:  # noqa: ASYNC110 - the thread cannot wake the loop cheaply
            await asyncio.sleep(WAIT_S)
        if self._fault is not None:
            raise self._fault
        self._lines.put(text)
        await self.pause()

    async def pause(self) -> None:
        """Give the event loop a turn now and then; call it for every message that is not written."""
        self._turn += 1
        if self._turn % BREATH == 0:
            await asyncio.sleep(0)

    def _write_lines(self) -> None:
        # Not through sys.stdout: at its end Python would wait for the lock of a write that never returns.
        descriptor = sys.stdout.fileno()
        try:
            while True:
                text = [self._lines.get()]
                while not self._lines.empty():
                    text.append(self._lines.get())
                data = "".join(text).encode(errors="replace")
                while data:
                    data = data[os.write(descriptor, data) :]
        except OSError as error:
            self._fault = error
