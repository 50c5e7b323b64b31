"""Iterates over sync generators of users in a thread."""

import asyncio
import threading
from collections import deque
from collections.abc import Generator
from contextlib import suppress
from contextvars import copy_context
from typing import Any

AHEAD = 64
"""Items that a generator may yield before they are read."""

_END = object()


class ThreadedIteration:
    """Iterates over a generator in a thread, so that its code does not block the event loop.

    The thread has the context variables of the caller. `aclose` returns at once; the generator is closed in its
    thread when it next yields.
    """

    def __init__(self, source: Generator[Any, Any, Any]) -> None:
        self._source = source
        self._loop = asyncio.get_running_loop()
        self._items: deque[Any] = deque()
        self._failure: BaseException | None = None
        self._ready = asyncio.Event()
        self._places = threading.Semaphore(AHEAD)
        self._closed = False
        context = copy_context()
        threading.Thread(target=context.run, args=(self._work,), name="loom-user-code", daemon=True).start()

    def __aiter__(self) -> "ThreadedIteration":
        return self

    async def __anext__(self) -> Any:
        while not self._items:
            self._ready.clear()
            if not self._items:  # an item may have arrived before the clear
                await self._ready.wait()
        if self._items[0] is not _END:
            self._places.release()
            return self._items.popleft()
        failure, self._failure = self._failure, None
        if isinstance(failure, StopAsyncIteration):
            raise RuntimeError("the generator raised StopAsyncIteration") from failure  # noqa: TRY004 - as Python does
        if failure is not None:
            raise failure
        raise StopAsyncIteration

    async def aclose(self) -> None:
        """Close the generator when it next yields."""
        self._closed = True
        self._places.release()

    def _work(self) -> None:
        try:
            for item in self._source:
                self._places.acquire()
                if self._closed:
                    break
                self._put(item)
            self._source.close()
        except BaseException as error:  # noqa: BLE001 - raised again in `__anext__`
            self._failure = error
        self._put(_END)

    def _put(self, item: Any) -> None:
        self._items.append(item)
        with suppress(RuntimeError):  # the loop has closed, so there is no reader
            self._loop.call_soon_threadsafe(self._ready.set)
