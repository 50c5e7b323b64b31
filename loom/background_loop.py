"""An event loop in a thread of its own, for callers that have none."""

import asyncio
import atexit
import os
import threading
from collections.abc import Callable
from typing import Final

from loom.bus.natsio.ownership import keep_forever

CLOSE_S: Final = 5.0
"""How long `close` waits for the thread; a task that ignores its cancellation does not hold it up longer."""


class BackgroundLoop:
    """Runs an event loop in a daemon thread, from the first use of `loop` until `close`.

    A forked child has no such thread: it starts one of its own.

    Args:
        at_exit: Called when the interpreter exits and the loop has not been closed.
    """

    def __init__(self, at_exit: Callable[[], None]) -> None:
        self._at_exit = at_exit
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread()
        self._pid = 0

    def loop(self) -> asyncio.AbstractEventLoop:
        """Return the loop, starting it if there is none in this process."""
        with _starting:
            if self._loop is not None and self._pid != os.getpid():
                keep_forever(self._loop)
                self._loop = None
            if self._loop is None:
                self._pid = os.getpid()
                self._loop = asyncio.new_event_loop()
                self._thread = threading.Thread(target=_run, args=(self._loop,), name="loom-loop", daemon=True)
                self._thread.start()
                atexit.register(self._at_exit)
            return self._loop

    def close(self) -> None:
        """Cancel what runs in the loop and end the thread; safe to call twice, or before the first use."""
        with _starting:
            loop = self._loop if self._pid == os.getpid() else None
            if loop is None:
                return
            self._loop = None
        atexit.unregister(self._at_exit)
        loop.call_soon_threadsafe(loop.stop)
        if self._thread is not threading.current_thread():
            self._thread.join(CLOSE_S)


_starting = threading.Lock()
"""Held while a loop is started or closed; released in a forked child, whatever thread held it."""

if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_starting.acquire, after_in_parent=_starting.release, after_in_child=_starting.release)


def _run(loop: asyncio.AbstractEventLoop) -> None:
    try:
        loop.run_forever()
        if tasks := asyncio.all_tasks(loop):
            for task in tasks:
                task.cancel()
            loop.run_until_complete(asyncio.wait(tasks, timeout=CLOSE_S / 2))
        loop.run_until_complete(loop.shutdown_asyncgens())
    finally:
        loop.close()
