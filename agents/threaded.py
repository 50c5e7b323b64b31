"""Sync generators of users, iterated in a thread of their own."""

import asyncio
import threading
from collections import deque
from collections.abc import Generator
from contextlib import suppress
from contextvars import copy_context
from typing import Any

AHEAD = 64
"""Items a generator may be ahead of its reader."""

_END = object()


class ThreadedIteration:
    """Iterates over a generator in a thread, so that what it does between two items does not block the event loop.

    The thread sees the context variables of the caller. `aclose` returns at once: the generator is closed in its
    thread when it next yields.
    """

    def __init__(self, source: Generator[Any, Any, Any]) -> None:
        self._source = source
        self._loop = asyncio.get_running_loop()
        self._items: deque[Any] = deque()
        self._failure: BaseException | None = None
        self._ready = asyncio.Event()
        self._room = threading.Semaphore(AHEAD)
        self._closed = False
        context = copy_context()
        threading.Thread(target=context.run, args=(self._work,), name="loom-user-code", daemon=True).start()

    def __aiter__(self) -> "ThreadedIteration":
        return self

    async def __anext__(self) -> Any:
        while not self._items:
            self._ready.clear()
            if not self._items:  # one may have come before the clearing
                await self._ready.wait()
        if self._items[0] is not _END:
            self._room.release()
            return self._items.popleft()
        failure, self._failure = self._failure, None
        if isinstance(failure, StopAsyncIteration):
            raise RuntimeError("the generator raised StopAsyncIteration") from failure  # noqa: TRY004 - as Python does
        if failure is not None:
            raise failure
        raise StopAsyncIteration

    async def aclose(self) -> None:
        """Have the generator closed when it next yields."""
        self._closed = True
        self._room.release()

    def _work(self) -> None:
        try:
            for item in self._source:
                self._room.acquire()
                if self._closed:
                    break
                self._put(item)
            self._source.close()
        except BaseException as error:  # noqa: BLE001 - raised again where the generator is iterated
            self._failure = error
        self._put(_END)

    def _put(self, item: Any) -> None:
        self._items.append(item)
        with suppress(RuntimeError):  # the loop has closed: the reader has gone with it
            self._loop.call_soon_threadsafe(self._ready.set)
