"""Ends a process even when user code blocks its event loop, ignores cancellation or holds a thread."""

import asyncio
import contextlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Coroutine
from types import FrameType, TracebackType
from typing import Any, NoReturn, Self

from loom.bus.logs.log_fields import error_fields
from loom.bus.logs.logger import get_logger

log = get_logger()

EXTRA_S = 2.0
"""Seconds added to the drain time, to give runs back and close connections."""
HURRY_S = 1.0
"""Seconds from a second signal to the end."""
TEAR_DOWN_S = 1.0
"""Seconds for tasks and threads that are left when the work has ended."""
SIGNALS = (signal.SIGINT, signal.SIGTERM)

_left: list[str] = []
"""Names of tasks that still run and would delay the end of the interpreter."""


class StopSignals:
    """Calls `stop` in the event loop at SIGINT or SIGTERM, from a thread: the loop may be blocked.

    Use as a context manager in the main thread, the loop running; elsewhere it does nothing.

    Args:
        limit_s: Seconds from the first signal to the end of the process, whatever still runs; the second one leaves
            a second. Absent: signals only call `stop`.
        last_words: Called in the thread before the process is ended so.
        on_stop: Returns what the process still does, in plain words for standard error; called at the first signal, in
            the thread. Absent: a log line takes its place.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        stop: Callable[[], object],
        *,
        limit_s: float | None,
        last_words: Callable[[], None],
        on_stop: Callable[[], str] | None = None,
    ) -> None:
        self.received: list[int] = []
        """Numbers of the signals, oldest first."""
        self._loop = loop
        self._stop = stop
        self._limit_s = limit_s
        self._last_words = last_words
        self._on_stop = on_stop
        self._end_at = float("inf")
        self._handled = 0
        self._is_main = threading.current_thread() is threading.main_thread()

    def __enter__(self) -> Self:
        if self._is_main:
            # The interpreter writes each signal's number here as it comes. Handlers run only between two steps of the
            # main thread: they are the second way, for a program that takes the descriptor for itself.
            self._ours, self._theirs = socket.socketpair()
            self._theirs.setblocking(False)
            self._before = {number: signal.signal(number, self._on_signal) for number in SIGNALS}
            self._descriptor = signal.set_wakeup_fd(self._theirs.fileno(), warn_on_full_buffer=False)
            threading.Thread(target=self._read_signals, name="loom-signals", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._is_main:
            signal.set_wakeup_fd(self._descriptor)
            for number, handler in self._before.items():
                signal.signal(number, handler)
            self._theirs.close()  # ends the thread

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        self.received.append(number)
        with contextlib.suppress(OSError):  # full: the thread wakes up anyway
            self._theirs.send(b"\0")

    def _read_signals(self) -> None:
        received = 0
        with self._ours:
            while True:
                left_s = self._end_at - time.monotonic()
                if left_s <= 0:
                    self._end()
                self._ours.settimeout(None if left_s == float("inf") else left_s)
                try:
                    numbers = self._ours.recv(64)
                except TimeoutError:
                    continue
                if not numbers:
                    return
                received += sum(number in SIGNALS for number in numbers)
                for _ in range(max(received, len(self.received)) - self._handled):
                    self._handle_signal()

    def _handle_signal(self) -> None:
        """Stop the work, and shorten the time to the end at a second signal."""
        self._handled += 1
        with contextlib.suppress(RuntimeError):  # the loop has just closed
            self._loop.call_soon_threadsafe(self._stop)
        if self._limit_s is not None:
            limit_s = self._limit_s if self._handled == 1 else HURRY_S
            self._end_at = min(self._end_at, time.monotonic() + limit_s)
        with contextlib.suppress(OSError, ValueError):  # the reader of standard error may be gone
            if self._on_stop is not None and self._handled == 1 and sys.stderr.isatty():
                print(self._on_stop(), file=sys.stderr, flush=True)  # noqa: T201 - for the person at the terminal
            else:
                log.info("stopping", hint=self._hint())

    def _hint(self) -> str:
        if self._on_stop is not None and self._handled == 1:
            return self._on_stop()
        return "a second signal ends the process within a second"

    def _end(self) -> NoReturn:
        try:
            self._last_words()
            log.error("ended_by_force", hint="user code was still running: it blocks, or ignores cancellation")
        except Exception as error:  # noqa: BLE001 - nothing may hold up the end
            with contextlib.suppress(OSError, ValueError):
                log.error("last_words_failed", **error_fields(error))
        finally:
            exit_now(1)


def tear_down(loop: asyncio.AbstractEventLoop) -> None:
    """Cancel the remaining tasks of a loop, wait a second for them, and close the loop."""
    tasks = asyncio.all_tasks(loop)
    for task in tasks:
        task.cancel()
    unfinished = _wait(loop, tasks)
    unfinished |= _wait(loop, {loop.create_task(loop.shutdown_asyncgens(), name="asynchronous generators")})
    unfinished |= _wait(loop, {loop.create_task(loop.shutdown_default_executor(), name="threads of asyncio.to_thread")})
    _left.extend(task.get_name() for task in unfinished)
    if not unfinished:
        loop.close()


def _wait(loop: asyncio.AbstractEventLoop, tasks: set[asyncio.Task[Any]]) -> set[asyncio.Task[Any]]:
    if not tasks:
        return set()
    waiting: Coroutine[Any, Any, Any] = asyncio.wait(tasks, timeout=TEAR_DOWN_S)
    return set(loop.run_until_complete(waiting)[1])


def end(code: int) -> NoReturn:
    """End the process with `code`; at once when tasks are left that would delay its end."""
    if _left:
        log.warning("work_left_behind", left=_left)
        exit_now(code)
    sys.exit(code)


def exit_now(code: int) -> NoReturn:
    """End the process at once, after flushing its output."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # closed, or its reader is gone
            stream.flush()
    os._exit(code)
