"""An event loop in a background thread, for synchronous callers."""

import asyncio
import atexit
import os
import threading
from collections.abc import Callable
from typing import Final

from loom.bus.natsio.loop_ownership import keep_forever

CLOSE_S: Final = 5.0
"""Seconds that `close` waits for the thread, for example if a task ignores its cancellation."""


class BackgroundLoop:
    """Runs an event loop in a daemon thread, from the first call of `loop` until `close`.

    A forked child starts another thread, because it does not inherit the parent's.

    Args:
        at_exit: Called at the exit of the interpreter if the loop is not closed.
    """

    def __init__(self, at_exit: Callable[[], None]) -> None:
        self._at_exit = at_exit
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread()
        self._pid = 0

    def loop(self) -> asyncio.AbstractEventLoop:
        """Return the loop; start it if this process has none."""
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
        """Cancel the tasks of the loop and end the thread; safe to call twice, or before `loop`."""
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
"""Held while a loop starts or closes; released in a forked child, even if another thread held it."""

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
