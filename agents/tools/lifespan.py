"""Resources that are open while tools may be called, such as connections, sessions and processes."""

import asyncio
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Generic, TypeVar

from loom.agents.user_code import contain, error_fields, type_name
from loom.bus.logs.logger import get_logger
from loom.schemas.errors import LoomError

CLOSE_S = 5.0
"""Seconds a context manager may take to close before it is cancelled."""

T = TypeVar("T")

log = get_logger()


class Lifespan(Generic[T]):
    """Keeps an async context manager open from the first `start` to the last `close`.

    Several tools may share a lifespan. The context manager is entered and exited in one separate task.

    Args:
        open_: Returns the context manager; called each time it is opened, and again after a failure.
        name: Name of the resource in messages.
    """

    def __init__(
        self, open_: Callable[[], AbstractAsyncContextManager[T]], *, name: str = "the tool's resource"
    ) -> None:
        self.name = name
        self._open = open_
        self._users = 0
        self._task: asyncio.Task[None] | None = None
        self._closing = asyncio.Event()
        self._leaving: set[asyncio.Task[None]] = set()

    @property
    def value(self) -> T:
        """The value of the entered context manager.

        Raises:
            LoomError: The lifespan is not open.
        """
        if self._task is None or self._task.done() or not self._ready.done():
            raise LoomError(f"{self.name} is not open")
        return self._ready.result()

    async def start(self) -> None:
        """Open the lifespan, or wait until it is open.

        Raises:
            LoomError: The lifespan cannot be opened.
        """
        self._users += 1
        try:
            await self.ready()
        except BaseException:
            await self.close()
            raise

    async def ready(self) -> None:
        """Wait until the lifespan is open; if it has ended since `start`, it is opened again.

        Raises:
            LoomError: The lifespan cannot be opened, or was not started.
        """
        if not self._users:
            raise LoomError(f"{self.name} is not open: run the agent on a node, or inside `async with agent`")
        if self._task is None or self._task.done():
            self._ready: asyncio.Future[T] = asyncio.get_running_loop().create_future()
            self._closing = asyncio.Event()
            self._task = asyncio.create_task(self._hold(self._ready, self._closing))
        await asyncio.shield(self._ready)

    def reopen(self) -> None:
        """Close the context manager, so that the next call opens it again, for example after a lost connection."""
        task, closing = self._task, self._closing
        self._task = None
        if task is not None and not task.done():
            self._leaving.add(task)
            task.get_loop().call_soon_threadsafe(closing.set)  # a sync call runs in a thread

    async def close(self) -> None:
        """Close the lifespan after its last user; a context manager that does not exit within 5 s is cancelled."""
        self._users = max(0, self._users - 1)
        if self._users:
            return
        opening = self._task is not None and not self._ready.done()
        self.reopen()
        leaving = set(self._leaving)
        if leaving and not opening:
            await asyncio.wait(leaving, timeout=CLOSE_S)
        unfinished = {task for task in leaving if task.cancel()}
        if unfinished:
            await asyncio.wait(unfinished, timeout=CLOSE_S)
        if not all(task.done() for task in leaving):
            log.warning("tool_resource_left_open", resource=self.name)

    async def _hold(self, ready: "asyncio.Future[T]", closing: asyncio.Event) -> None:
        try:
            with contain():
                async with self._open() as value:
                    ready.set_result(value)
                    await closing.wait()
        except Exception as error:  # noqa: BLE001 - a user's context manager may raise anything
            log.warning("tool_resource_failed", resource=self.name, **error_fields(error))
            if not ready.done():
                ready.set_exception(LoomError(f"{self.name} cannot be opened: {type_name(error)}"))
        finally:
            if not ready.done():
                ready.set_exception(LoomError(f"{self.name} was closed while it opened"))
            ready.exception()  # marks it as retrieved, so that asyncio does not report it
            self._leaving.discard(asyncio.current_task())
